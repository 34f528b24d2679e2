"""Around each request: its key, its size, its time, its number, and one line in the log, without texts or keys."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from poly_encoders.serving.request_errors import (
    InternalError,
    RequestError,
    TimedOutError,
    TooLargeError,
    TooSlowError,
    UnauthorizedError,
    error_answer,
    interface_of,
)
from poly_encoders.serving.serve_options import ServeOptions
from poly_encoders.serving.service_metrics import ServiceMetrics

logger = logging.getLogger("poly_encoders.serving")

OPEN = ("/health", "/ready", "/live", "/ping")  # what an orchestrator asks, without a key
# What a browser gets without a key, and which holds no data: its calls have one.
PAGES = ("/", "/page/page.js", "/page/page.css", "/page/style.css", "/docs", "/openapi.json")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


class RequestGuard:
    """ASGI middleware, around all routes of the application.

    Args:
        app: What it is around.
        options: Bounds and the key.
        metrics: Where requests are counted.
        paths: Those that the application has; others are counted together.
    """

    def __init__(self, app: Any, options: ServeOptions, metrics: ServiceMetrics, paths: set[str]):
        self.app, self.options, self._metrics, self._paths = app, options, metrics, paths
        self._key = None if options.api_key is None else options.api_key.strip().encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, sent, body = time.perf_counter(), [0], b""
        number = uuid.uuid4().hex[:12]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent[0] = message["status"]
                spent = round(1000 * (time.perf_counter() - began))
                own = ((b"x-request-id", number), (b"x-total-time", str(spent)))
                message["headers"] = [*message["headers"], *((name, value.encode()) for name, value in own)]
            await send(message)

        failure: RequestError | None = None
        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            await self._run(scope, body, receive, answer)
        except ClientGoneError:
            sent[0] = 499  # as nginx has it
        except RequestError as error:
            failure = error
        except Exception as error:
            # Neither to the client nor into the log goes the message: it may hold texts.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error(json.dumps({"request": number, "error": type(error).__name__, "where": where}))
            failure = InternalError("The service failed on this request. Its log says why, under x-request-id.")
        if failure is not None and not sent[0]:
            await error_answer(failure, interface_of(scope["path"], body))(scope, receive, answer)
        self._note(scope, number, sent[0], time.perf_counter() - began, len(body))

    def _check_key(self, scope: Message) -> None:
        if self._key is None or scope["path"] in OPEN or (scope["path"] in PAGES and scope["method"] == "GET"):
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise UnauthorizedError("This service needs its API key, as a header: 'Authorization: Bearer KEY'.")

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """All of it, within its bounds; a bound is passed before the rest is read."""
        most = self.options.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > most:
            raise TooLargeError(f"The body has {int(said):,} bytes; at most {most:,} are read. Send several requests.")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.options.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise TooLargeError(f"The body has more than {most:,} bytes. Send several requests.")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise TooSlowError(f"The request did not arrive within {self.options.timeout:g} s.") from None

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """The application, till it has answered, its time is over or the client is gone."""
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, client = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(gone())
        try:
            done, _ = await asyncio.wait(
                (work, client), timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                work.result()
            elif client in done:
                raise ClientGoneError
            else:
                raise TimedOutError(f"No answer within {self.options.timeout:g} s. Send less, or raise --timeout.")
        finally:
            for task in (work, client):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work

    def _note(self, scope: Message, number: str, status: int, seconds: float, size: int) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.observe_request(path, status, seconds)
        line = {"request": number, "method": scope["method"], "path": path, "status": status}
        logger.info(json.dumps(line | {"ms": round(1000 * seconds, 1), "bytes": size}))
