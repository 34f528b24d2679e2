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
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import set_seed

from poly_encoders.training.methods.pretraining import PreTrainer, PreTrainingArguments, PreTrainingModel
from poly_encoders.training.runs.argument_parsing import arguments_of_files, parse_dataclasses
from poly_encoders.training.runs.arguments import SourceArguments, StartArguments, option
from poly_encoders.training.runs.resuming import conclude, train_to_end
from poly_encoders.training.train import checkpoint_path


@dataclass
class PreTrainingModelArguments(StartArguments):
    """What to pre-train."""

    from_scratch: bool = option(False, "Random weights; the checkpoint gives configuration and tokenizer alone.")


class Options(NamedTuple):
    model: PreTrainingModelArguments
    data: SourceArguments
    training: PreTrainingArguments


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from `--config FILE.yaml ...` and the command line, as `train.parse_options`."""
    return make_options(arguments_of_files(argv), argv)


def make_options(mapping: dict[str, Any], argv: Sequence[str] | None = ()) -> Options:
    """Options from a mapping and then from the command line; a ValueError where one does not exist."""
    kinds = (PreTrainingModelArguments, SourceArguments, PreTrainingArguments)
    return Options(*parse_dataclasses(kinds, argv, mapping, str(__doc__)))


def build_trainer(options: Options) -> PreTrainer:
    """Model, data and trainer, ready to train."""
    model, data, training = options
    set_seed(training.seed)
    examples = data.train_source(training.seed).examples()
    path, from_scratch = checkpoint_path(model.model_name_or_path), model.from_scratch
    start = PreTrainingModel.from_checkpoint(path, from_scratch=from_scratch, **model.text_options())
    return PreTrainer(model=start, args=training, train_dataset=examples)


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train, save, and push where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    trainer = build_trainer(parse_options(argv))
    train_to_end(trainer)
    conclude(trainer)


if __name__ == "__main__":
    main()
