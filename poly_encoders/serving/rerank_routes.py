"""Candidates ranked or scored for a context, in the forms of those who have defined one."""

import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.modeling.scoring_poly_encoder import best_first
from poly_encoders.serving.request_errors import InvalidRequestError
from poly_encoders.serving.request_forms import (
    Rerank,
    Score,
    Similarity,
    SimilarityParameters,
    TeiRerank,
    checked,
    described,
    read_form,
    read_json,
)
from poly_encoders.serving.service import Cost, Service

router = APIRouter(tags=["rank"])


def service_of(request: Request) -> Service:
    """The application's."""
    return request.app.state.service


def to_unit(service: Service) -> Callable[[float], float]:
    """A map of scores to 0 to 1 that keeps their order.

    Of cosines `(1 + score) / 2`; of a Cross-encoder's logits the sigmoid, unless the model has one already; of other
    dot products `(1 + z / (1 + |z|)) / 2`, z the score over the model's temperature: they may be so large that the
    sigmoid of all of them is 1.
    """
    model = service.model
    if getattr(model, "scores_are_cosines", False):
        return lambda score: min(1.0, max(0.0, (1 + score) / 2))
    if isinstance(model, CrossEncoder):
        return _raw if type(model.activation_fn).__name__ == "Sigmoid" else _sigmoid
    scale = float(getattr(model, "final_scale", 1.0))
    return lambda score: (1 + score * scale / (1 + abs(score * scale))) / 2


def _raw(score: float) -> float:
    return score


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def refuse_cut(cost: Cost, truncate: bool | None) -> None:
    """
    Raises:
        InvalidRequestError: a text was cut, and `truncate` is false.
    """
    if truncate is False and cost.cut:
        raise InvalidRequestError(f"{cost.cut} of the texts are longer than the model reads. truncate=true cuts them.")


@router.post("/rerank", openapi_extra=described(TeiRerank, Rerank))
async def rerank(request: Request) -> JSONResponse:
    """With `texts` as text-embeddings-inference, with `documents` as vLLM and Infinity."""
    body = await read_json(request)
    if ("texts" in body) == ("documents" in body):
        raise InvalidRequestError("Give either texts (text-embeddings-inference's form) or documents (vLLM's).")
    if "documents" in body:
        form = checked(body, Rerank)
        return await _ranked(request, form, form.return_documents is not False)
    return await _tei_ranked(service_of(request), checked(body, TeiRerank))


async def _tei_ranked(service: Service, form: TeiRerank) -> JSONResponse:
    context, texts = service.context(form.query), service.candidates(form.texts, "texts")
    scores, cost = await service.scores([context], texts)
    refuse_cut(cost, form.truncate)
    shown = _raw if form.raw_scores else to_unit(service)
    rows: list[dict[str, Any]] = [
        {"index": index, "score": shown(score)} for index, score in best_first(scores, form.top_n or None)
    ]
    if form.return_text:
        for row in rows:
            row["text"] = texts[row["index"]]
    return JSONResponse(rows, headers=cost.headers())


@router.post("/v1/rerank", openapi_extra=described(Rerank))
@router.post("/v2/rerank", openapi_extra=described(Rerank))
async def rerank_documents(request: Request) -> JSONResponse:
    """As Cohere, Jina and vLLM have it."""
    form = await read_form(request, Rerank)
    return await _ranked(request, form, bool(form.return_documents))


@router.post("/infinity/rerank", openapi_extra=described(Rerank))
async def rerank_infinity(request: Request) -> JSONResponse:
    """As /rerank, for Infinity's clients, whose documents come back as plain texts: their base address is /infinity."""
    form = await read_form(request, Rerank)
    return await _ranked(request, form, bool(form.return_documents), plain=True)


async def _ranked(request: Request, form: Rerank, with_documents: bool, plain: bool = False) -> JSONResponse:
    service, given = service_of(request), form.texts()
    context = service.context(form.query)
    texts = service.candidates(given)
    if form.max_tokens_per_doc is not None:
        texts = service.candidates(service.cut(texts, form.max_tokens_per_doc))
    scores, cost = await service.scores([context], texts)
    shown = _raw if form.raw_scores or form.use_activation is False else to_unit(service)
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": shown(score)} for index, score in best_first(scores, form.top_n or None)
    ]
    if with_documents:
        for row in results:
            text = given[row["index"]]
            row["document"] = text if plain else {"text": text}
    units = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    answer = {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "rerank",
        "created": int(time.time()),
        "model": request.app.state.name,
        "results": results,
        "meta": units,
        "usage": cost.usage(),
    }
    return JSONResponse(answer, headers=cost.headers())


@router.post("/score", openapi_extra=described(Score))
@router.post("/v1/score", openapi_extra=described(Score))
async def score(request: Request) -> JSONResponse:
    """As vLLM has it. Raw scores, unless `use_activation` is true."""
    service, form = service_of(request), await read_form(request, Score)
    contexts, candidates = form.sides()
    texts = service.candidates(candidates, "the candidates")
    checked_contexts = [service.context(context, f"context {place}") for place, context in enumerate(contexts)]
    scores, cost = await service.scores(checked_contexts, texts)
    shown = to_unit(service) if form.use_activation else _raw
    data = [{"index": place, "object": "score", "score": shown(value)} for place, value in enumerate(scores.tolist())]
    answer = {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": request.app.state.name,
        "data": data,
        "usage": cost.usage(),
    }
    return JSONResponse(answer, headers=cost.headers())


@router.post("/similarity", openapi_extra=described(Similarity))
async def similarity(request: Request) -> JSONResponse:
    """As text-embeddings-inference and the Hub's task have it: raw scores in the order of the sentences."""
    return await similar(service_of(request), await read_form(request, Similarity))


async def similar(service: Service, form: Similarity) -> JSONResponse:
    """Scores of the sentences."""
    parameters = form.parameters or SimilarityParameters()
    context = service.context(form.inputs.source_sentence, "source_sentence")
    texts = service.candidates(form.inputs.sentences, "sentences")
    scores, cost = await service.scores([context], texts, parameters.prompt_name)
    refuse_cut(cost, parameters.truncate)
    return JSONResponse(scores.tolist(), headers=cost.headers())
