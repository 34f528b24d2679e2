"""Vectors of candidates, and of contexts where these have a single one."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from poly_encoders.serving.request_errors import InvalidRequestError
from poly_encoders.serving.request_forms import Embed, Embeddings, Similarity, checked, described, read_form, read_json
from poly_encoders.serving.rerank_routes import refuse_cut, service_of, similar
from poly_encoders.serving.service import Cost, Service

router = APIRouter(tags=["embed"])

QUERIES = ("query", "search_query")  # names of the contexts' side, as clients have them


@router.post("/embed", openapi_extra=described(Embed))
async def embed(request: Request) -> JSONResponse:
    """As text-embeddings-inference has it: of candidates, or with `prompt_name` "query" of contexts."""
    return await _embedded(service_of(request), await read_form(request, Embed))


@router.post("/", openapi_extra=described(Similarity, Embed))
async def task(request: Request) -> JSONResponse:
    """The Hub's tasks, as its client posts them: sentence-similarity or feature-extraction."""
    body = await read_json(request)
    if isinstance(body.get("inputs"), Mapping):
        return await similar(service_of(request), checked(body, Similarity))
    return await _embedded(service_of(request), checked(body, Embed))


async def _embedded(service: Service, form: Embed) -> JSONResponse:
    is_query = form.prompt_name in QUERIES
    name = None if is_query or form.prompt_name in ("document", "passage") else form.prompt_name
    vectors, cost = await _vectors(service, form.inputs, "inputs", is_query, form.dimensions, name)
    refuse_cut(cost, form.truncate)
    if form.normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return JSONResponse(vectors.tolist(), headers=cost.headers())


@router.post("/v1/embeddings", openapi_extra=described(Embeddings))
@router.post("/embeddings", openapi_extra=described(Embeddings))
async def embeddings(request: Request) -> JSONResponse:
    """As OpenAI has it: of candidates, or with `input_type` "query" of contexts."""
    service, form = service_of(request), await read_form(request, Embeddings)
    vectors, cost = await _vectors(service, form.input, "input", form.input_type in QUERIES, form.dimensions)
    rows: list[Any] = vectors.tolist()
    if form.encoding_format == "base64":
        rows = [base64.b64encode(row.numpy().tobytes()).decode() for row in vectors]
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)],
        "model": request.app.state.name,
        "usage": cost.usage(),
    }
    return JSONResponse(answer, headers=cost.headers())


async def _vectors(
    service: Service,
    inputs: str | Sequence[Any],
    what: str,
    is_query: bool,
    dimensions: int | None,
    prompt: str | None = None,
) -> tuple[torch.Tensor, Cost]:
    """Vectors `(n, dim)` of one side's texts.

    Raises:
        InvalidRequestError: no inputs, a context of several vectors, or another width than the model's.
    """
    many = [inputs] if isinstance(inputs, str) else inputs
    if not many:
        raise InvalidRequestError("There are no texts to encode.")
    if is_query and service.context_vectors > 1:
        raise InvalidRequestError(
            f"A context has {service.context_vectors} vectors in this Poly-encoder, and no single one. Ask /rerank or "
            "/score with the context itself, or /search where there is an index; encode only candidates here."
        )
    if is_query:
        service.check_number(len(many), what)
        texts = [service.context(one, f"{what}[{place}]") for place, one in enumerate(many)]
    else:
        texts = service.candidates(many, what)
    vectors, cost = await service.embed(texts, "query" if is_query else "document", prompt)
    if dimensions not in (None, width := vectors.shape[-1]):
        raise InvalidRequestError(f"This model's vectors are {width} wide, not {dimensions}. Leave dimensions out.")
    return vectors, cost
