"""How well the encoders rank, before and after training at equal examples, on several sets of conversations.

    python benchmarks/quality.py --train a/train.jsonl.gz --test a/test.jsonl.gz --train b.jsonl --test c.jsonl
    python benchmarks/quality.py --chitchat --rows bi-mean-cosine poly-turns --seeds 0 1 2
    python benchmarks/quality.py --chitchat --steps 0       # as they are, before any training
    python benchmarks/quality.py --tables                   # of the runs there are

A line of a training file is {"context": [turns], "response": text, "negative_1": text, ...}, with or without negatives;
of a test file {"context": [turns], "candidates": [texts], "label": 0}. A run is a row of a set's table with a seed. One
that is there is skipped, and several processes may share the work. All train on the same backbone with the same
examples, a Cross-encoder on half of them. A run's result is its rank of each test context, in float32; differences are
paired, their intervals bootstrapped over the contexts. Writes quality/*.json, quality.json and quality.png.
"""

import argparse
import contextlib
import fcntl
import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import late_interaction
import numpy as np
import torch
from measuring import machine
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.saving import replace_file, staged_folder
from poly_encoders.tasks import json_objects
from poly_encoders.training import train
from poly_encoders.training.data.chitchat import chitchat_ranking_sets

RESULTS = Path(__file__).parent / "results"
RUNS = "quality"  # the folder in it with a file a run
DRAWS = 10_000  # of the bootstrap
UNTRAINED = "untrained"  # in place of a seed
SETTINGS = ("backbone", "layers", "context_length", "steps", "batch")

BI: dict[str, Any] = {"architecture": "bi-encoder"}
LAST_TURN: dict[str, Any] = {"context_vectors": "turns", "num_codes": 1, "last_turn_share": 0.0}
CODES: dict[str, Any] = {"context_vectors": "learnt_codes"}
PAPERS: dict[str, Any] = {**CODES, "normalize": False}
FROZEN: dict[str, Any] = {"freeze_candidate_encoder": True, "share_encoders": None}

# What a row changes of the defaults. A Bi-encoder of the last turn is a Poly-encoder with that turn's vector alone.
ROWS: dict[str, dict[str, Any]] = {
    "bi-mean-dot": {**BI, "reduction": "mean", "similarity": "dot"},
    "bi-mean-cosine": {**BI, "reduction": "mean"},
    "bi-first-dot": {**BI, "reduction": "first", "similarity": "dot"},
    "bi-first-cosine": {**BI, "reduction": "first"},
    "bi-last-turn-dot": {**LAST_TURN, "normalize": False},
    "bi-last-turn-cosine": LAST_TURN,
    "poly-turns": {},
    "poly-turns-plain": {"last_turn_share": 0.0},
    "poly-turns-learnt-share": {"learn_last_turn_share": True},
    "poly-turns-codes": {"context_vectors": "turns_and_codes", "num_codes": 16},
    **{f"poly-codes-{m}": {**PAPERS, "num_codes": m} for m in (16, 64, 360)},
    "poly-codes-64-cosine": {**CODES, "num_codes": 64},
    "poly-codes-64-near": {**CODES, "num_codes": 64, "code_std": 0.05},
    **{f"poly-{kind}-m": {"context_vectors": f"{kind}_m", "normalize": True} for kind in ("first", "last")},
    "cross": {"architecture": "cross-encoder", "num_negatives": 3},
    "late-interaction": {},
    "bi-mean-cosine-frozen": {**BI, "reduction": "mean", **FROZEN},
    "bi-last-turn-frozen": {**LAST_TURN, **FROZEN},
    "poly-turns-frozen": FROZEN,
    "poly-turns-frozen-index": {**FROZEN, "num_index_negatives": 512},
}
# Rows that start as another; their seconds are shown over that one's.
STARTS_AS = {
    "poly-turns-learnt-share": "poly-turns",
    "bi-mean-cosine-frozen": "bi-mean-cosine",
    "bi-last-turn-frozen": "bi-last-turn-cosine",
    "poly-turns-frozen": "poly-turns",
    "poly-turns-frozen-index": "poly-turns",
}
RANDOM_START = ("poly-codes", "poly-turns-codes", "cross")  # how names of rows with new weights begin


class DataSet(NamedTuple):
    """What to train on, as `--dataset` of training takes it, and the ranking sets."""

    name: str
    train: str
    test: list[dict[str, Any]]


def main() -> None:
    """Train and rank what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, action="append", default=[], help="a .jsonl or .jsonl.gz file; may come several times")
    add("--test", type=Path, action="append", default=[], help="one for each --train")
    add("--name", action="append", default=[], help="one for each --train; its folder's when left out")
    add("--chitchat", action="store_true", help="ChitChat, from PyPI, as well")
    add("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    add("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    add("--steps", type=int, default=250, help="(%(default)s); 0: rank before training")
    add("--batch", type=int, default=32, help="(%(default)s)")
    add("--context_length", type=int, default=192, help="tokens (%(default)s)")
    add("--limit", type=int, help="test contexts to rank, the first ones; all when left out")
    add("--pair_limit", type=int, default=500, help="the same of cross and late-interaction (%(default)s)")
    add("--backbone", default="minilm", help="a SentenceTransformer (%(default)s, from PyPI)")
    add("--layers", type=int, nargs="*", default=[0, 3, 5], help="to keep of it (%(default)s); none named: all")
    add("--work", type=Path, default=Path("models/quality"), help="folder to work in (%(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder for what comes out (%(default)s)")
    add("--tables", action="store_true", help="run nothing")
    add("--over", choices=[*ROWS], metavar="ROW", help="print leads over this row, and run and write nothing")
    options = parser.parse_args()
    names = options.name or [file.absolute().parent.name for file in options.train]
    if len({len(options.train), len(options.test), len(names), len(set(names))}) > 1:
        parser.error("Each --train needs its --test, and its --name unless the folders have names of their own.")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not (options.tables or options.over):
        sets = [DataSet("chitchat", "chitchat", chitchat_ranking_sets("test"))] if options.chitchat else []
        for name, *files in zip(names, options.train, options.test, strict=True):
            first, second = (unzipped(file, options.work / "data" / name) for file in files)
            sets.append(DataSet(name, str(first), [sample for _, sample in json_objects(second)]))
        run_missing(sets, options)
    report(options.results, options.over)


def run_missing(sets: list[DataSet], options: argparse.Namespace) -> None:
    """Every run that is not there and that no other process is at; a ValueError for one with other settings."""
    wanted = {name: getattr(options, name) for name in SETTINGS}
    rows, seeds = options.rows, options.seeds
    if options.steps == 0:
        rows, seeds = dict.fromkeys(filter(None, map(start_of, rows))), [UNTRAINED]
    for seed, data, row in ((seed, data, row) for seed in seeds for data in sets for row in rows):
        run = f"{data.name}.{row}.{seed}"
        file = options.results / RUNS / f"{run}.json"
        with locked(options.work / f"{run}.lock", wait=False) as is_ours:
            if is_ours and not file.exists():
                found = {"set": data.name, "row": row, "seed": seed, "settings": wanted, "machine": machine()}
                replace_file(file, json.dumps(found | train_and_rank(data, row, seed, options)) + "\n")
            elif is_ours and (there := json.loads(file.read_text())["settings"]) != wanted:
                raise ValueError(f"{file} is of {there}, not {wanted}. Name other --results.")


def train_and_rank(data: DataSet, row: str, seed: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model, unless it is to stay as it is, and rank the test contexts with it."""
    is_late = row == "late-interaction"
    limit = options.pair_limit if is_late or row == "cross" else options.limit
    evaluator = CandidateRankingEvaluator(data.test[:limit], batch_size=64)
    building: Any = late_interaction if is_late else train
    chosen = train.make_options(recipe(data, row, 0 if seed == UNTRAINED else seed, options))
    found = {}
    if seed == UNTRAINED:
        model = building.build_model(chosen.model)
    else:
        started = time.perf_counter()
        trainer = building.build_trainer(chosen)
        model, ready = trainer.model, time.perf_counter()
        trainer.train()
        if trainer.state.global_step < chosen.training.max_steps:
            raise SystemExit(f"{data.name}, {row}, {seed}: stopped at step {trainer.state.global_step}")
        found = {"seconds_before": ready - started, "seconds": time.perf_counter() - ready}
        found["steps"] = chosen.training.max_steps
        found["examples"] = chosen.training.max_steps * chosen.training.train_batch_size
        found["log"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    with torch.inference_mode():
        ranks = evaluator.ranks(model)
    Console().print(f"{data.name}, {row}, {seed}: R@1 {recall(ranks):.2f}, {len(ranks):,} contexts")
    return {**found, "ranks": ranks.tolist()}


def recipe(data: DataSet, row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run."""
    steps, changes = max(1, options.steps), dict(ROWS[row])
    if row == "cross":  # a step is of as many pairs as the others' contexts, and there are twice as many
        batch = max(1, options.batch // (1 + changes["num_negatives"]))
        changes |= {"per_device_train_batch_size": batch, "max_steps": 2 * steps, "learning_rate": 5e-5}
    if row.startswith("bi-last-turn"):
        changes["max_turn_length"] = options.context_length  # the last turn is one vector, however long
    return {
        "model_name_or_path": backbone(options),
        "share_encoders": True,
        "dataset": data.train,
        "eval_split": None,
        "max_train_examples": steps * options.batch,
        "max_context_length": options.context_length,
        "max_candidate_length": 32,
        "turn_separator": " [SEP] ",
        "output_dir": str(options.work / f"{data.name}.{row}.{seed}"),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-4,
        "warmup_steps": steps // 10,
        "dropout": 0.0,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "seed": seed,
        **changes,
    }


def backbone(options: argparse.Namespace) -> str:
    """The checkpoint with the layers that were asked for."""
    path = train.checkpoint_path(options.backbone)
    if not options.layers:
        return path
    folder = options.work / "-".join([Path(options.backbone).name, *map(str, options.layers)])
    with locked(options.work / "backbone.lock"):
        if not folder.exists():
            model = SentenceTransformer(path, device="cpu")
            inner: Any = model[0].model
            inner.encoder.layer = torch.nn.ModuleList([inner.encoder.layer[number] for number in options.layers])
            inner.config.num_hidden_layers = len(options.layers)
            with staged_folder(folder) as staging:
                model.save(staging)
    return str(folder)


def unzipped(file: Path, folder: Path) -> Path:
    """The file, or what a zipped one holds, which is put there."""
    target = folder / file.stem
    if file.suffix != ".gz":
        return file
    if not target.exists() or target.stat().st_mtime < file.stat().st_mtime:
        replace_file(target, gzip.decompress(file.read_bytes()))
    return target


@contextlib.contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Whether a lock was to be had, at once or after waiting; it is held till the block or the process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        except BlockingIOError:
            is_held = False
        yield is_held


def start_of(row: str) -> str | None:
    """The row that ranks before training as this one does; none where chance has a say."""
    return None if row.startswith(RANDOM_START) else STARTS_AS.get(row, row)


# --- figures ---------------------------------------------------------------------------------------------------------


def recall(ranks: np.ndarray) -> float:
    """Points of R@1."""
    return 100.0 * float((ranks <= 1).mean())


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Points of R@1 by which the first leads, and its 95 % bootstrap interval over the contexts both ranked.

    Args:
        first, second: Ranks, `(seeds, contexts)`, of any number of seeds each.
    """
    both = min(first.shape[1], second.shape[1])
    # Of a context over the seeds: the contexts are the sample.
    lead = 100.0 * ((first[:, :both] <= 1).mean(axis=0) - (second[:, :both] <= 1).mean(axis=0))
    draw = np.random.default_rng(0)
    means = [lead[draw.integers(both, size=both)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(lead.mean()), float(low), float(high)


def best_bi_encoder(ranks: dict[str, np.ndarray], is_frozen: bool = False) -> str | None:
    """The Bi-encoder of highest R@1 over all seeds: of those whose candidates stay, or of the others."""
    rows = [row for row in ranks if row.startswith("bi-") and ("-frozen" in row) == is_frozen]
    return max(rows, key=lambda row: recall(ranks[row]), default=None)


def summarized(runs: list[dict[str, Any]], over: str | None = None) -> dict[str, dict[str, Any]]:
    """By row, what runs of one set come to, and the lead over a row, or the Bi-encoder that is best there."""
    by_row = {row: those for row in ROWS if (those := [run for run in runs if run["row"] == row])}
    shared = {row: min(len(run["ranks"]) for run in those) for row, those in by_row.items()}
    ranks = {row: np.array([run["ranks"][: shared[row]] for run in those]) for row, those in by_row.items()}
    found: dict[str, dict[str, Any]] = {}
    for row, own in ranks.items():
        found[row] = {
            "recall@1": recall(own),
            "mrr": 100 * float((1 / own).mean()),
            "seeds": len(own),
            "contexts": own.shape[1],
        }
        if "seconds" in (first := by_row[row][0]):
            found[row] |= {"examples": first["examples"], "settings": first["settings"]}
            found[row]["step_seconds"] = min(run["seconds"] / run["steps"] for run in by_row[row])  # undisturbed
        rival = over or best_bi_encoder(ranks, "-frozen" in row)
        if rival in ranks:
            lead, *interval = paired_interval(own, ranks[rival])
            found[row] |= {"lead": lead, "interval": interval, "over": rival}
    return found


def report(results: Path, over: str | None = None) -> None:
    """Print the tables of all runs there are, and write them unless they are over a row of choice."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / RUNS).glob("*.json"))]
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["set"] for run in runs):
        own = [run for run in runs if run["set"] == name]
        untrained, trained = ([run for run in own if (run["seed"] == UNTRAINED) == kind] for kind in (True, False))
        sets[name] = {"untrained": summarized(untrained, over), "trained": summarized(trained, over)}
        Console(width=150).print(table_of(name, over or "the best Bi-encoder", **sets[name]))
    if sets and not over:
        summary = {"machine": runs[0]["machine"], "sets": sets}
        replace_file(results / "quality.json", json.dumps(summary, indent=1) + "\n")
        plot(sets, results / "quality.png")


def table_of(name: str, over: str, untrained: dict[str, Any], trained: dict[str, Any]) -> Table:
    """A set's; rows with frozen candidates lead over the best Bi-encoder of their kind."""
    table = Table("row", title=f"{name}: R@1, and the lead in it over {over}, points")
    for heading in ("untrained", "lead", "trained", "MRR", "lead", "contexts, seeds", "examples", "s / step"):
        table.add_column(heading, justify="right")
    for row in ROWS:
        before, after = untrained.get(start_of(row)), trained.get(row)
        if not after and not (before and start_of(row) == row):
            continue
        cells = [f"{before['recall@1']:.2f}", lead_of(start_of(row), before)] if before else ["", ""]
        if after:
            cells += [f"{after['recall@1']:.2f}", f"{after['mrr']:.2f}", lead_of(row, after)]
            cells += [f"{after['contexts']:,}, {after['seeds']}", f"{after['examples']:,}"]
            full = trained.get(STARTS_AS.get(row))
            beside = f" ({after['step_seconds'] / full['step_seconds']:.2f} x)" if full else ""
            cells.append(f"{after['step_seconds']:.2f}{beside}")
        table.add_row(row, *cells)
    return table


def lead_of(row: str, found: dict[str, Any]) -> str:
    """The lead with its interval, where there is a Bi-encoder and it is another."""
    if found.get("over") in (None, row):
        return "best" if "over" in found else ""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(found["lead"], *found["interval"])


def plot(sets: dict[str, Any], path: Path) -> None:
    """R@1 of every row with its standard error, hollow before training; one drawing a set."""
    from matplotlib.figure import Figure

    rows = [row for row in ROWS if any(row in kind for kinds in sets.values() for kind in kinds.values())]
    figure = Figure(figsize=(2 + 4 * len(sets), 0.3 * len(rows) + 1.2), layout="constrained")
    drawings = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, (name, kinds) in zip(drawings, sets.items(), strict=True):
        for row, (kind, face) in ((row, kind) for row in rows for kind in (("untrained", "none"), ("trained", "C0"))):
            if found := kinds[kind].get(row):
                value = found["recall@1"]
                error = np.sqrt(value * (100 - value) / found["contexts"])
                axes.errorbar(value, rows.index(row), xerr=error, fmt="o", color="C0", markerfacecolor=face)
        axes.set(title=name, xlabel="R@1, points; hollow: before training")
        axes.grid(alpha=0.3)
    drawings[0].set_yticks(range(len(rows)), rows)
    drawings[0].invert_yaxis()  # shared
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
