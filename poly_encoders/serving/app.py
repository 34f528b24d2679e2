"""The application: routes, errors in each interface's form, and what begins and ends with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.loading import load_model
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.serving import embedding_routes, index_routes, page_routes, rerank_routes, status_routes
from poly_encoders.serving.request_errors import (
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    RequestError,
    error_answer,
    interface_of,
)
from poly_encoders.serving.request_guard import RequestGuard
from poly_encoders.serving.serve_options import ServeOptions
from poly_encoders.serving.served_index import ServedIndex
from poly_encoders.serving.service import Service

ROUTERS = (rerank_routes, embedding_routes, index_routes, status_routes, page_routes)


def create_app(options: ServeOptions, model: PolyEncoder | BiEncoder | CrossEncoder | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        options: What it serves, and its bounds.
        model: The model, if it is loaded already.

    Raises:
        OSError, ValueError: there is no such model or index, or the index is of another model.
    """
    model = load_model(options.model, device=options.device) if model is None else model
    if options.index is not None and isinstance(model, CrossEncoder):
        raise ValueError("A Cross-encoder makes no vectors of candidates, so it searches no index: leave --index out.")
    service = Service(model, options)
    index = None if options.index is None else ServedIndex(options.index, model, options.milvus)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(
        title="poly-encoders",
        version=version("poly-encoders"),
        description="Candidates ranked for contexts: texts, lists of turns or chat messages.",
        lifespan=life,
    )
    app.state.name = Path(options.model).name if Path(options.model).is_dir() else options.model
    app.state.service, app.state.index = service, index
    for module in ROUTERS:
        app.include_router(module.router)
    app.add_exception_handler(RequestError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    paths = {route.path for module in ROUTERS for route in module.router.routes}
    app.add_middleware(RequestGuard, options=options, metrics=service.metrics, paths=paths)
    return app


def from_environment() -> FastAPI:
    """The application of a worker process, whose options are in the environment."""
    return create_app(ServeOptions.from_environment())


async def _answer(request: Request, error: Any) -> Response:
    body = await request.body() if request.url.path == "/rerank" else b""
    return error_answer(error, interface_of(request.url.path, body))


async def _answer_http(request: Request, error: Any) -> Response:
    """What the router itself finds: no such path, another method."""
    path, method = request.url.path, request.method
    kinds: dict[int, RequestError] = {
        404: NotFoundError(f"There is nothing at {path[:80]!r}. The paths are listed at /docs."),
        405: NotAllowedError(f"{path[:80]!r} is not called with {method[:10]}. See /docs."),
    }
    found = kinds.get(error.status_code) or InvalidRequestError(str(error.detail)[:200])
    answer = error_answer(found, interface_of(path))
    answer.headers.update({key: value for key, value in (error.headers or {}).items() if key.lower() == "allow"})
    return answer
