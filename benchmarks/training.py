"""What the Poly-encoder adds to a Bi-encoder's training step, and what memory its in-batch scores take.

    python benchmarks/training.py  # some six minutes on two cores

Writes benchmarks/results/training.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import interleaved, machine, peak_memory, summary
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from poly_encoders import BiEncoder, PolyEncoder, poly_score
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.scoring import score
from poly_encoders.training.chitchat import chitchat_ranking_sets
from poly_encoders.training.losses import InBatchNegativesLoss
from poly_encoders.training.train import packaged_minilm

BATCH, ROUNDS = 64, 10
LENGTHS = {"max_context_length": 128, "max_candidate_length": 32}
MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "training.json"


def main() -> None:
    """Measure, print tables and write the results."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    found = {"machine": machine(), "step": steps(console), "scores": scores(console)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def steps(console: Console) -> list[dict[str, Any]]:
    """Whole training steps on real dialogue: forward, loss, backward, AdamW."""
    sets = chitchat_ranking_sets("test", limit=BATCH)
    contexts = [ranked["context"] for ranked in sets]
    responses = [ranked["candidates"][ranked["label"]] for ranked in sets]
    path = packaged_minilm()
    models = {
        "Bi-encoder": BiEncoder(path, **LENGTHS),
        "Poly-encoder, m = 64": PolyEncoder(path, num_codes=64, **LENGTHS),
    }
    times = interleaved({name: _step(model, contexts, responses) for name, model in models.items()}, ROUNDS)
    rows = [{"method": name, **summary(each)} for name, each in times.items()]
    # Each step against the one beside it: what the machine does to both drops out.
    ratios = [poly / bi for bi, poly in zip(*times.values(), strict=True)]
    ratio = summary(ratios)["median_ms"]
    table = Table(title=f"One training step, MiniLM, batch of {BATCH}")
    for heading in ("", "median", "quartiles"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["method"], f"{row['median_ms']:.0f} ms", f"{row['low_ms']:.0f} to {row['high_ms']:.0f}")
    console.print(table, f"Poly-encoder over Bi-encoder, median of {ROUNDS} pairs: {ratio:.3f} x")
    return [*rows, {"method": "ratio", "median": ratio}]


def _step(model: BiEncoder | PolyEncoder, contexts: list[Any], responses: list[str]) -> Callable[[], None]:
    model.train()
    loss = InBatchNegativesLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    features = [
        {**model.preprocess(contexts, task="query"), "task": "query"},
        {**model.preprocess(responses, task="document"), "task": "document"},
    ]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            loss([dict(side) for side in features], None).backward()
        optimizer.step()

    return step


def scores(console: Console) -> list[dict[str, Any]]:
    """In-batch scores forward and backward: memory against what the vectors, the scores and their gradients take."""
    rows = []
    for batch, m, dim, methods in (
        (4096, 64, 768, {"ours": score}),
        (512, 64, 768, {"ours": score, "plain": poly_score}),
    ):
        context = torch.randn(batch, m, dim, requires_grad=True)
        candidates = torch.randn(batch, dim, requires_grad=True)
        needed = 4 * (2 * context.numel() + 2 * candidates.numel() + 2 * batch * batch) / MIB
        held = 4 * (context.numel() + candidates.numel()) / MIB
        for name, method in methods.items():
            peak = peak_memory(_train(method, context, candidates))
            times = interleaved({name: _train(method, context, candidates)}, 2)[name]
            row = {"batch": batch, "m": m, "dim": dim, "method": name, **summary(times), "needed_mib": round(needed)}
            rows.append({**row, "ratio": None if peak is None else round((held + peak) / needed, 3)})
    table = Table(title="In-batch scores, forward and backward")
    for heading in ("batch", "", "median", "vectors, scores and gradients", "held at most, over that"):
        table.add_column(heading)
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
        table.add_row(
            f"{row['batch']:,}", row["method"], f"{row['median_ms']:,.0f} ms", f"{row['needed_mib']:,} MiB", ratio
        )
    console.print(table)
    return rows


def _train(method: Callable[[Tensor, Tensor], Tensor], context: Tensor, candidates: Tensor) -> Callable[[], Any]:
    """Gradients by an outer gradient of 1, without a loss, whose own memory is not meant."""

    def run() -> Any:
        found = method(context, candidates)
        return torch.autograd.grad(found, (context, candidates), torch.ones_like(found))

    return run


if __name__ == "__main__":
    main()
