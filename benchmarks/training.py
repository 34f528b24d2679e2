"""Training steps: throughput against sentence-transformers' defaults, memory of cached gradients, where the time goes.

    python benchmarks/training.py                      # some twenty minutes on two cores
    python benchmarks/training.py --only throughput    # or memory, profile, steps, scores

Writes benchmarks/results/training.json, of which the parts that were not measured stay.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import interleaved, machine, peak_memory, summary
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging as transformers_logging

from poly_encoders import BiEncoder, PolyEncoder, poly_score
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.scoring import score
from poly_encoders.training.data.chitchat import chitchat_ranking_sets, load_chitchat
from poly_encoders.training.data.collators import row_lengths
from poly_encoders.training.data.sampling import LengthSortedBatchSampler
from poly_encoders.training.methods.losses import InBatchNegativesLoss
from poly_encoders.training.runs.preparing import freeze_word_embeddings, set_dropout
from poly_encoders.training.runs.trainers import CHARACTERS_PER_TOKEN
from poly_encoders.training.train import packaged_minilm

BATCH, ROUNDS = 64, 6
LENGTHS = {"max_context_length": 128, "max_candidate_length": 32}
MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "training.json"


def main() -> None:
    """Measure, print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"throughput": throughput, "memory": memory, "profile": step_profile, "steps": steps, "scores": scores}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="what to measure")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    RESULTS.parent.mkdir(exist_ok=True)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        found[name] = parts[name](console)
        RESULTS.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n", encoding="utf-8")


class Training:
    """Whole steps over real dialogue, texts to updated weights, one a call.

    Args:
        model: A two-sided encoder; sentence-transformers' own is one whose sides are alike.
        loss: Of it.
        bf16: Under bfloat16 autocast.
        is_sorted: Batches of about one length, as our trainers make them.
        batch: Examples in a step.
    """

    def __init__(self, model: Any, loss: Any, *, bf16: bool, is_sorted: bool, batch: int = BATCH) -> None:
        self.model, self.loss, self.bf16 = model.train(), loss, bf16
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=5e-5, fused=True)  # both libraries' default
        self.batches = self._batches(batch, is_sorted)

    @staticmethod
    def _batches(batch: int, is_sorted: bool) -> Iterator[tuple[list[Any], list[str]]]:
        data: Dataset = load_chitchat("train").shuffle(seed=0).select(range(64 * batch))
        lengths = row_lengths(data, [CHARACTERS_PER_TOKEN * tokens for tokens in LENGTHS.values()])
        order = LengthSortedBatchSampler(data, lengths if is_sorted else [0] * len(data), batch, True)
        for rows in itertools.cycle(order):
            yield data[rows]["context"], data[rows]["response"]

    def __call__(self) -> None:
        contexts, responses = next(self.batches)
        if isinstance(self.model, (BiEncoder, PolyEncoder)):
            sides: list[Any] = [("query", contexts), ("document", responses)]
            features = [{**self.model.preprocess(texts, task=task), "task": task} for task, texts in sides]
        else:
            features = [self.model.preprocess(["\n".join(turns) for turns in contexts])]
            features += [self.model.preprocess(responses)]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(features, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _ours(kind: type, batch: int = BATCH, dropout: float | None = None, **options: Any) -> Training:
    """As our trainers train by default."""
    model = kind(packaged_minilm(), **LENGTHS)
    freeze_word_embeddings(model)
    if dropout is not None:
        set_dropout(model, dropout)
    loss = InBatchNegativesLoss(model, **options)
    return Training(model, loss, bf16=has_fast_bf16(), is_sorted=True, batch=batch)


def throughput(console: Console) -> list[dict[str, Any]]:
    """Examples a second, beside sentence-transformers' defaults on the same backbone, batch and length of contexts."""
    rival = SentenceTransformer(packaged_minilm(), device="cpu")
    rival.max_seq_length = LENGTHS["max_context_length"]
    methods: dict[str, Callable[[], None]] = {
        "sentence-transformers, float32": Training(
            rival, MultipleNegativesRankingLoss(rival), bf16=False, is_sorted=False
        ),
        "Bi-encoder": _ours(BiEncoder),
        "Poly-encoder, m = 64": _ours(PolyEncoder),
        "Bi-encoder, no dropout": _ours(BiEncoder, dropout=0.0),
        "Poly-encoder, m = 64, no dropout": _ours(PolyEncoder, dropout=0.0),
    }
    times = interleaved(methods, ROUNDS)
    base, *_ = times.values()
    table = Table(title=f"Training MiniLM, batch of {BATCH}, contexts of {LENGTHS['max_context_length']} tokens")
    for heading in ("", "step, median", "quartiles", "examples a second", "over sentence-transformers"):
        table.add_column(heading)
    rows = []
    for name, each in times.items():
        # Each step against the rival's beside it: what the machine does to both drops out.
        ratio = summary([one / other for one, other in zip(base, each, strict=True)])
        row = {"method": name, **summary(each), "ratio": ratio["median_ms"]}
        row["ratio_quartiles"] = [ratio["low_ms"], ratio["high_ms"]]
        rows.append(row)
        rate = f"{1000 * BATCH / row['median_ms']:.1f}"
        quartiles = f"{row['low_ms']:.0f} to {row['high_ms']:.0f}"
        table.add_row(name, f"{row['median_ms']:.0f} ms", quartiles, rate, f"{row['ratio']:.2f} x")
    console.print(table)
    return rows


def memory(console: Console) -> dict[str, Any]:
    """Memory of a step beyond the model and the optimizer, cached at batch 512 and plain at 32."""
    rows = []
    for title, batch, options in (
        ("plain, batch 32", 32, {}),
        ("cached, batch 512, mini-batches of 32", 512, {"mini_batch_size": 32}),
        ("cached, batch 512, mini-batches of 16", 512, {"mini_batch_size": 16}),
    ):
        step = _ours(PolyEncoder, batch, **options)
        step()
        step.optimizer.zero_grad()
        weights = sum(parameter.nbytes for parameter in step.model.parameters())
        peaks = [peak for _ in track(range(2), description=title) if (peak := peak_memory(step)) is not None]
        rows.append({"method": title, "mib": max(peaks, default=None), "weights_mib": round(weights / MIB)})
        del step
    plain, *cached = [row["mib"] for row in rows]
    for row, peak in zip(rows[1:], cached, strict=True):
        row["ratio"] = None if plain is None else round(peak / plain, 3)
    table = Table(title="Peak memory of a step of the Poly-encoder, m = 64, beside the model and the optimizer")
    for heading in ("", "at most", "over plain, batch 32"):
        table.add_column(heading)
    for row in rows:
        shown = "" if row.get("ratio") is None else f"{row['ratio']:.2f} x"
        table.add_row(row["method"], "unknown" if row["mib"] is None else f"{row['mib']:.0f} MiB", shown)
    console.print(table)
    return {"rows": rows}


def step_profile(console: Console) -> list[dict[str, Any]]:
    """What a step of the Poly-encoder spends its time on."""
    step = _ours(PolyEncoder)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step()
    kinds = {
        "matrix products": ("mm", "linear", "matmul"),
        "attention": ("scaled_dot_product",),
        "scores": ("poly_encoders::",),
        "dropout": ("dropout", "bernoulli"),
        "activations and norms": ("gelu", "layer_norm"),
        "optimizer and clipping": ("adam", "foreach", "_norm", "Optimizer"),
        "embeddings": ("embedding", "index"),
    }
    totals = dict.fromkeys([*kinds, "all else"], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, marks in kinds.items() if any(mark in event.key for mark in marks)), "all else")
        totals[kind] += event.self_cpu_time_total
    whole = sum(totals.values())
    table = Table(title="One training step of the Poly-encoder, m = 64: where the time goes")
    table.add_column("")
    table.add_column("share", justify="right")
    rows = [{"kind": kind, "share": round(spent / whole, 3)} for kind, spent in totals.items()]
    for row in sorted(rows, key=lambda row: -row["share"]):
        table.add_row(row["kind"], f"{100 * row['share']:.1f} %")
    console.print(table)
    return rows


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
