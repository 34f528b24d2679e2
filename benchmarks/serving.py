"""A service under load, against a plain route that calls `rank` for each request, and a Cross-encoder behind it.

    python benchmarks/serving.py                     # some 15 minutes on two cores
    python benchmarks/serving.py --soak 600          # and 64 clients for ten minutes

Each service is a process of its own on loopback. Clients, threads of this process, each send their next request when
the last is answered (closed loop): one context and 20, 100 or 1,000 candidates, which are new in every request or the
same in all. The rivals take turns, so that all see the same weather. Writes serving.json and serving.png into
benchmarks/results/, or the folder that --out names.
"""

import argparse
import http.client
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measuring import machine
from rich.console import Console
from rich.table import Table

from poly_encoders import CrossEncoder, PolyEncoder
from poly_encoders.saving import replace_file
from poly_encoders.training.data.chitchat import chitchat_examples
from poly_encoders.training.train import checkpoint_path

RESULTS = Path(__file__).parent / "results"
OURS, PLAIN, CROSS = "poly-encoders serve", "plain route, Poly-encoder", "plain route, Cross-encoder"
NAMES = {"ours": OURS, "poly": PLAIN, "cross": CROSS}
LEAST = 6  # requests of each client, at least


def plain_app(path: str, kind: str) -> Any:
    """What one would write in ten lines: FastAPI, and `rank` for each request, in its threads."""
    import sentence_transformers
    from fastapi import FastAPI

    model: Any = PolyEncoder(path) if kind == "poly" else sentence_transformers.CrossEncoder(path)
    app = FastAPI()

    @app.get("/health")
    def health() -> None:
        return

    @app.post("/rerank")
    def rerank(body: dict[str, Any]) -> Any:
        turns = body["query"]
        ranking = model.rank(turns if kind == "poly" else "\n".join(turns), body["texts"])
        return [{"index": int(row["corpus_id"]), "score": float(row["score"])} for row in ranking]

    return app


@contextmanager
def running(kind: str, path: str) -> Iterator[tuple[int, int]]:
    """Port and process id of a service, till the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--plain", kind, path, str(port)]
    if kind == "ours":
        command = [sys.executable, "-m", "poly_encoders", "serve", path, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            try:
                if ask(connection(port), "GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise RuntimeError(f"{' '.join(command)} does not answer.")
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def connection(port: int) -> http.client.HTTPConnection:
    """One to loopback."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=600)


def ask(to: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    to.request(method, path, body, {"Content-Type": "application/json"})
    answer = to.getresponse()
    return answer.status, answer.read()


class Requests:
    """Bodies of requests: a context, and candidates that are new in each or the same in all."""

    def __init__(self, candidates: int, repeated: bool, conversations: list[Any], replies: list[str]) -> None:
        self._conversations, self._replies = conversations, replies
        self._choose, self._number, self._lock = random.Random(candidates), candidates, threading.Lock()
        self._same = self._choose.sample(replies, candidates) if repeated else None
        self._count = 0

    def next(self) -> bytes:
        with self._lock:
            self._count += 1
            texts = self._same or [f"{text} {self._count}" for text in self._choose.sample(self._replies, self._number)]
            context = self._choose.choice(self._conversations)
        return json.dumps({"query": context, "texts": texts}).encode()


def load(port: int, requests: Requests, clients: int, seconds: float) -> dict[str, Any]:
    """Latencies and rate of so many clients, each for so long, and of 6 requests at least."""
    times: list[float] = []
    statuses: dict[int, int] = {}
    lock, begin = threading.Lock(), threading.Barrier(clients + 1)
    least = max(1, LEAST // clients)

    def client() -> None:
        to = connection(port)
        begin.wait()
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or count < least:
            body = requests.next()
            start = time.perf_counter()
            status, _ = ask(to, "POST", "/rerank", body)
            elapsed = time.perf_counter() - start
            count += 1
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                if status == 200:
                    times.append(1000 * elapsed)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    if not times:
        raise RuntimeError(f"No answer was a good one: {statuses}.")
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return {
        "p50_ms": round(cuts[49], 2),
        "p95_ms": round(cuts[94], 2),
        "p99_ms": round(cuts[98], 2),
        "requests_a_second": round(len(times) / spent, 2),
        "statuses": statuses,
    }


def memory(pid: int) -> float:
    """MiB that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024, 1)


def soak(port: int, pid: int, requests: Requests, clients: int, seconds: float) -> dict[str, Any]:
    """Many clients for long: latencies, errors, and memory minute by minute."""
    held, over = [memory(pid)], threading.Event()

    def watch() -> None:
        while not over.wait(min(60.0, seconds / 10)):
            held.append(memory(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = load(port, requests, clients, seconds)
    over.set()
    watcher.join()
    return {"clients": clients, "seconds": seconds, **found, "memory_mib": held}


def context_alone(path: str, conversations: list[Any]) -> float:
    """Median of encoding a context, in this process."""
    model, times = PolyEncoder(path), []
    for context in conversations * 3:
        start = time.perf_counter()
        model.encode_query([context])
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[len(conversations) :]), 2)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table."""
    table = Table(title="One context and its candidates a request")
    columns = (
        "service",
        "candidates",
        "kind",
        "clients",
        "p50_ms",
        "p95_ms",
        "p99_ms",
        "requests_a_second",
        "memory_mib",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("service", "kind") else "right")
    for row in rows:
        table.add_row(*(f"{row[column]:,}" if isinstance(row[column], int) else str(row[column]) for column in columns))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Requests a second against clients, one panel for new and one for repeated candidates."""
    kinds, sizes = ("new", "repeated"), sorted({row["candidates"] for row in rows})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    styles = dict(zip(sizes, ("-", "--", ":"), strict=False))
    for panel, kind in zip(panels, kinds, strict=True):
        for color, service in zip(("C0", "C1", "C2"), (OURS, PLAIN, CROSS), strict=True):
            for size in sizes:
                points = [
                    (row["clients"], row["requests_a_second"])
                    for row in rows
                    if (row["service"], row["kind"], row["candidates"]) == (service, kind, size)
                ]
                if points:
                    label = f"{service}, {size}"
                    panel.loglog(*zip(*sorted(points), strict=True), styles[size], color=color, marker=".", label=label)
        panel.set(title=f"{kind} candidates", xlabel="clients", xticks=[1, 8, 64], xticklabels=["1", "8", "64"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("requests a second")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Load each service, print, write."""
    if sys.argv[1:2] == ["--plain"]:
        import uvicorn

        _, _, kind, path, port = sys.argv
        uvicorn.run(plain_app(path, kind), host="127.0.0.1", port=int(port), log_level="error")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="what all are built on (%(default)s)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--services", nargs="+", choices=NAMES, default=list(NAMES), help="whom to load (all)")
    parser.add_argument("--seconds", type=float, default=8, help="each load")
    parser.add_argument("--soak", type=float, default=0, help="seconds of 64 clients at the end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console, rows = Console(width=150), []
    conversations = [example.context for example in chitchat_examples("test")[:: 6773 // 32]][:32]
    replies = [*dict.fromkeys(example.response for example in chitchat_examples("train"))][:20_000]
    with tempfile.TemporaryDirectory() as folder:
        paths = {"ours": f"{folder}/poly", "poly": f"{folder}/poly", "cross": f"{folder}/cross"}
        PolyEncoder(checkpoint_path(options.model)).save(paths["ours"])
        CrossEncoder(checkpoint_path(options.model)).save(paths["cross"])
        alone = context_alone(paths["ours"], conversations)
        console.print(f"A context alone: {alone} ms")
        with ExitStack() as stack:
            services = {NAMES[kind]: stack.enter_context(running(kind, paths[kind])) for kind in options.services}
            loads = itertools.product(options.candidates, ("new", "repeated"), options.clients, services)
            for size, kind, clients, service in loads:
                if service == CROSS and (size > 100 or clients > 8):
                    continue  # minutes a request
                if kind == "new" and size * clients > 10_000:
                    continue  # a quarter of an hour
                port, pid = services[service]
                requests = Requests(size, kind == "repeated", conversations, replies)
                ask(connection(port), "POST", "/rerank", requests.next())  # warms up
                row = {"service": service, "candidates": size, "kind": kind, "clients": clients}
                rows.append({**row, **load(port, requests, clients, options.seconds), "memory_mib": memory(pid)})
                console.print(rows[-1])
        result = {"machine": machine(), "context_alone_ms": alone, "rows": rows}
        if options.soak:
            with running("ours", paths["ours"]) as (port, pid):
                mixed = Requests(20, False, conversations, replies)
                one = load(port, mixed, 1, options.seconds)
                result["soak"] = {"one_client": one, **soak(port, pid, mixed, max(options.clients), options.soak)}
                console.print(result["soak"])
    show(rows, console)
    replace_file(options.out / "serving.json", json.dumps(result, indent=1) + "\n")
    plot(rows, options.out / "serving.png")


if __name__ == "__main__":
    main()
