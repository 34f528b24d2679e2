"""Teacher, scores, student: each step once, and a student that learns what its teacher knows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk

import forks
import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.distill import data_fingerprint, main, read_plan, teacher_fingerprint
from poly_encoders.training.methods.teaching import add_teacher_scores, score_rows
from poly_encoders.training.runs.arguments import PolyEncoderTrainingArguments
from poly_encoders.training.runs.trainers import PolyEncoderTrainer
from poly_encoders.training.train import build_trainer

ROWS = [{"context": ["so", f"what is {i}"], "positive": f"it is {i}", "negative": f"it was {i}"} for i in range(12)]
COMMON = {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True}


@pytest.mark.parametrize("kind", [CrossEncoder, PolyEncoder, BiEncoder])
def test_scores_are_the_teacher_s(kind, checkpoints):
    torch.manual_seed(0)
    teacher, data = kind(checkpoints(), device="cpu"), Dataset.from_list(ROWS)
    scored = add_teacher_scores(teacher, data, num_negatives=3, show_progress_bar=False)
    scale = 20.0 if kind is PolyEncoder else 1.0  # its scores are cosines, and a teacher's are logits
    candidates = ["positive", "negative", "negative_1", "negative_2"]
    assert scored.column_names == ["context", *candidates, "scores"]
    for row in scored:
        texts = [row[name] for name in candidates]
        ranked = sorted(teacher.rank(row["context"], texts), key=lambda entry: entry["corpus_id"])
        assert row["scores"] == pytest.approx([scale * entry["score"] for entry in ranked], abs=1e-3)
        assert row["positive"] not in texts[1:]
        assert set(texts[2:]) <= {other["positive"] for other in ROWS}
    again = add_teacher_scores(teacher, data, num_negatives=3, show_progress_bar=False)
    assert again["negative_2"][:] == scored["negative_2"][:]
    assert score_rows(teacher, ["a"], [["b"]]).shape == (1, 1)
    with pytest.raises(ValueError, match="raise num_negatives"):
        add_teacher_scores(teacher, data.select_columns(["context", "positive"]), num_negatives=0)
    with pytest.raises(ValueError, match="scores already"):
        add_teacher_scores(teacher, scored, num_negatives=1)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_student_comes_to_rank_as_its_teacher(checkpoints, tmp_path, kind):
    """The teacher's opinion is against the data's, so that only what it teaches explains what the student learns."""
    data = Dataset.from_list(ROWS).add_column("scores", [[0.0, 3.0]] * len(ROWS))
    torch.manual_seed(0)
    student = PolyEncoder(checkpoints(), num_codes=4, device="cpu")
    options = {**COMMON, "per_device_train_batch_size": 12, "learning_rate": 3e-3, "dropout": 0.0, "disable_tqdm": True}
    args = PolyEncoderTrainingArguments(
        str(tmp_path), max_steps=60, distillation=kind, distillation_weight=1.0, **options
    )
    PolyEncoderTrainer(model=student, args=args, train_dataset=data).train()
    candidates = [[row["positive"], row["negative"]] for row in ROWS]
    scores = 20.0 * score_rows(student, [row["context"] for row in ROWS], candidates)  # cosines
    assert (scores[:, 1] - scores[:, 0]).mean().item() > 1.5


def test_fingerprints(saved_poly_encoder, poly_encoder, tmp_path):
    """Contents decide, not names; nor does what a run leaves beside a model."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(saved_poly_encoder, first)
    shutil.copytree(saved_poly_encoder, second)
    (second / "checkpoint-3").mkdir()
    for name in ("README.md", "training_args.json", "checkpoint-3/config.json"):
        (second / name).write_text("{}")
    assert teacher_fingerprint(first) == teacher_fingerprint(second)
    for name in ("model.safetensors", "config.json"):
        kept = (second / name).read_bytes()
        (second / name).write_bytes(kept + b" ")
        assert teacher_fingerprint(first) != teacher_fingerprint(second)
        (second / name).write_bytes(kept)
    known = teacher_fingerprint(poly_encoder)
    assert known == teacher_fingerprint(PolyEncoder(str(first), device="cpu"))
    tiny.shift(poly_encoder)
    assert known != teacher_fingerprint(poly_encoder)
    data = Dataset.from_list(ROWS)
    assert data_fingerprint(data) == data_fingerprint(data.select(range(11, -1, -1)).select(range(11, -1, -1)))
    others = (data.select(range(11)), data.rename_column("negative", "wrong"), Dataset.from_list([*ROWS[:-1], ROWS[0]]))
    assert len({data_fingerprint(other) for other in (data, *others)}) == 4


@pytest.fixture
def config(checkpoints, tmp_path):
    def file(name, **more):
        rows = [{"context": row["context"], "positive": row["positive"], **more} for row in ROWS]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def write(**changes):
        path = tmp_path / "distill.yaml"
        path.write_text(yaml.safe_dump({**write.parts, **changes}))
        return str(path)

    data = {"dataset": file("data.jsonl"), "eval_dataset": file("eval.jsonl"), "eval_set_size": 4}
    write.file = file
    write.parts = {
        "data": {**COMMON, **data, "model_name_or_path": checkpoints(), "max_candidate_length": 12, "max_steps": 2},
        "teacher": {"architecture": "cross-encoder", "output_dir": str(tmp_path / "teacher")},
        "scores": {"folder": str(tmp_path / "scores"), "num_negatives": 2},
        "student": {"output_dir": str(tmp_path / "student"), "distillation": "kl", "num_codes": 3},
    }
    return write


def test_all_three_steps_in_a_row_and_none_twice(config, tmp_path, caplog):
    main(["--config", config()])
    scored = load_from_disk(str(tmp_path / "scores"))
    assert scored.column_names == ["context", "positive", "negative_1", "negative_2", "scores"]
    assert len(scored) == 12
    assert PolyEncoder(str(tmp_path / "student"), device="cpu").rank("what is 3", ["it is 3", "it is 4"])
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO", logger="poly_encoders")
    main(["--config", config()])
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert "trained already" in caplog.text
    assert "there already" in caplog.text
    # Retrained in the same folder, or the same folder's data changed: the scores are stale.
    teacher = CrossEncoder(str(tmp_path / "teacher"), device="cpu")
    tiny.shift(teacher)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match=r"were made with {'teacher': .*is wanted.*delete it"):
        main(["--config", config()])


def test_a_teacher_that_one_has_and_scores_of_other_data(config, tmp_path, saved_poly_encoder):
    main(["--config", config(), "--teacher", str(saved_poly_encoder)])
    assert not (tmp_path / "teacher").exists()
    assert "scores" in load_from_disk(str(tmp_path / "scores")).column_names
    shutil.copytree(saved_poly_encoder, tmp_path / "the same elsewhere")
    more = {**config.parts["scores"], "num_negatives": 3}
    with pytest.raises(ValueError, match=r"made with {'num_negatives': 2}, but {'num_negatives': 3}"):
        main(["--config", config(scores=more), "--teacher", str(tmp_path / "the same elsewhere")])
    config.file("data.jsonl", more="other")
    with pytest.raises(ValueError, match=r"were made with {'data': "):
        main(["--config", config(), "--teacher", str(saved_poly_encoder)])


def test_columns_and_limits_of_the_data_reach_the_student_as_they_should(config):
    """The student's training data has the scored columns; what evaluates it is read as the teacher's is."""
    files = {name: config.file(f"{name}.jsonl", negative="no", id="x") for name in ("dataset", "eval_dataset")}
    data = {**config.parts["data"], **files, "columns": ["context", "positive", "negative"], "max_negatives": 0}
    plan = read_plan(config(data=data))
    main(["--config", config(data=data)])
    trainer = build_trainer(plan.student)
    assert trainer.train_dataset.column_names == ["context", "positive", "negative_1", "negative_2", "scores"]
    for row, sample in zip(ROWS, trainer.evaluator.samples, strict=True):
        assert sample["candidates"][:2] == [row["positive"], "no"]
    alone = {name: value for name, value in data.items() if name != "eval_dataset"}
    assert build_trainer(read_plan(config(data=alone)).student).evaluator is None


def test_a_student_of_two_processes_is_evaluated(config, tmp_path):
    """Validation is without the teacher, also where distributed training wraps the model."""
    data = {**config.parts["data"], "eval_strategy": "steps", "eval_steps": 1, "ddp_backend": "gloo"}
    forks.run(["-m", "poly_encoders.training.distill", "--config", config(data=data)], ranks=2)
    assert PolyEncoder(str(tmp_path / "student"), device="cpu").rank("what is 3", ["it is 3", "it is 4"])


def test_plans_that_make_no_sense(config):
    with pytest.raises(FileNotFoundError, match="no config file"):
        read_plan("nowhere.yaml")
    for changes, message in (
        ({"scores": {"num_negatives": 2}}, "folder"),
        ({"scores": {"folder": "x", "negatives": 2}}, "num_negatives"),
        ({"scores": {"folder": "x", "num_negatives": 0}}, "at least 1"),
        ({"pupil": {}}, "must have the parts"),
        ({"student": {**config.parts["student"], "distillation": None}}, "has no distillation"),
        ({"teacher": {"archtecture": "bi-encoder"}}, "archtecture"),
    ):
        with pytest.raises(ValueError, match=message):
            read_plan(config(**changes))


def test_the_config_of_chitchat_is_a_plan():
    plan = read_plan(str(Path(__file__).parents[2] / "training" / "configs" / "chitchat_distill.yaml"))
    assert plan.teacher.model.architecture == "cross-encoder"
    assert plan.student.data.dataset == plan.scores.folder
    assert plan.student.data.eval_dataset == "chitchat"
