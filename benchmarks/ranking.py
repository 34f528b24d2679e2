"""How long one context against 1,000 candidates takes, for the three encoders on one backbone in one process.

    python benchmarks/ranking.py

The Bi- and the Poly-encoder score vectors computed ahead; the Cross-encoder has nothing to compute ahead. The weights
do not matter for the time, so the models are not trained. Writes benchmarks/results/ranking.json.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.training.data.chitchat import chitchat_ranking_sets
from poly_encoders.training.train import packaged_minilm

CANDIDATES = 1000
REPEATS = {
    "Bi-encoder": 30,
    "Poly-encoder, m = 16": 30,
    "Poly-encoder, m = 64": 30,
    "Poly-encoder, m = 360": 30,
    "Cross-encoder": 2,
}
LENGTHS = {"max_context_length": 128, "max_candidate_length": 32}
RESULTS = Path(__file__).parent / "results" / "ranking.json"


def main() -> None:
    """Measure, print a table and write the results."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sets = chitchat_ranking_sets("test", limit=200)
    texts = list(dict.fromkeys(text for ranked in sets for text in ranked["candidates"]))[:CANDIDATES]
    contexts = [ranked["context"] for ranked in sets[: max(REPEATS.values()) + 1]]
    path = packaged_minilm()
    rows = {}
    for name, repeats in REPEATS.items():
        if name == "Cross-encoder":
            ask = _cross(CrossEncoder(path, **LENGTHS), texts)
        elif name == "Bi-encoder":
            ask = _two_sided(BiEncoder(path, **LENGTHS), texts)
        else:
            ask = _two_sided(PolyEncoder(path, num_codes=int(name.rsplit(" ", 1)[1]), **LENGTHS), texts)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            rows[name] = _times(ask, contexts[: repeats + 1], name)
    _report(rows)


def _two_sided(model: BiEncoder | PolyEncoder, texts: list[str]) -> Callable[[object], tuple[float, float]]:
    vectors = model.encode_document(texts, convert_to_tensor=True, show_progress_bar=False)

    def ask(context: object) -> tuple[float, float]:
        start = time.perf_counter()
        encoded = model.encode_query([context], convert_to_tensor=True, show_progress_bar=False)
        middle = time.perf_counter()
        model.similarity(encoded, vectors).topk(10)
        return middle - start, time.perf_counter() - middle

    return ask


def _cross(model: CrossEncoder, texts: list[str]) -> Callable[[object], tuple[float, float]]:
    def ask(context: object) -> tuple[float, float]:
        start = time.perf_counter()
        model.rank(context, texts, top_k=10, batch_size=64, show_progress_bar=False)
        return 0.0, time.perf_counter() - start

    return ask


def _times(ask: Callable[[object], tuple[float, float]], contexts: list[object], name: str) -> dict[str, list[float]]:
    """Milliseconds of each call after one to warm up."""
    found = [ask(context) for context in track(contexts, description=name)][1:]
    return {
        "encode_ms": [1000 * encode for encode, _ in found],
        "score_ms": [1000 * score for _, score in found],
        "total_ms": [1000 * (encode + score) for encode, score in found],
    }


def _report(rows: dict[str, dict[str, list[float]]]) -> None:
    base = statistics.median(rows["Bi-encoder"]["total_ms"])
    table = Table(title=f"One context against {CANDIDATES:,} candidates, medians (quartiles)")
    for heading in ("", "encode the context", "score", "in all", "over the Bi-encoder"):
        table.add_column(heading, justify="right" if heading else "left")
    summary = {}
    for name, times in rows.items():
        medians = {key: statistics.median(values) for key, values in times.items()}
        low, _, high = statistics.quantiles(times["total_ms"], n=4)
        summary[name] = {**medians, "quartiles_ms": [low, high], "ratio": medians["total_ms"] / base}
        table.add_row(
            name,
            f"{medians['encode_ms']:.1f} ms",
            f"{medians['score_ms']:.1f} ms",
            f"{medians['total_ms']:.1f} ms ({low:.1f} to {high:.1f})",
            f"{summary[name]['ratio']:.2f} x",
        )
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
