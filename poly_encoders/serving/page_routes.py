"""The conversation page at /: what would be answered, from the index or a list of candidates, and why."""

import asyncio
from pathlib import Path

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from poly_encoders import demo
from poly_encoders.demo import drawing
from poly_encoders.demo.dialogues import EXAMPLES
from poly_encoders.demo.wording import wording
from poly_encoders.modeling.scoring_poly_encoder import best_first
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.serving.index_routes import answered
from poly_encoders.serving.request_errors import InvalidRequestError, NotFoundError
from poly_encoders.serving.request_forms import Form, read_form
from poly_encoders.serving.rerank_routes import service_of

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent
_FILES = {
    "page.js": (_HERE / "page.js", "text/javascript"),
    "page.css": (_HERE / "page.css", "text/css"),
    "style.css": (Path(demo.__file__).with_name("style.css"), "text/css"),
}
# Nothing comes from elsewhere, and no text on the page can run.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'"
SHOWN = 10  # candidates of the index


class PageDialogue(Form):
    """What was typed. Without an index, candidates come with it."""

    turns: list[str] = Field(min_length=1)
    candidates: list[str] | None = None
    filter: str | None = None


class PageChoice(Form):
    """A candidate to explain."""

    turns: list[str] = Field(min_length=1)
    candidate: str
    all_vectors: bool = False


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    words = wording(service_of(request).model)
    turns, candidates = next(iter(EXAMPLES.values()))
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    filled = {
        "NAME": request.app.state.name,
        "KIND": words.kind,
        "HOW": words.how,
        "TURNS": turns,
        "CANDIDATES": candidates,
        "FROM": "typed" if request.app.state.index is None else "index",
    }
    for mark, value in filled.items():
        text = text.replace(f"%{mark}%", drawing.shown(value))
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """What the page is made of."""
    if name not in _FILES:
        raise NotFoundError(f"The page has no file {name[:80]!r}.")
    path, kind = _FILES[name]
    return Response(path.read_bytes(), media_type=kind)


@router.post("/page/answers")
async def answers(request: Request) -> JSONResponse:
    """The ranking as HTML, and its texts."""
    service, form = service_of(request), await read_form(request, PageDialogue)
    context, note = service.context(form.turns, "the dialogue"), ""
    if (index := request.app.state.index) is not None:
        vectors, _ = await service.embed([context], "query")
        hits = await answered(index.search(vectors[0], SHOWN, form.filter or None))
        entries = [{"corpus_id": place, "score": hit["score"], "text": hit["text"]} for place, hit in enumerate(hits)]
        proven = "none of the others is better" if hits.proven else f"{hits.looked_at:.1%} of them were looked at"
        note = f"Of {len(index):,} candidates; {proven}."
    else:
        texts = service.candidates(form.candidates or [], "candidates")
        scores, _ = await service.scores([context], texts)
        entries = [{"corpus_id": place, "score": score, "text": texts[place]} for place, score in best_first(scores)]
    if not entries:
        raise InvalidRequestError("There is no candidate.")
    scale = drawing.COSINE_SCALE if getattr(service.model, "scores_are_cosines", False) else 1
    html = drawing.ranking(entries, isinstance(service.model, PolyEncoder), scale)
    texts_by_id = {entry["corpus_id"]: entry["text"] for entry in entries}
    return JSONResponse({"ranking": html, "texts": texts_by_id, "best": entries[0]["corpus_id"], "note": note})


@router.post("/page/why")
async def why(request: Request) -> JSONResponse:
    """The explanation as HTML."""
    service, form = service_of(request), await read_form(request, PageChoice)
    model, words = service.model, wording(service.model)
    if not isinstance(model, PolyEncoder):
        return JSONResponse({"why": ""})
    service.context(form.turns, "the dialogue")
    [candidate] = service.candidates([form.candidate], "candidate")
    found = await asyncio.to_thread(model.explain, form.turns, candidate)
    return JSONResponse({"why": drawing.explanation(found, candidate, words.vector, form.all_vectors)})
