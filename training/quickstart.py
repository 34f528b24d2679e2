"""The quick start: train on real conversations from PyPI, measure before and after, rank replies.

    python -m poly_encoders.training.quickstart              a Bi- and a Poly-encoder, minutes on two CPU cores
    python -m poly_encoders.training.quickstart --compare    all three encoders on the same examples, with their times

Nothing is loaded from a hub.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.training.data.chitchat import chitchat_ranking_sets
from poly_encoders.training.runs.arguments import Architecture
from poly_encoders.training.runs.resuming import Stopped, train_to_end
from poly_encoders.training.train import Options, build_trainer, parse_options

CONFIG = Path(__file__).parent / "configs" / "chitchat_quickstart.yaml"
NAMES: dict[str, str] = {"bi-encoder": "Bi-encoder", "poly-encoder": "Poly-encoder", "cross-encoder": "Cross-encoder"}
SHOWN = ("recall@1", "recall@5", "mrr")
# A Cross-encoder reads every pair: with more of these it would take most of an hour on two cores.
CROSS_ENCODER_OPTIONS = ["--num_negatives", "1", "--max_context_length", "64"]
CROSS_ENCODER_SETS = 200

DIALOGUE = ["Hi! How was your weekend?", "Great, we went hiking in the mountains. Do you like being outdoors?"]
REPLIES = [
    "Yes, I go camping with my brother every summer.",
    "I had the pasta, it was a bit too salty.",
    "No, I have never seen that movie.",
    "She is studying to become a nurse.",
    "My computer broke down yesterday.",
]

console = Console()


@dataclass
class Result:
    """What one encoder reached, and what it cost."""

    architecture: Architecture
    before: dict[str, float]
    after: dict[str, float]
    training_seconds: float
    examples: int
    rank_1000_milliseconds: float  # one context against 1,000 candidates; vectors cached where the encoder can
    precision: str
    sets: int  # that were ranked


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the quick start, with `--compare` the Cross-encoder too; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="train and time all three encoders")
    parser.add_argument("--output", default="models", help="folder to save the models to (default: %(default)s)")
    parser.add_argument("--sets", type=int, default=1000, help="test contexts to rank, a seeded sample (%(default)s)")
    own, overrides = parser.parse_known_args(argv)
    keep_quiet()

    results = []
    for architecture in list(NAMES)[: 3 if own.compare else 2]:
        folder = Path(own.output) / f"quickstart-{architecture}"
        fixed = ["--config", str(CONFIG), "--architecture", architecture, "--output_dir", str(folder)]
        extra = CROSS_ENCODER_OPTIONS if architecture == "cross-encoder" else []
        options = parse_options([*fixed, *extra, *overrides])
        results.append(_run(options, own.sets))
    _print_quality(results)
    if own.compare:
        _print_costs(results)
        file = Path(own.output) / "comparison.json"
        file.write_text(json.dumps([vars(result) for result in results], indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {file}.")
    return results


def keep_quiet() -> None:
    """Let nothing but the quick start itself speak, in all of this process."""
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("sentence_transformers", "poly_encoders"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()


def _run(options: Options, limit: int) -> Result:
    architecture, training = options.model.architecture, options.training
    console.rule(f"[bold]{NAMES[architecture]}")
    trainer: Any = build_trainer(options)
    model = trainer.model
    sets = chitchat_ranking_sets("test", size=20, seed=0, limit=limit)
    sets = sets[:CROSS_ENCODER_SETS] if architecture == "cross-encoder" else sets
    evaluator = CandidateRankingEvaluator(sets, at_k=(1, 5), batch_size=64, dataset="chitchat", split="test")
    precision = "bfloat16" if training.bf16 else "float32"
    examples = training.max_steps * training.train_batch_size

    console.print(f"Ranking 20 replies for each of {len(sets):,} test contexts, before training ({precision}) ...")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=training.bf16):
        before = evaluator(model)
    console.print(f"Training on {examples:,} examples, {training.max_steps} steps ...")
    start = time.perf_counter()
    try:
        train_to_end(trainer)
    except Stopped:
        console.print(f"Stopped, and saved to {training.output_dir}. Go on with --resume_from_checkpoint.")
        raise
    seconds = time.perf_counter() - start
    console.print(f"Saved to {training.output_dir}. Ranking again, after training ...")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=training.bf16):
        after = evaluator(model)
        milliseconds = _time_ranking(model, sets)
    model.save_pretrained(training.output_dir)  # again, for the figures in its card
    for entry in model.rank(DIALOGUE, REPLIES, return_documents=True):
        console.print(f"  {entry['score']:8.2f}  {entry['text']}", highlight=False)
    return Result(architecture, before, after, seconds, examples, milliseconds, precision, len(sets))


def _time_ranking(model: Any, sets: list[dict[str, Any]], repeats: int = 5) -> float:
    """Median milliseconds to score 1,000 candidates for one context."""
    texts = list(dict.fromkeys(text for ranked in sets for text in ranked["candidates"]))[:1000]
    quiet: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    vectors = model.encode_document(texts, **quiet) if hasattr(model, "encode_document") else None
    times = []
    for ranked in sets[: repeats if vectors is not None else 1]:
        start = time.perf_counter()
        if vectors is not None:
            model.similarity(model.encode_query([ranked["context"]], **quiet), vectors).topk(10)
        else:
            model.rank(ranked["context"], texts, top_k=10, batch_size=64, show_progress_bar=False)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _print_quality(results: list[Result]) -> None:
    rows = []
    for result in results:
        both = zip(*([measured[key] for key in SHOWN] for measured in (result.before, result.after)), strict=True)
        name = NAMES[result.architecture] + (f", {result.sets:,}" if result.sets != results[0].sets else "")
        rows.append([name, *(f"{number:.3f}" for pair in both for number in pair)])
    headings = ["", *(f"{name} {when}" for name in ("R@1/20", "R@5/20", "MRR") for when in ("before", "after"))]
    trained = f"each trained on the same {results[0].examples:,} examples"
    _print_table(f"ChitChat, 20 candidates, {results[0].sets:,} test contexts, {trained}", headings, rows)


def _print_costs(results: list[Result]) -> None:
    rows = [
        [
            NAMES[result.architecture],
            f"{result.training_seconds / 60:.1f} min",
            f"{result.rank_1000_milliseconds:.0f} ms",
        ]
        for result in results
    ]
    _print_table("What they cost", ["", "training", "1,000 candidates"], rows)


def _print_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    table = Table()  # its own title would be broken to its width
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows:
        table.add_row(*row)
    console.print(f"[italic]{title}[/]", highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
