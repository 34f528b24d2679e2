"""Mine hard negatives with a trained Poly-encoder or Bi-encoder.

    accelerate launch training/mine_negatives.py --model models/poly --dataset chitchat --output models/negatives
    accelerate launch training/train.py --dataset models/negatives --eval_dataset chitchat ...

What is written holds the context, the right candidate and `negative_1` ... `negative_n`, for `load_from_disk` and the
training script. Several processes share the work and need no common folder. `--help` lists the options.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from poly_encoders.loading import load_model
from poly_encoders.modeling import staged_folder
from poly_encoders.training.data_sources import load_examples, sample_examples
from poly_encoders.training.mining import MiningReport, check_miner, mine_negatives, process_state
from poly_encoders.training.negative_rules import MiningOptions
from poly_encoders.training.running import end_processes

logger = logging.getLogger(__name__)


@dataclass
class MiningArguments:
    """What to mine, and with which model."""

    model: str = field(metadata={"help": "A saved Poly-encoder or Bi-encoder: a folder or a Hub id."})
    output: str = field(metadata={"help": "Folder to write the data set to; it must not exist yet."})
    dataset: str = field(
        default="chitchat", metadata={"help": "'chitchat', a task of the paper, a file, a saved data set or a Hub id."}
    )
    split: str = field(default="train", metadata={"help": "Split to mine for."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with a task's files as published."})
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Context, right candidate, and further ones that join those to choose from; all when left out."
        },
    )
    max_examples: int | None = field(default=None, metadata={"help": "A seeded sample of so many rows."})
    num_negatives: int = field(default=5, metadata={"help": "Negatives for each row."})
    depth: int = field(default=100, metadata={"help": "Candidates looked at first; doubled until enough are found."})
    skip_top: int = field(default=0, metadata={"help": "Pass over so many of a context's best candidates."})
    margin: float = field(
        default=0.0, metadata={"help": "How far below the right candidate's score a negative must be; -inf for none."}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "The same as a share of the right candidate's score, such as 0.05."}
    )
    max_positive_similarity: float = field(
        default=0.9, metadata={"help": "Jaccard similarity of words from which on a candidate is a duplicate."}
    )
    sampling: Literal["top", "random"] = field(
        default="top", metadata={"help": "The best, or a random choice of those among the first `depth`."}
    )
    too_few: Literal["fill", "drop"] = field(
        default="fill", metadata={"help": "Fill rows that lack hard negatives with random ones, or drop them."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    batch_size: int = field(default=64, metadata={"help": "Texts encoded at once."})
    bf16: bool = field(default=False, metadata={"help": "Encode under bfloat16 autocast: faster, a little less exact."})
    jsonl: bool = field(default=False, metadata={"help": "Write OUTPUT.jsonl as well."})

    def options(self) -> MiningOptions:
        """What counts as a hard negative."""
        return MiningOptions(
            num_negatives=self.num_negatives,
            depth=self.depth,
            skip_top=self.skip_top,
            margin=self.margin,
            relative_margin=self.relative_margin,
            max_positive_similarity=self.max_positive_similarity,
            sampling=self.sampling,
            too_few=self.too_few,
            seed=self.seed,
        )


def main(argv: Sequence[str] | None = None) -> MiningReport:
    """Mine, write the data set, show what was found."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = HfArgumentParser(MiningArguments, description=__doc__, allow_abbrev=False)
    (arguments,) = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    options = arguments.options()
    output = Path(arguments.output)
    state = process_state()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already. Name another --output, or delete it first.")

    model = load_model(arguments.model, device=str(state.device))
    check_miner(model)
    with state.main_process_first():  # the others read what the first has put into the cache
        data = load_examples(
            arguments.dataset, arguments.split, arguments.columns, arguments.dataset_config, arguments.data_dir
        )
    data = sample_examples(data, arguments.max_examples, arguments.seed)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=arguments.bf16):
        result, report = mine_negatives(model, data, options, arguments.batch_size)
    if state.is_main_process:
        _write(result, output, arguments.jsonl)
        Console().print(_table(report, options, arguments.dataset))
        logger.info("Saved to %s", output)
    end_processes()
    return report


def _write(data: Dataset, output: Path, jsonl: bool) -> None:
    with staged_folder(output) as staging:
        data.save_to_disk(staging)
    if jsonl:
        beside = output.with_name(f".{output.name}.jsonl")
        data.to_json(beside, force_ascii=False)
        beside.replace(output.with_name(f"{output.name}.jsonl"))


def _table(report: MiningReport, options: MiningOptions, dataset: str) -> Table:
    table = Table(title=f"{options.num_negatives} hard negatives a row for {dataset}")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in (
        ("rows", f"{report.rows:,}"),
        ("rows dropped", f"{report.dropped_rows:,}"),
        ("mean score of the right candidate", f"{report.positive_score:.3f}"),
        ("mean score of the negatives", f"{report.negative_score:.3f}"),
        ("candidates left out as duplicates", f"{report.duplicates:,}"),
        ("candidates left out by the margin", f"{report.too_close:,}"),
        ("negatives filled at random", f"{report.filled:,}"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    main()
