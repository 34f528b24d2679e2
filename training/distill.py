"""Teacher, scores and student in a row: a Poly-encoder that learns from a Cross-encoder.

    accelerate launch training/distill.py --config training/configs/chitchat_distill.yaml
    accelerate launch training/distill.py --config my.yaml --teacher models/my-cross-encoder

The file has four parts. `data` holds options of train.py for both models, `teacher` and `student` those of each, and
`scores` says what the teacher scores. A teacher that is trained and its scores of the same data are taken as they are,
and a training that was stopped goes on where it was: give the same command once more.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset

from poly_encoders.loading import load_model
from poly_encoders.modeling.text_poly_encoder import checked_count
from poly_encoders.saving import staged_folder
from poly_encoders.training.methods.fingerprints import hashed, weights_fingerprint
from poly_encoders.training.methods.mining import process_state
from poly_encoders.training.methods.teaching import add_teacher_scores
from poly_encoders.training.runs.arguments import LAST
from poly_encoders.training.runs.resuming import conclude
from poly_encoders.training.train import Options, make_options, run

logger = logging.getLogger(__name__)

NOTE = "teacher.json"  # in the folder of the scores: what made them
PARTS = ("data", "teacher", "scores", "student")


@dataclass
class ScoreOptions:
    """What the teacher scores."""

    folder: str  # of the scored data set
    num_negatives: int = 7  # of each row
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        checked_count(self.num_negatives, "scores: num_negatives")


class Plan(NamedTuple):
    teacher: Options
    scores: ScoreOptions
    student: Options


def read_plan(path: str) -> Plan:
    """Read the config file; a ValueError says which part or option is missing or does not exist."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    parts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(parts, dict) or set(parts) != set(PARTS) or not all(isinstance(p, dict) for p in parts.values()):
        raise ValueError(f"{path} must have the parts {', '.join(PARTS)}, each with its options.")
    try:
        scores = ScoreOptions(**parts["scores"])
    except TypeError as error:
        raise ValueError(f"{path}: scores takes {', '.join(ScoreOptions.__dataclass_fields__)} ({error}).") from error
    teacher = make_options({**parts["data"], **parts["teacher"], "resume_from_checkpoint": LAST})
    # The student trains on what the teacher scored, whose columns are its own, and is evaluated as the teacher is.
    changed: dict[str, Any] = {"dataset": scores.folder, "train_split": "train", "columns": None, "eval_split": None}
    changed |= {"max_train_examples": None, "resume_from_checkpoint": LAST}
    if (kept := teacher.data.max_negatives) is not None:
        changed["max_negatives"] = max(kept, scores.num_negatives)
    if (source := teacher.data.eval_source(teacher.training.seed)) is not None:
        changed |= {"eval_dataset": source.name, "eval_split": source.split, "eval_columns": source.columns}
    student = make_options({**parts["data"], **parts["student"], **changed})
    if student.training.distillation is None:
        raise ValueError(f"{path}: the student has no distillation; give it 'kl' or 'margin_mse'.")
    return Plan(teacher, scores, student)


def write_scores(teacher: str, options: ScoreOptions, source: Options) -> None:
    """Score the training data with the teacher in a folder or on the Hub, unless that was done.

    A ValueError says that the folder holds scores of other data, or by a teacher of other weights.
    """
    state, folder, is_folder = process_state(), Path(options.folder), Path(teacher).is_dir()
    with state.main_process_first():
        examples = source.data.train_source(source.training.seed).examples()
    model = None if is_folder else load_model(teacher, device=str(state.device))
    made: dict[str, Any] = {"num_negatives": options.num_negatives, "seed": options.seed}
    made |= {"teacher": teacher_fingerprint(teacher if is_folder else model), "data": data_fingerprint(examples)}
    if folder.is_dir() and any(folder.iterdir()):
        found = json.loads((folder / NOTE).read_text(encoding="utf-8")) if (folder / NOTE).is_file() else {}
        if different := [name for name in made if found.get(name) != made[name]]:
            was, wanted = ({name: of.get(name) for name in different} for of in (found, made))
            raise ValueError(
                f"The scores in {folder} were made with {was}, but {wanted} is wanted (teacher and data are known by "
                "a hash of what they hold). Name another folder, or delete it and they are made anew."
            )
        logger.info("The teacher's scores in %s are there already.", folder)
        return
    model = load_model(teacher, device=str(state.device)) if model is None else model
    with torch.autocast(state.device.type, torch.bfloat16, enabled=source.training.bf16):
        scored = add_teacher_scores(model, examples, options.num_negatives, options.seed, options.batch_size)
    if state.is_main_process:
        with staged_folder(folder) as staging:
            scored.save_to_disk(staging)
            Path(staging, NOTE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    state.wait_for_everyone()


def teacher_fingerprint(teacher: Any) -> str:
    """A hash of a teacher's weights and settings: of the files in its folder, or of a model's state."""
    if isinstance(teacher, torch.nn.Module):
        return weights_fingerprint(teacher)
    names = sorted(file.relative_to(teacher).as_posix() for file in Path(teacher).rglob("*.*"))
    own = [name for name in names if not name.startswith(("checkpoint-", "training_args."))]  # which are of the run
    kept = [name for name in own if name.endswith((".safetensors", ".bin", ".json"))]
    return hashed(part for name in kept for part in (name.encode(), np.fromfile(Path(teacher, name), np.uint8)))


def data_fingerprint(data: Dataset) -> str:
    """A hash of a data set's rows."""
    return hashed(json.dumps(batch).encode() for batch in data.iter(1000))


def distill(plan: Plan, teacher: str | None = None) -> Any:
    """All steps that are not done yet; the student's trainer. A trained `teacher` stands in for the plan's."""
    if teacher is None:
        teacher = plan.teacher.training.output_dir
        if Path(teacher, "training_args.json").is_file():
            logger.info("The teacher in %s is trained already.", teacher)
        else:
            run(plan.teacher)
    write_scores(teacher, plan.scores, plan.teacher)
    return run(plan.student)


def main(argv: Sequence[str] | None = None) -> None:
    """Distill, and push the student where asked to."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the four parts")
    parser.add_argument("--teacher", help="a trained model in place of the file's teacher: a folder or a Hub id")
    arguments = parser.parse_args(argv)
    conclude(distill(read_plan(arguments.config), arguments.teacher))


if __name__ == "__main__":
    main()
