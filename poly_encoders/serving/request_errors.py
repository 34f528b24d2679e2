"""What can be wrong with a request, and how each interface says so."""

import math
from typing import Any, Literal

from starlette.responses import JSONResponse

# Whose clients call: text-embeddings-inference; Cohere's and Jina's; OpenAI's, vLLM's and ours.
Interface = Literal["tei", "cohere", "openai"]


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The answer's, unless the interface has another for it.
        kind: A word for programs.
    """

    status, kind = 500, "internal_error"

    def headers(self) -> dict[str, str]:
        return {}


class InternalError(RequestError):
    """The model or the index failed; the log says why."""


class InvalidRequestError(RequestError):
    """Something in it is not as it must be."""

    status, kind = 400, "invalid_request_error"


class NotFoundError(RequestError):
    """Nothing is at this path, or of this id."""

    status, kind = 404, "not_found_error"


class NotAllowedError(RequestError):
    """The path is called otherwise."""

    status, kind = 405, "invalid_request_error"


class UnauthorizedError(RequestError):
    """No key, or another than the service's."""

    status, kind = 401, "authentication_error"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class TooLargeError(RequestError):
    """More than the service takes at once."""

    status, kind = 413, "request_too_large"


class TooSlowError(RequestError):
    """It took longer to arrive than it may."""

    status, kind = 408, "timeout"


class TimedOutError(RequestError):
    """It could not be answered in time."""

    status, kind = 504, "timeout"


class UnavailableError(RequestError):
    """The service begins or ends."""

    status, kind = 503, "unavailable"


class OverloadedError(RequestError):
    """The queue is full."""

    status, kind = 429, "overloaded"

    def __init__(self, waiting: int, seconds: float) -> None:
        self.retry_after = math.ceil(seconds)
        super().__init__(f"{waiting} requests are waiting already. Try again in {self.retry_after} s.")

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


_TEI_TYPES = {429: "Overloaded", 500: "Backend", 504: "Backend", 503: "Unhealthy"}


def error_answer(error: RequestError, interface: Interface) -> JSONResponse:
    """An error in the form of the interface that was called."""
    status, text = error.status, str(error)
    body: dict[str, Any]
    if interface == "tei":
        status = 422 if status == 400 else status
        body = {"error": text, "error_type": _TEI_TYPES.get(status, "Validation")}
    elif interface == "cohere":
        body = {"message": text, "detail": text}  # Cohere's clients read one, Jina's the other
    else:
        body = {"error": {"message": text, "type": error.kind, "param": None, "code": status}}
    return JSONResponse(body, status, error.headers())


_COHERE = ("/v1/rerank", "/v2/rerank")
_TEI = ("/", "/similarity", "/embed", "/info", "/health")


def interface_of(path: str, body: bytes = b"") -> Interface:
    """Whose form an answer at this path has; at /rerank the body tells, as far as it can be read."""
    if path in _COHERE:
        return "cohere"
    if path in _TEI or (path == "/rerank" and b'"documents"' not in body):
        return "tei"
    return "openai"
