"""`poly-encoders serve`: a model, and an index, behind the interfaces that clients speak."""

import gc
import ipaddress
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from poly_encoders.console import Device, clear_errors, console, errors
from poly_encoders.serving.serve_options import KEY_VARIABLE, ServeOptions

GRACE = 30  # seconds for what was begun, when the service ends


def serve(
    model: Annotated[str, typer.Argument(help="A saved model of any kind: a folder or a Hub id.")],
    index: Annotated[Path | None, typer.Option(help="An index of candidates, for /search and /candidates.")] = None,
    milvus: Annotated[str | None, typer.Option(help="Search the index in this Milvus: http://host:19530.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="What clients must send as a Bearer token.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model.")] = 1,
    max_documents: Annotated[int, typer.Option(min=1, help="Candidates of a request.")] = ServeOptions.max_documents,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Size of a request.")] = ServeOptions.max_body_bytes >> 20,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens encoded together.")
    ] = ServeOptions.max_batch_tokens,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = ServeOptions.max_waiting,
    cache_mib: Annotated[int, typer.Option(min=0, help="Memory for candidates' vectors.")] = ServeOptions.cache_bytes
    >> 20,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = ServeOptions.timeout,
    device: Device = None,
) -> None:
    """Serve a model over HTTP, as rerankers and embedders are: /rerank, /score, /v1/embeddings, /search, and a page."""
    with clear_errors(device):
        try:
            import uvicorn

            from poly_encoders.serving.app import create_app
        except ImportError as error:
            raise ValueError(f"Serving needs {error.name}: pip install 'poly-encoders[serve]'") from error
        options = ServeOptions(
            model,
            None if index is None else str(index),
            milvus,
            device,
            api_key,
            max_documents=max_documents,
            max_body_bytes=max_body_mib << 20,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            cache_bytes=cache_mib << 20,
            timeout=timeout,
        )
        if api_key is None and not _is_loopback(host):
            errors.print(f"[bold yellow]No API key:[/] whoever reaches {escape(host)} may use it. Set --api-key.")
        _log_lines()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound here, because the port may be any that is free, which has to be said.
        with socket.create_server((host, port), family=family, backlog=2048) as listening:
            # Else an answer's head and body wait 40 ms for each other: of a socket by its number nobody knows the kind.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            place = f"[{host}]" if ":" in host else host
            address = f"http://{place}:{listening.getsockname()[1]}"
            with console.status(f"Loading {escape(model)} ..."):
                app: Any = create_app(options)  # also where workers load their own: what is wrong is said here, once
            if workers > 1:
                app = "poly_encoders.serving.app:from_environment"
                gc.collect()  # the model that was tried
            console.print(f"[green]Serving[/] {escape(model)} at {address}  (its interfaces: {address}/docs)")
            with _worker_environment(options, workers):
                uvicorn.run(
                    app,
                    factory=workers > 1,
                    workers=workers,
                    fd=listening.fileno(),
                    access_log=False,
                    log_level="warning",
                    server_header=False,
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=GRACE,
                )


@contextmanager
def _worker_environment(options: ServeOptions, workers: int) -> Iterator[None]:
    """What worker processes find in their environment: the options, and where they count together."""
    if workers == 1:
        yield
        return
    threads = max(1, torch.get_num_threads() // workers)
    with tempfile.TemporaryDirectory(prefix="poly-encoders-metrics-") as metrics:
        os.environ |= {**options.environment(), "OMP_NUM_THREADS": str(threads), "PROMETHEUS_MULTIPROC_DIR": metrics}
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Line(logging.Formatter):
    """A record, whose message is JSON, as one line of JSON with time and level."""

    def format(self, record: logging.LogRecord) -> str:
        said = json.loads(record.getMessage())
        return json.dumps({"time": self.formatTime(record), "level": record.levelname.lower(), **said})


def _log_lines() -> None:
    """One line of JSON for each request, to stderr."""
    logger = logging.getLogger("poly_encoders.serving")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
