"""Teacher, scores and student in a row: a Poly-encoder that learns from a Cross-encoder.

    accelerate launch training/distill.py --config training/configs/chitchat_distill.yaml
    accelerate launch training/distill.py --config my.yaml --teacher models/my-cross-encoder

The file has four parts. `data` holds options of train.py for both models, `teacher` and `student` those of each, and
`scores` says what the teacher scores. A teacher that is trained and scores that are there are taken as they are, and a
training that was stopped goes on where it was: give the same command once more.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from poly_encoders.loading import load_model
from poly_encoders.modeling import staged_folder
from poly_encoders.training.arguments import LAST
from poly_encoders.training.data_sources import load_examples, sample_examples
from poly_encoders.training.mining import process_state
from poly_encoders.training.running import STOPPED, Stopped, conclude, end_processes
from poly_encoders.training.teaching import add_teacher_scores
from poly_encoders.training.train import Options, make_options, run

logger = logging.getLogger(__name__)

NOTE = "teacher.json"  # in the folder of the scores: what made them
PARTS = ("data", "teacher", "scores", "student")


@dataclass
class ScoreOptions:
    """What the teacher scores."""

    folder: str  # of the scored data set
    num_negatives: int = 7  # wrong candidates of each row
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"scores: num_negatives must be at least 1, got {self.num_negatives}.")


@dataclass
class Plan:
    """The three steps."""

    teacher: Options
    scores: ScoreOptions
    student: Options


def read_plan(path: str) -> Plan:
    """Read the config file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a part or an option that is missing or does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    parts = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(parts, dict) or set(parts) != set(PARTS) or not all(isinstance(p, dict) for p in parts.values()):
        found = ", ".join(parts) if isinstance(parts, dict) else type(parts).__name__
        raise ValueError(f"{path} must have the parts {', '.join(PARTS)}, each with its options, but has {found}.")
    try:
        scores = ScoreOptions(**parts["scores"])
    except TypeError as error:
        known = ", ".join(ScoreOptions.__dataclass_fields__)
        raise ValueError(f"{path}: the part scores takes {known}, of which it needs folder ({error}).") from error
    resumed = {"resume_from_checkpoint": LAST}
    teacher = make_options({**parts["data"], **parts["teacher"], **resumed})
    kept = teacher.data.max_negatives
    # The student trains on what the teacher scored, whose columns are its own, and is evaluated as the teacher is.
    scored: dict[str, Any] = {
        "dataset": scores.folder,
        "train_split": "train",
        "columns": None,
        "max_train_examples": None,
    }
    scored |= {
        "eval_dataset": teacher.data.eval_dataset or teacher.data.dataset,
        "eval_columns": teacher.data.eval_columns or teacher.data.columns,
        "max_negatives": None if kept is None else max(kept, scores.num_negatives),
    }
    student = make_options({**parts["data"], **parts["student"], **resumed, **scored})
    if student.training.distillation is None:
        raise ValueError(f"{path}: the student has no distillation; give it 'kl' or 'margin_mse'.")
    return Plan(teacher, scores, student)


def train_teacher(options: Options) -> str:
    """Train the teacher unless it was; its folder."""
    folder = Path(options.training.output_dir)
    if (folder / "training_args.json").is_file():
        logger.info("The teacher in %s is trained already.", folder)
    else:
        run(options)
    return str(folder)


def write_scores(teacher: str, options: ScoreOptions, source: Options) -> None:
    """Score the training data with the teacher in a folder or on the Hub, unless that was done."""
    state, folder = process_state(), Path(options.folder)
    data, training = source.data, source.training
    chosen = ("dataset", "dataset_config", "train_split", "data_dir", "columns", "max_train_examples", "max_negatives")
    made = {"teacher": teacher, "num_negatives": options.num_negatives, "seed": options.seed}
    made |= {name: getattr(data, name) for name in chosen} | {"sample_seed": training.seed}
    if folder.is_dir() and any(folder.iterdir()):
        _check_made(folder, made)
        logger.info("The teacher's scores in %s are there already.", folder)
        return
    with state.main_process_first():
        examples = load_examples(
            data.dataset, data.train_split, data.columns, data.dataset_config, data.data_dir, data.max_negatives
        )
    examples = sample_examples(examples, data.max_train_examples, training.seed)
    model = load_model(teacher, device=str(state.device))
    with torch.autocast(state.device.type, torch.bfloat16, enabled=training.bf16):
        scored = add_teacher_scores(model, examples, options.num_negatives, options.seed, options.batch_size)
    if state.is_main_process:
        with staged_folder(folder) as staging:
            scored.save_to_disk(staging)
            Path(staging, NOTE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    state.wait_for_everyone()


def _check_made(folder: Path, made: dict[str, Any]) -> None:
    """See that the scores in a folder are those that are wanted.

    Raises:
        ValueError: another teacher's, or of other data.
    """
    note = folder / NOTE
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if different := sorted(name for name in made if found.get(name) != made[name]):
        was = {name: found.get(name) for name in different}
        wanted = {name: made[name] for name in different}
        raise ValueError(
            f"The scores in {folder} were made with {was}, but {wanted} is wanted. Name another folder, or delete it."
        )


def distill(plan: Plan, teacher: str | None = None) -> Any:
    """All steps that are not done yet; the student's trainer.

    Args:
        plan: What to do.
        teacher: A trained teacher, in place of the plan's.
    """
    teacher = train_teacher(plan.teacher) if teacher is None else teacher
    write_scores(teacher, plan.scores, plan.teacher)
    return run(plan.student)


def main(argv: Sequence[str] | None = None) -> None:
    """Distill, and push the student where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the four parts")
    parser.add_argument("--teacher", help="a trained model in place of the file's teacher: a folder or a Hub id")
    arguments = parser.parse_args(argv)
    plan = read_plan(arguments.config)
    try:
        trainer = distill(plan, arguments.teacher)
    except Stopped as stopped:
        logger.info("%s", stopped)
        end_processes()
        sys.exit(STOPPED)
    conclude(trainer)


if __name__ == "__main__":
    main()
