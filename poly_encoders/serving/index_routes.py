"""The best of an index's candidates for a context; candidates added, changed, deleted, looked at."""

import json
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from poly_encoders.serving.request_errors import InvalidRequestError, NotFoundError
from poly_encoders.serving.request_forms import Candidates, Deletion, Search, described, read_form
from poly_encoders.serving.rerank_routes import service_of
from poly_encoders.serving.served_index import ServedIndex

router = APIRouter(tags=["index"])

MOST_SHOWN = 1000  # candidates of one look


class RowsResponse(Response):
    """JSON of rows whose metadata may hold dates."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, default=str).encode()


def index_of(request: Request) -> ServedIndex:
    """
    Raises:
        NotFoundError: the service has none.
    """
    if (index := request.app.state.index) is None:
        raise NotFoundError("This service has no index of candidates: start it with --index FOLDER.")
    return index


async def answered(work: Any) -> Any:
    """What `work` gives; what the index says against a request is the request's fault."""
    try:
        return await work
    except (TypeError, ValueError) as error:
        said = str(error).replace("upsert replaces it", "PUT /candidates replaces it")
        raise InvalidRequestError(said) from None


@router.post("/search", openapi_extra=described(Search))
async def search(request: Request) -> Response:
    """The best candidates for a context, with their texts and metadata, and whether the answer is proven."""
    index, service, form = index_of(request), service_of(request), await read_form(request, Search)
    vectors, cost = await service.embed([service.context(form.context, "context")], "query")
    hits = await answered(index.search(vectors[0], form.top_k, form.filter, form.engine, form.certify))
    answer = {"results": [*hits], "proven": hits.proven, "looked_at": hits.looked_at}
    return RowsResponse(answer, headers=cost.headers())


@router.get("/candidates")
async def look(request: Request) -> Response:
    """Some candidates: `?limit=20&offset=0&filter=...`."""
    query = request.query_params
    limit, offset = _whole(query.get("limit", "20"), "limit"), _whole(query.get("offset", "0"), "offset")
    if limit > MOST_SHOWN:
        raise InvalidRequestError(f"limit is at most {MOST_SHOWN}, not {limit}.")
    index = index_of(request)
    rows = await answered(index.look(query.get("filter"), limit, offset))
    return RowsResponse({"candidates": rows, "total": len(index)})


@router.post("/candidates", openapi_extra=described(Candidates))
async def add(request: Request) -> Response:
    """Add candidates; those that are there already, the same, are left."""
    return await _written(request, "add")


@router.put("/candidates", openapi_extra=described(Candidates))
async def change(request: Request) -> Response:
    """Add candidates in place of those of the same ids."""
    return await _written(request, "upsert")


async def _written(request: Request, method: str) -> Response:
    index, service, form = index_of(request), service_of(request), await read_form(request, Candidates)
    service.check_number(len(form.candidates), "candidates")
    if missing := [place for place, row in enumerate(form.candidates) if "id" not in row]:
        raise InvalidRequestError(f"candidates[{missing[0]}] has no id.")
    service.candidates([row.get("text") for row in form.candidates], "candidates")  # type: ignore[misc]
    written = await answered(index.write(method, form.candidates))
    return RowsResponse({"written": written, "total": len(await index.current())})


@router.delete("/candidates", openapi_extra=described(Deletion))
async def delete(request: Request) -> Response:
    """Delete candidates by their ids or a condition."""
    index, form = index_of(request), await read_form(request, Deletion)
    deleted = await answered(index.write("delete", form.ids, filter=form.filter))
    return RowsResponse({"deleted": deleted, "total": len(await index.current())})


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 12:
        raise InvalidRequestError(f"{name} is a whole number, not {text!r:.40}.")
    return int(text)
