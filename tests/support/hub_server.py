"""A stand-in for the Hugging Face Hub on this machine, driven by the real huggingface_hub client.

    with running_hub(tmp_path) as hub:
        run_python(code, hub=hub, token="hf_alice")        # a process with an empty cache (hub_client.py)
        assert hub.files("acme/poly").keys() == {...}

It knows three tokens: `hf_alice` (user alice, of the organisation acme), `hf_alice_read` (the same, read-only) and
`hf_bob`. It does not speak Xet, multipart LFS, gated repositories or discussions, and its messages are not the Hub's
word for word: what it shows is that the client's side is right. What it does is in hub_routes.py.
"""

import contextlib
import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_routes import Answer, Refused, Routes, User

# Variables that would lead a client elsewhere.
_MISLEADING = ("HF_", "HUGGING", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind."""

    method: str
    part: str  # of the path with its query
    times: float
    status: int | None = None  # None: the connection breaks
    message: str = ""


@dataclass(frozen=True)
class Entry:
    """A request that came, as the log keeps it; `status` is None where the connection was broken."""

    method: str
    path: str
    status: int | None


class Hub(Routes):
    """The running server, as tests see it."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.log: list[Entry] = []
        self.faults: list[Fault] = []

    def environment(self, token: str | None = "hf_alice") -> dict[str, str]:
        """Environment of a process that takes this for the Hub, with an empty cache; `None` is nobody."""
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_MISLEADING)}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": tempfile.mkdtemp(prefix="home-", dir=self.root),
            "HF_HUB_DISABLE_XET": "1",  # which this does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "TOKENIZERS_PARALLELISM": "false",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def fail_next(self, method: str, part: str, status: int = 503, *, times: float = 1, message: str = "no") -> None:
        """Answer the next `times` requests of this kind with an error."""
        self.faults.append(Fault(method, part, times, status, message))

    def drop_next(self, method: str, part: str, *, times: float = 1) -> None:
        """Break the connection of the next requests of this kind."""
        self.faults.append(Fault(method, part, times))

    def requests(self, method: str, part: str = "") -> list[Entry]:
        """Those in the log of this method with this part in their path."""
        return [entry for entry in self.log if entry.method == method and part in entry.path]

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection; reads requests, sends what the routes answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        fault = self.hub.take_fault(self.command, self.path)
        if fault is not None and fault.status is None:
            self._break()
            return
        try:
            if fault is not None:
                raise Refused(fault.status or 500, fault.message)
            self.user = self.hub.user_of(self.headers.get("Authorization", "").removeprefix("Bearer "))
            answer = self.hub.answer(self, url.path)
        except Exception as error:  # a mistake of this server's must not look like a broken connection
            refused = error if isinstance(error, Refused) else Refused(500, f"The stand-in failed: {error!r}")
            line = " ".join(str(refused).split()).encode("ascii", "replace").decode()  # as a header wants it
            headers = {"X-Error-Code": refused.code, "X-Error-Message": line, "Connection": "close"}
            answer = Answer({"error": str(refused)}, refused.status, headers)
            self.close_connection = True  # the request's body may not have been read
        self.hub.log.append(Entry(self.command, self.path, answer.status))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client may leave when it knows enough
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _break(self) -> None:
        """End the connection as a network that fails does: by a reset, without a word."""
        self.hub.log.append(Entry(self.command, self.path, None))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.content, bytes)
        body = answer.content if raw else b"" if answer.content is None else json.dumps(answer.content).encode()
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json"}
        self.send_response(answer.status)
        for name, value in {**headers, "Content-Length": len(body), **answer.headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        """The request's body, whether it announces its length or comes in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def json(self) -> Any:
        return json.loads(self.body())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the hub's log has it."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # it was broken on purpose
            super().shutdown_request(request)


@contextlib.contextmanager
def running_hub(root: Path | str) -> Iterator[Hub]:
    """Serve an empty Hub, its clients' caches below `root`, while the block runs.

    The API is at 127.0.0.1, the storage of large files at localhost: to a client another host, as on the Hub.
    """
    (Path(root) / "hub").mkdir()
    hub = Hub(Path(root) / "hub")
    hub.users = {
        "hf_alice": User("alice", ("acme",)),
        "hf_alice_read": User("alice", ("acme",), may_write=False),
        "hf_bob": User("bob"),
    }
    server = _Server(("127.0.0.1", 0), type("HubHandler", (_Handler,), {"hub": hub}))
    hub.url, hub.storage_url = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
