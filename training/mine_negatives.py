"""Mine hard negatives with a trained Poly-encoder or Bi-encoder.

    accelerate launch training/mine_negatives.py --model models/poly --dataset chitchat --output models/negatives
    accelerate launch training/train.py --dataset models/negatives --eval_dataset chitchat ...

What is written holds the context, the positive and `negative_1` ... `negative_n`, for `load_from_disk` and the training
script. Several processes share the work and need no common folder. `--help` lists the options.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from poly_encoders.loading import load_model
from poly_encoders.saving import staged_folder
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.methods.mining import MiningReport, check_miner, mine_negatives, process_state
from poly_encoders.training.methods.negative_rules import MiningOptions
from poly_encoders.training.runs.arguments import option
from poly_encoders.training.runs.resuming import end_processes

logger = logging.getLogger(__name__)


@dataclass
class MiningArguments:
    """What to mine, and with which model."""

    model: str = field(metadata={"help": "A saved Poly-encoder or Bi-encoder: a folder or a Hub id."})
    output: str = field(metadata={"help": "Folder to write the data set to; it must not exist yet."})
    dataset: str = option("chitchat", "'chitchat', a task of the paper, a file, a saved data set or a Hub id.")
    split: str = option("train", "Split to mine for.")
    dataset_config: str | None = option(None, "Configuration of the Hub data set.")
    data_dir: str | None = option(None, "Folder with a task's files as published.")
    columns: list[str] | None = option(None, "Context, positive, and others that join those to choose from; or all.")
    max_examples: int | None = option(None, "A seeded sample of so many rows.")
    batch_size: int = option(64, "Texts encoded at once.")
    bf16: bool = option(False, "Encode under bfloat16 autocast: faster, a little less exact.")
    jsonl: bool = option(False, "Write OUTPUT.jsonl as well.")


def main(argv: Sequence[str] | None = None) -> MiningReport:
    """Mine, write the data set, show what was found."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = HfArgumentParser((MiningArguments, MiningOptions), description=__doc__, allow_abbrev=False)
    own, options = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    output, state = Path(own.output), process_state()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already. Name another --output, or delete it first.")

    model = load_model(own.model, device=str(state.device))
    check_miner(model)
    source = DataSource(
        own.dataset, own.split, own.columns, own.dataset_config, own.data_dir, None, own.max_examples, options.seed
    )
    with state.main_process_first():  # the others read what the first has put into the cache
        data = source.examples()
    with torch.autocast(state.device.type, torch.bfloat16, enabled=own.bf16):
        result, report = mine_negatives(model, data, options, own.batch_size)
    if state.is_main_process:
        with staged_folder(output) as staging:
            result.save_to_disk(staging)
        if own.jsonl:
            beside = output.with_name(f".{output.name}.jsonl")
            result.to_json(beside, force_ascii=False)
            beside.replace(output.with_name(f"{output.name}.jsonl"))
        Console().print(_table(report, options, own.dataset))
        logger.info("Saved to %s", output)
    end_processes()
    return report


def _table(report: MiningReport, options: MiningOptions, dataset: str) -> Table:
    table = Table("", title=f"{options.num_negatives} hard negatives a row for {dataset}")
    table.add_column("value", justify="right")
    for name, value in (
        ("rows", f"{report.rows:,}"),
        ("rows dropped", f"{report.dropped_rows:,}"),
        ("mean score of the positives", f"{report.positive_score:.3f}"),
        ("mean score of the negatives", f"{report.negative_score:.3f}"),
        ("candidates left out as duplicates", f"{report.duplicates:,}"),
        ("candidates left out by the margin", f"{report.too_close:,}"),
        ("negatives filled at random", f"{report.filled:,}"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    main()
