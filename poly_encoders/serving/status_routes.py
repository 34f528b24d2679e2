"""How the service is: alive, ready, what it serves, what it has counted."""

from importlib.metadata import version
from typing import Any

import torch
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from poly_encoders.serving.request_errors import UnavailableError
from poly_encoders.serving.rerank_routes import service_of

router = APIRouter(tags=["status"])


async def live() -> Response:
    """The process answers: do not restart it."""
    return Response()


async def health(request: Request) -> Response:
    """The model answers as well: send requests here."""
    if not service_of(request).batcher.is_alive:
        raise UnavailableError("The model's queue is not at work: the service begins or ends.")
    return Response()


for path, asked in (("/live", live), ("/health", health), ("/ready", health), ("/ping", health)):
    router.add_api_route(path, asked, methods=["GET"])
    router.add_api_route(path, asked, methods=["HEAD"], include_in_schema=False)


@router.get("/info")
async def info(request: Request) -> JSONResponse:
    """The model and the bounds, by text-embeddings-inference's names where it has them."""
    service, index = service_of(request), request.app.state.index
    options, model = service.options, service.model
    weights = next(model.parameters())
    found: dict[str, Any] = {
        "model_id": request.app.state.name,
        "model_type": service.kind,
        "model_dtype": str(weights.dtype).removeprefix("torch."),
        "device": str(weights.device),
        "context_vectors": service.context_vectors,
        "max_input_length": max(service.limits.values()),
        "max_context_length": service.limits["query"],
        "max_candidate_length": service.limits["document"],
        "max_client_batch_size": options.max_documents,
        "max_batch_tokens": options.max_batch_tokens,
        "max_concurrent_requests": options.max_waiting,
        "auto_truncate": True,
        "version": version("poly-encoders"),
        "torch": torch.__version__,
        "index": None if index is None else {"candidates": len(index)},
    }
    return JSONResponse(found)


@router.get("/v1/models")
@router.get("/models")
async def models(request: Request) -> JSONResponse:
    """As OpenAI has it."""
    model = {"id": request.app.state.name, "object": "model", "created": 0, "owned_by": "poly-encoders"}
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus's text."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
