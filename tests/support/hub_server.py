"""A stand-in for the Hugging Face Hub on this machine, driven by the real huggingface_hub client.

    with running_hub(tmp_path) as hub:
        run_python(code, hub=hub, token="hf_alice")        # a fresh process with an empty cache (hub_client.py)
        assert hub.files("acme/poly").keys() == {...}

It knows three tokens: `hf_alice` (user alice, of the organisation acme), `hf_alice_read` (the same, read-only) and
`hf_bob`. It does not speak Xet, multipart LFS, gated repositories or discussions, and its messages are not the Hub's
word for word: what it shows is that the client's side is right.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_routes import Answer, Routes
from hub_store import Refused, User

_CHUNK = 2**16
# Variables that would lead a client elsewhere.
_MISLEADING = ("HF_", "HUGGING", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind."""

    method: str
    part: str  # of the path with its query
    times: int | None  # None: until the faults are cleared
    status: int | None = None  # None: the connection breaks
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None  # bytes of the request that still arrive; None: all, and only the answer is lost


@dataclass(frozen=True)
class Entry:
    """A request that came, as the log keeps it; `status` is None where the connection was broken."""

    method: str
    path: str
    status: int | None
    user: str | None


class Dropped(Exception):  # noqa: N818
    """The connection is to break now."""


class Hub(Routes):
    """The running server, as tests see it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.log: list[Entry] = []
        self.faults: list[Fault] = []

    def add_user(self, name: str, token: str, organisations: tuple[str, ...] = (), may_write: bool = True) -> None:
        self.users[token] = User(name, organisations, may_write)

    def environment(self, token: str | None = "hf_alice", home: Path | None = None) -> dict[str, str]:
        """Environment of a process that takes this for the Hub; huggingface_hub reads it once, when it is imported.

        Args:
            token: What the process is logged in with; None for nobody.
            home: Folder of its cache; a new, empty one when left out.
        """
        if home is None:
            home = Path(tempfile.mkdtemp(prefix="home-", dir=self.root))
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_MISLEADING)}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # which this does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "TOKENIZERS_PARALLELISM": "false",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def fail_next(
        self,
        method: str,
        part: str,
        status: int = 503,
        *,
        times: int | None = 1,
        message: str = "Failure asked for by the test",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next `times` requests of this kind (all, if None) with an error."""
        self.faults.append(Fault(method, part, times, status, message, headers or {}))

    def drop_next(self, method: str, part: str, *, after: int | None = 0, times: int | None = 1) -> None:
        """Break the connection of the next requests of this kind after so many bytes of their bodies.

        With `after=None` the request is carried out, and only its answer is lost.
        """
        self.faults.append(Fault(method, part, times, after=after))

    def clear_faults(self) -> None:
        self.faults.clear()

    def requests(self, method: str, part: str = "") -> list[Entry]:
        """Those in the log of this method with this part in their path."""
        return [entry for entry in self.log if entry.method == method and part in entry.path]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.part in path and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection; reads requests, sends what the routes answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.user: User | None = None
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        try:
            answer = self._answer(url.path)
        except Dropped:
            self._break()
            return
        except Exception as error:  # a mistake of this server's must not look like a broken connection
            status = 400 if isinstance(error, (KeyError, ValueError)) else 500
            refused = error if isinstance(error, Refused) else Refused(status, f"The stand-in failed: {error!r}")
            line = " ".join(str(refused).split()).encode("ascii", "replace").decode()  # as a header wants it
            headers = {**refused.headers, "X-Error-Message": line, "Connection": "close"}
            answer = Answer({"error": str(refused)}, refused.status, headers)
            self.close_connection = True  # the request's body may not have been read
        self._note(answer.status)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client may leave when it knows enough
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self, path: str) -> Answer:
        fault = self.hub.take_fault(self.command, self.path)
        if fault is not None and fault.status is not None:
            refused = Refused(fault.status, fault.message)
            refused.headers |= fault.headers
            raise refused
        if fault is not None and fault.after is not None:
            self._read(fault.after)
            raise Dropped
        self.user = self.hub.user_of(self.headers.get("Authorization", "").removeprefix("Bearer "))
        answer = self.hub.answer(self, path)
        if fault is not None:
            raise Dropped
        return answer

    def _note(self, status: int | None) -> None:
        self.hub.log.append(Entry(self.command, self.path, status, self.user.name if self.user else None))

    def _break(self) -> None:
        """End the connection as a network that fails does: by a reset, without a word."""
        self._note(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def _send(self, answer: Answer) -> None:
        file = answer.content if isinstance(answer.content, Path) else None
        body = b"" if file or answer.content is None else json.dumps(answer.content).encode()
        size, status = file.stat().st_size if file else len(body), answer.status
        first, last = self._range(size) if file else (0, size - 1)
        headers: dict[str, Any] = {
            "Content-Type": "application/octet-stream" if file else "application/json",
            "Content-Length": last + 1 - first,
            **answer.headers,
        }
        if file and (first, last) != (0, size - 1):
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file is None:
            self.wfile.write(body)
            return
        with file.open("rb") as opened:
            opened.seek(first)
            if last == size - 1:
                shutil.copyfileobj(opened, self.wfile, _CHUNK)
            else:
                self.wfile.write(opened.read(last + 1 - first))

    def _range(self, size: int) -> tuple[int, int]:
        """First and last byte asked for: a download that is resumed begins where it broke off."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or int(match[1]) >= size:
            return 0, size - 1
        return int(match[1]), min(int(match[2] or size - 1), size - 1)

    def _read(self, most: int) -> None:
        for chunk in self.chunks():
            most -= len(chunk)
            if most <= 0:
                return

    def chunks(self) -> Iterator[bytes]:
        """The request's body, whether it announces its length or comes in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (chunk := self.rfile.read(min(left, _CHUNK))):
            left -= len(chunk)
            yield chunk

    def json(self) -> Any:
        return json.loads(b"".join(self.chunks()))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the hub's log has it."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # it was broken on purpose
            super().shutdown_request(request)


@contextlib.contextmanager
def running_hub(root: Path | str) -> Iterator[Hub]:
    """Serve an empty Hub, its files below `root`, while the block runs.

    The API is at 127.0.0.1, the storage of large files at localhost: to a client another host, as on the Hub.
    """
    hub = Hub(Path(root) / "hub")
    hub.add_user("alice", "hf_alice", ("acme",))
    hub.add_user("alice", "hf_alice_read", ("acme",), may_write=False)
    hub.add_user("bob", "hf_bob")
    server = _Server(("127.0.0.1", 0), type("HubHandler", (_Handler,), {"hub": hub}))
    hub.url, hub.storage_url = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
