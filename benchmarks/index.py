"""An index on disk: build, size, latency, recall and what is proven, against what one would take instead.

    python benchmarks/index.py                            # 10,000 to a million candidates, some 25 minutes
    python benchmarks/index.py --n 10000 100000           # some 8 minutes, 4 of them for encoding

Vectors are those of ChitChat's turns as a Poly-encoder encodes them; what goes beyond those that are encoded are
means of two. Contexts are its conversations, by one vector a turn and by 64 learnt codes that start apart. Rivals:
exact search with a Bi-encoder's single vector over the same memory map, and FAISS HNSW with it. Writes index.json and
index.png into benchmarks/results/, or the folder that --out names.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from measuring import interleaved, machine
from rich.console import Console
from rich.table import Table
from scoring import text_vectors
from torch import Tensor

from poly_encoders import PolyEncoder
from poly_encoders.index import CandidateIndex
from poly_encoders.index.graph import neighbours_of
from poly_encoders.saving import replace_file
from poly_encoders.training.data.chitchat import chitchat_examples
from poly_encoders.training.train import checkpoint_path

K = 10
RESULTS = Path(__file__).parent / "results"
BI_ROWS = 65536  # that the Bi-encoder's exact search reads at a time: a float32 copy of them stays small
EF = (32, 64, 128, 256)  # of HNSW, till its recall is .99


def milliseconds(search: Callable[[Any], Any], queries: Any, rounds: int) -> dict[str, float]:
    """Median and 95th percentile of a query, after a warm-up."""
    times = []
    for number in range(rounds + 1):
        for query in queries:
            start = time.perf_counter()
            search(query)
            times += [1000 * (time.perf_counter() - start)] if number else []
    return {"p50_ms": round(statistics.median(times), 2), "p95_ms": round(float(np.percentile(times, 95)), 2)}


def a_second(search: Callable[[Any], Any], queries: list[Any], clients: int) -> float:
    """Queries a second of so many threads."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(search, queries))
    return round(len(queries) / (time.perf_counter() - start), 1)


def bi_encoder_exact(vectors: np.ndarray, query: Tensor) -> Tensor:
    """The best by one vector over a memory map."""
    parts = [
        torch.from_numpy(np.array(vectors[start : start + BI_ROWS])).float() @ query
        for start in range(0, len(vectors), BI_ROWS)
    ]
    return torch.cat(parts).topk(K)


def hnsw(vectors: Tensor, queries: np.ndarray, rounds: int) -> dict[str, Any]:
    """FAISS HNSW with one vector a query, at the first setting that reaches a recall of .99."""
    import faiss  # after torch: before it, FAISS brings an OpenMP of its own, and each waits for the other's threads

    graph = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    start = time.perf_counter()
    graph.add(vectors.numpy())
    seconds = time.perf_counter() - start
    truth = (torch.from_numpy(queries) @ vectors.T).topk(K).indices.numpy()
    row: dict[str, Any] = {}
    for ef in EF:
        graph.hnsw.efSearch = ef
        found = graph.search(queries, K)[1]
        recall = float(np.mean([len({*a} & {*b}) / K for a, b in zip(found, truth, strict=True)]))
        times = milliseconds(lambda query: graph.search(query[None], K), queries, rounds)
        row = {
            "method": f"FAISS HNSW, one vector, ef {ef}",
            "recall": round(recall, 4),
            "build_s": round(seconds, 1),
            **times,
        }
        if recall >= 0.99:
            break
    return row


def measure(kind: str, index: CandidateIndex, contexts: Tensor, scale: float, rounds: int) -> list[dict[str, Any]]:
    """Rows of both engines, and of the Bi-encoder's exact search."""
    real = [context[(context != 0).any(dim=1)][None] for context in contexts]

    def search(engine: Any, **options: Any) -> Callable[[Tensor], Any]:
        return lambda context: index.search_vectors(context, K, scale=scale, engine=engine, **options)[0]

    search("ann")(real[0])  # makes the files
    view = index._view
    assert view is not None
    derived = view.derived
    truth = [{hit["id"] for hit in search("exact")(context)} for context in real]
    rows = [{"method": "exact", "recall": 1.0, **milliseconds(search("exact"), real, rounds)}]
    if derived is not None:
        for neighbours in (16, 32, 64, 128):
            one = search("ann", neighbours=neighbours)
            answers = [one(context) for context in real]
            hit = [len({hit["id"] for hit in found} & best) / K for found, best in zip(answers, truth, strict=True)]
            usual = neighbours == neighbours_of(int(statistics.median(context.shape[1] for context in real)), K, None)
            rows.append(
                {
                    "method": f"ann, {neighbours} neighbours" + " (default)" * usual,
                    "recall": round(statistics.mean(hit), 4),
                    "looked_at": round(statistics.mean(found.looked_at for found in answers), 5),
                    **milliseconds(one, real, rounds),
                }
            )
        vectors = derived.prepared.vectors
        queries = [context[0, 0] for context in real]
        bi = milliseconds(lambda query: bi_encoder_exact(vectors, query), queries, max(1, rounds // 2))
        rows.append({"method": "bi-encoder, exact, same memory map", **bi})
        for engine in ("exact", "ann"):
            each = {f"{clients}_clients_a_second": a_second(search(engine), real * 2, clients) for clients in (1, 4)}
            rows.append({"method": f"{engine}, clients", **each})
    return [{"vectors": kind, "n": len(index), **row} for row in rows]


def build_rate(checkpoint: str, number: int) -> dict[str, Any]:
    """Texts a second of building an index, and of encoding the same ones alone; they take turns."""
    model = PolyEncoder(checkpoint, max_candidate_length=32)
    texts = [*dict.fromkeys(example.response for example in chitchat_examples("train"))][:number]

    def build() -> None:
        with tempfile.TemporaryDirectory() as folder:
            CandidateIndex.build(model, texts, folder, show_progress_bar=False)

    times = interleaved({"encoder": lambda: model.encode_document(texts), "build": build}, 3)
    found = {f"{name}_a_second": round(1000 * number / statistics.median(each), 1) for name, each in times.items()}
    ratios = (alone / whole for alone, whole in zip(times["encoder"], times["build"], strict=True))
    return {"texts": number, **found, "build_over_encoder": round(statistics.median(ratios), 3)}


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One table."""
    table = Table(title=title)
    columns = (
        "method",
        "p50_ms",
        "p95_ms",
        "recall",
        "looked_at",
        "proven",
        "1_clients_a_second",
        "4_clients_a_second",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Median latency against n, one panel a kind of context vectors."""
    kinds = [*dict.fromkeys(row["vectors"] for row in rows)]
    figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), sharey=True, squeeze=False)
    lines = {
        "exact": "exact",
        "(default)": "ann, default",
        "bi-encoder": "Bi-encoder, exact",
        "HNSW": "FAISS HNSW, one vector",
    }
    for panel, kind in zip(panels[0], kinds, strict=True):
        for sign, label in lines.items():
            points = [
                (row["n"], row["p50_ms"])
                for row in rows
                if row["vectors"] == kind
                and "p50_ms" in row
                and (row["method"] == sign if sign == "exact" else sign in row["method"])
            ]
            if points:
                panel.loglog(*zip(*sorted(points), strict=True), marker=".", label=label)
        panel.set(title=kind, xlabel="candidates")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms for the best 10 with their texts, median")
    panels[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", default="minilm", help="a Poly-encoder, or what one is built on (%(default)s)")
    parser.add_argument("--encoded", type=int, default=20_000, help="most texts to encode (%(default)s)")
    parser.add_argument("--kept", type=Path, help="a file for the encoded texts' vectors, read where it is there")
    parser.add_argument("--rounds", type=int, default=3, help="over the 32 contexts")
    parser.add_argument("--hnsw_up_to", type=int, default=100_000, help="a graph of a million takes ten minutes")
    parser.add_argument("--built", type=int, default=4000, help="texts to build an index of, and to encode alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console, rows, builds = Console(width=150), [], []
    with torch.no_grad():
        kinds = [*text_vectors(checkpoint_path(options.model), max(options.n), options.encoded, options.kept)]
    vectors = kinds[0][1]
    for n in options.n:
        some = vectors[torch.randperm(len(vectors), generator=torch.manual_seed(n))[:n]]
        texts = [f"candidate number {number}, about as long as a reply is" for number in range(n)]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            index = CandidateIndex.from_vectors(some, None, texts, folder, show_progress_bar=False)
            stored = time.perf_counter()
            index.compact(timedelta(0))
            index.search_vectors(kinds[0][2][:1], K, scale=1.0, engine="ann")
            info, plain = index.info(), sum(map(len, texts)) + 2 * some.numel()
            builds.append(
                {
                    "n": n,
                    "rows_a_second_without_encoding": round(n / (stored - start)),
                    "files_s": round(time.perf_counter() - stored, 1),
                    "table_over_vectors_and_text": round(info["table_bytes"] / plain, 3),
                    "files_over_vectors_and_text": round(info["derived_bytes"] / plain, 3),
                }
            )
            console.print(builds[-1])
            for kind, _, contexts, scale in kinds:
                found = measure(kind, index, contexts, scale, options.rounds)
                if n <= options.hnsw_up_to:
                    found.append({"vectors": kind, "n": n, **hnsw(some, contexts[:, 0].numpy().copy(), options.rounds)})
                show(found, f"{n:,} candidates, {kind}", console)
                rows += found
        rate = build_rate(checkpoint_path(options.model), options.built)
        console.print(rate)
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        text = json.dumps(
            {"machine": machine(), "peak_mib": peak, "builds": builds, "from_texts": rate, "rows": rows}, indent=1
        )
        replace_file(options.out / "index.json", text + "\n")
        plot(rows, options.out / "index.png")


if __name__ == "__main__":
    main()
