"""How well the encoders rank after training: the paper's comparisons, on ChitChat, as far as a machine's time goes.

    python benchmarks/quality.py                          # train what is missing, then print the tables
    python benchmarks/quality.py --runs bi-0 poly-64-0    # only these; several processes may share the work
    python benchmarks/quality.py --tables                 # from the runs there are

Every run trains on the same backbone with the same number of examples, the Cross-encoder with half of them, and ranks
the test split (20 candidates, seed 0). `--layers` keeps some layers of MiniLM, `--steps`, `--batch` and
`--context_length` say how much is trained; all of these stand in the results. A run's result is its rank of each test
context, so differences between runs are paired: their intervals are bootstrapped over the contexts. Writes
benchmarks/results/quality/*.json, and quality.json and quality.png from them.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.loading import load_model
from poly_encoders.training.data.chitchat import chitchat_ranking_sets
from poly_encoders.training.distill import ScoreOptions, write_scores
from poly_encoders.training.pretrain import build_trainer as build_pretrainer
from poly_encoders.training.pretrain import make_options as make_pretraining_options
from poly_encoders.training.train import build_trainer, make_options, packaged_minilm

RESULTS = Path(__file__).parent / "results"
RUNS = "quality"  # the folder in it with a file a run
DRAWS = 10_000  # of the bootstrap
TEACHER, PRETRAINED = "cross-0", "pretrained-0"
KINDS = ("first_m", "last_m", "first_and_last_m")

# What a run changes; its name ends with its seed.
CHANGES: dict[str, dict[str, Any]] = {
    "bi": {"architecture": "bi-encoder"},
    "poly-64": {},
    **{f"poly-{m}": {"num_codes": m} for m in (1, 16, 360)},
    **{f"poly-64-{kind}": {"context_vectors": kind} for kind in KINDS},
    "cross": {"architecture": "cross-encoder", "num_negatives": 3},
    "poly-64-distilled": {"distillation": "kl"},
    "poly-64-pretrained": {},
    "poly-64-longer": {},  # as many steps in all as pre-training and fine-tuning take
    "cross-pretrained": {"architecture": "cross-encoder", "num_negatives": 3},
    "cross-longer": {"architecture": "cross-encoder", "num_negatives": 3},
}
DEFAULT = [f"{name}-0" for name in CHANGES] + ["bi-1", "poly-64-1"]


def main() -> None:
    """Train and rank what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=DEFAULT, help="such as bi-0: a name and a seed (default: all)")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 5], help="of MiniLM's six (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--pretraining_steps", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--context_length", type=int, default=160, help="tokens (%(default)s)")
    parser.add_argument("--cross_sets", type=int, default=300, help="test contexts that a Cross-encoder ranks")
    parser.add_argument("--before", action="store_true", help="rank before training as well")
    parser.add_argument("--models", default="models/quality", help="folder to keep models in (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what comes out (%(default)s)")
    parser.add_argument("--limit", type=int, help="test contexts to rank, the first ones; all when left out")
    options = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    (options.results / RUNS).mkdir(parents=True, exist_ok=True)
    if not options.tables:
        for run in options.runs:
            if not (options.results / RUNS / f"{run}.json").exists():
                train_and_rank(run, options)
    report(options.results, Console())


def train_and_rank(run: str, options: argparse.Namespace) -> None:
    """Train one model, rank the test split with it, and write what came out."""
    name, _, seed = run.rpartition("-")
    folder = Path(options.models) / run
    steps = options.steps + options.pretraining_steps if name.endswith("-longer") else options.steps
    sets = chitchat_ranking_sets("test", size=20, seed=0)[: options.cross_sets if "cross" in name else options.limit]
    evaluator = CandidateRankingEvaluator(sets, batch_size=64, show_progress_bar=True)
    before = None
    start = time.perf_counter()
    chosen = make_options(settings(name, int(seed), steps, folder, options))
    if (folder / "training_args.json").is_file():
        model, seconds = load_model(str(folder)), None
    else:
        trainer: Any = build_trainer(chosen)
        if options.before:
            before = recall(rank(trainer.model, evaluator))
            start = time.perf_counter()
        trainer.train()
        trainer.save_model()
        model, seconds = trainer.model, time.perf_counter() - start
    ranks = rank(model, evaluator)
    found = {
        "run": run,
        "examples": chosen.training.max_steps * chosen.training.train_batch_size,
        "layers": options.layers,
        "steps": chosen.training.max_steps,
        "batch": chosen.training.train_batch_size,
        "context_length": options.context_length,
        "pretraining_steps": options.pretraining_steps if "pretrained" in name else 0,
        "before": before,
        "training_seconds": seconds,
        "machine": machine(),
        "ranks": ranks.tolist(),
    }
    (options.results / RUNS / f"{run}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print_run(run, ranks)


def rank(model: Any, evaluator: CandidateRankingEvaluator) -> np.ndarray:
    """Rank of the positive of each test context, `(contexts,)`."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bf16()), torch.inference_mode():
        return evaluator.ranks(model)


def settings(name: str, seed: int, steps: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run."""
    backbone = shallow_minilm(options.layers, Path(options.models) / "backbone")
    base: dict[str, Any] = {
        "model_name_or_path": backbone,
        "dataset": "chitchat",
        "eval_split": None,
        "max_train_examples": steps * options.batch,
        "max_context_length": options.context_length,
        "max_candidate_length": 32,
        "turn_separator": " [SEP] ",
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-4,
        "warmup_steps": steps // 10,
        "dropout": 0.0,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "seed": seed,
    }
    changes = dict(CHANGES[name])
    architecture = changes.get("architecture", "poly-encoder")
    if architecture != "cross-encoder":
        changes["reduction"] = "mean"
    else:
        # A step is of as many pairs as the others' contexts, or as pre-training's pairs; there are twice as many.
        batch = max(1, options.batch // (1 + changes["num_negatives"]))
        changes |= {"per_device_train_batch_size": batch, "max_steps": options.steps + steps, "learning_rate": 5e-5}
    if "distilled" in name:
        changes |= distilled_data(base, options)
    if "pretrained" in name:
        start = pretrained(backbone, options)
        changes["model_name_or_path"] = f"{start}/cross-encoder" if architecture == "cross-encoder" else start
    return {**base, **changes}


def distilled_data(base: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The training data with the Cross-encoder's scores, which are computed where they are missing."""
    teacher = Path(options.models) / TEACHER
    if not (teacher / "training_args.json").is_file():
        raise FileNotFoundError(f"There is no teacher yet; run {TEACHER} first.")
    scores = ScoreOptions(folder=str(Path(options.models) / "teacher-scores"), num_negatives=1)
    write_scores(str(teacher), scores, make_options(base))
    return {"dataset": scores.folder, "max_train_examples": None}


def pretrained(backbone: str, options: argparse.Namespace) -> str:
    """The backbone after pre-training on the same data, which is done where it is missing."""
    folder = Path(options.models) / PRETRAINED
    if not (folder / "training_args.json").is_file():
        trainer: Any = build_pretrainer(
            make_pretraining_options(
                {
                    "model_name_or_path": backbone,
                    "dataset": "chitchat",
                    "max_context_length": options.context_length,
                    "max_candidate_length": 32,
                    "turn_separator": " [SEP] ",
                    "output_dir": str(folder),
                    "max_steps": options.pretraining_steps,
                    "per_device_train_batch_size": options.batch,
                    "learning_rate": 1e-4,
                    "warmup_steps": options.pretraining_steps // 10,
                    "dropout": 0.0,
                    "save_strategy": "no",
                    "logging_steps": 10,
                    "report_to": "none",
                }
            )
        )
        trainer.train()
        trainer.save_model()
    return str(folder)


def shallow_minilm(layers: list[int], folder: Path) -> str:
    """MiniLM with some of its layers, as a plain checkpoint."""
    if not (folder / "model.safetensors").is_file():
        path = packaged_minilm()
        model = AutoModel.from_pretrained(path)
        model.encoder.layer = torch.nn.ModuleList([model.encoder.layer[number] for number in layers])
        model.config.num_hidden_layers = len(layers)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            model.save_pretrained(beside)
            AutoTokenizer.from_pretrained(path).save_pretrained(beside)
            if not folder.exists():
                Path(beside).rename(folder)
                Path(beside).mkdir()  # for the context manager to remove
    return str(folder)


def recall(ranks: np.ndarray, k: int = 1) -> float:
    """Points of R@k."""
    return 100.0 * float((ranks <= k).mean())


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Points of R@1 by which the first leads, and its 95 % bootstrap interval over the contexts both ranked.

    Args:
        first, second: Ranks, `(contexts,)` or `(seeds, contexts)`.
    """
    both = min(first.shape[-1], second.shape[-1])
    lead = 100.0 * ((first[..., :both] <= 1).astype(float) - (second[..., :both] <= 1))
    lead = lead.reshape(-1, both).mean(axis=0)  # of a context over the seeds: the contexts are the sample
    draw = np.random.default_rng(0)
    means = [lead[draw.integers(both, size=both)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(lead.mean()), float(low), float(high)


def print_run(run: str, ranks: np.ndarray) -> None:
    """One line."""
    Console().print(f"{run}: R@1/20 {recall(ranks):.2f}, MRR {100 * (1 / ranks).mean():.2f}, {len(ranks):,} contexts")


def report(results: Path, console: Console) -> None:
    """Print the tables of all runs there are, and write them."""
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / RUNS).glob("*.json"))}
    if not runs:
        return
    ranks = {name: np.array(found["ranks"]) for name, found in runs.items()}
    table = Table(title="ChitChat, 20 candidates")
    for heading in (
        "run",
        "examples",
        "contexts",
        "R@1/20",
        "R@5/20",
        "MRR",
        "over the Bi-encoder of the seed, R@1/20",
    ):
        table.add_column(heading, justify="right" if heading != "run" else "left")
    rows = []
    for name, found in runs.items():
        row = {key: value for key, value in found.items() if key not in ("ranks", "machine")}
        row |= {"contexts": len(ranks[name]), "recall@1": recall(ranks[name]), "recall@5": recall(ranks[name], 5)}
        row["mrr"] = 100 * float((1 / ranks[name]).mean())
        rival = f"bi-{name.rpartition('-')[2]}"
        shown = ""
        if rival in ranks and rival != name:
            lead, low, high = paired_interval(ranks[name], ranks[rival])
            row["lead"], row["interval"] = lead, [low, high]
            shown = f"{lead:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append(row)
        figures = (f"{row[key]:.2f}" for key in ("recall@1", "recall@5", "mrr"))
        table.add_row(name, f"{found['examples']:,}", f"{row['contexts']:,}", *figures, shown)
    console.print(table)
    summary = {"machine": next(iter(runs.values()))["machine"], "rows": rows, "pairs": pairs(ranks, console)}
    (results / "quality.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(rows, results / "quality.png")


def pairs(ranks: dict[str, np.ndarray], console: Console) -> list[dict[str, Any]]:
    """The comparisons that the encoders are for, pooled over seeds where there are several."""
    found = []
    for title, first, second in (
        ("Poly-encoder, m = 64, over Bi-encoder", "poly-64", "bi"),
        ("distilled over undistilled", "poly-64-distilled", "poly-64"),
        ("distilled over its teacher", "poly-64-distilled", "cross"),
        ("pre-trained over not", "poly-64-pretrained", "poly-64"),
        ("pre-trained over as many steps of fine-tuning", "poly-64-pretrained", "poly-64-longer"),
        ("Cross-encoder, pre-trained over not", "cross-pretrained", "cross"),
        ("Cross-encoder, pre-trained over as many steps of fine-tuning", "cross-pretrained", "cross-longer"),
    ):
        seeds = [seed for seed in "0123" if f"{first}-{seed}" in ranks and f"{second}-{seed}" in ranks]
        if not seeds:
            continue
        both = min(len(ranks[f"{name}-{seed}"]) for name in (first, second) for seed in seeds)
        left, right = ([ranks[f"{name}-{seed}"][:both] for seed in seeds] for name in (first, second))
        lead, low, high = paired_interval(np.stack(left), np.stack(right))
        console.print(f"{title}: {lead:+.2f} points of R@1/20, 95 % {low:+.2f} to {high:+.2f}, seeds: {len(seeds)}")
        found.append({"what": title, "lead": lead, "interval": [low, high], "seeds": len(seeds)})
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """R@1/20 of every run, with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    values = [row["recall@1"] for row in rows]
    errors = [100 * np.sqrt(v / 100 * (1 - v / 100) / row["contexts"]) for v, row in zip(values, rows, strict=True)]
    axes.errorbar(values, range(len(rows)), xerr=errors, fmt="o")
    axes.set_yticks(range(len(rows)), [row["run"] for row in rows])
    axes.set_xlabel("R@1/20, points, with its standard error")
    axes.grid(alpha=0.3)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
