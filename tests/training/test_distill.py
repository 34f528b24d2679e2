"""Teacher, scores, student: each step once, and a student that learns what its teacher knows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.arguments import PolyEncoderTrainingArguments
from poly_encoders.training.distill import main, read_plan
from poly_encoders.training.teaching import add_teacher_scores, score_rows
from poly_encoders.training.train import build_trainer
from poly_encoders.training.trainers import PolyEncoderTrainer

ROWS = [{"context": ["so", f"what is {i}"], "right": f"it is {i}", "wrong": f"it was {i}"} for i in range(12)]


@pytest.fixture(params=[CrossEncoder, PolyEncoder, BiEncoder])
def teacher(request, checkpoints):
    torch.manual_seed(0)
    return request.param(checkpoints(), device="cpu")


def test_scores_are_the_teacher_s(teacher):
    data = Dataset.from_list(ROWS)
    scored = add_teacher_scores(teacher, data, num_negatives=3, show_progress_bar=False)
    assert scored.column_names == ["context", "right", "wrong", "negative_1", "negative_2", "scores"]
    for row in scored:
        candidates = [row[name] for name in ("right", "wrong", "negative_1", "negative_2")]
        ranked = sorted(teacher.rank(row["context"], candidates), key=lambda entry: entry["corpus_id"])
        assert row["scores"] == pytest.approx([entry["score"] for entry in ranked], abs=1e-4)
        assert row["right"] not in candidates[1:]
        assert set(candidates[2:]) <= {other["right"] for other in ROWS}
    again = add_teacher_scores(teacher, data, num_negatives=3, show_progress_bar=False)
    assert again["negative_2"][:] == scored["negative_2"][:]


def test_what_cannot_be_scored(teacher):
    data = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="raise num_negatives"):
        add_teacher_scores(teacher, data.select_columns(["context", "right"]), num_negatives=0)
    with pytest.raises(ValueError, match="scores already"):
        add_teacher_scores(teacher, data.add_column("scores", [[0.0, 1.0]] * 12), num_negatives=1)
    one = score_rows(teacher, ["a"], [["b"]])
    assert one.shape == (1, 1)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_student_comes_to_rank_as_its_teacher(checkpoints, tmp_path, kind):
    """The teacher's opinion is against the labels, so that only what it teaches explains what the student learns."""
    data = Dataset.from_list(ROWS).add_column("scores", [[0.0, 3.0]] * len(ROWS))
    torch.manual_seed(0)
    student = PolyEncoder(checkpoints(), num_codes=4, device="cpu")
    args = PolyEncoderTrainingArguments(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        dropout=0.0,
        distillation=kind,
        distillation_weight=1.0,
    )
    PolyEncoderTrainer(model=student, args=args, train_dataset=data).train()
    scores = score_rows(student, [row["context"] for row in ROWS], [[row["right"], row["wrong"]] for row in ROWS])
    assert (scores[:, 1] - scores[:, 0]).mean().item() > 1.5


@pytest.fixture
def config(checkpoints, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"context": r["context"], "right": r["right"]}) + "\n" for r in ROWS))
    common = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    parts = {
        "data": {
            "model_name_or_path": checkpoints(),
            "dataset": str(file),
            "eval_split": "train",
            "eval_set_size": 4,
            "max_candidate_length": 12,
        },
        "teacher": {**common, "architecture": "cross-encoder", "output_dir": str(tmp_path / "teacher")},
        "scores": {"folder": str(tmp_path / "scores"), "num_negatives": 2},
        "student": {**common, "output_dir": str(tmp_path / "student"), "distillation": "kl", "num_codes": 3},
    }
    path = tmp_path / "distill.yaml"

    def write(**changes):
        path.write_text(yaml.safe_dump({**parts, **changes}))
        return str(path)

    write.parts = parts
    return write


def test_all_three_steps_in_a_row_and_none_twice(config, tmp_path, caplog):
    main(["--config", config()])
    scored = load_from_disk(str(tmp_path / "scores"))
    assert scored.column_names == ["context", "right", "negative_1", "negative_2", "scores"]
    assert len(scored) == 12
    assert PolyEncoder(str(tmp_path / "student"), device="cpu").rank("what is 3", ["it is 3", "it is 4"])
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO")
    main(["--config", config()])
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert "trained already" in caplog.text
    assert "there already" in caplog.text


def test_scores_of_another_teacher_are_refused(config, tmp_path, saved_poly_encoder):
    main(["--config", config(), "--teacher", str(saved_poly_encoder)])
    with pytest.raises(ValueError, match=r"were made with.*teacher"):
        main(["--config", config()])
    file = config(scores={**config.parts["scores"], "num_negatives": 3})
    with pytest.raises(ValueError, match=r"num_negatives.*3"):
        main(["--config", file, "--teacher", str(saved_poly_encoder)])


def test_columns_and_limits_of_the_data_reach_the_student_as_they_should(config, tmp_path):
    """The student's training data has the scored columns; what evaluates it is read as the teacher's is."""
    rows = [{"id": f"id{i}", "context": f"what is {i}", "right": f"it is {i}", "wrong": "no"} for i in range(12)]
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {**config.parts["data"], "dataset": str(file), "columns": ["context", "right", "wrong"], "max_negatives": 0}
    plan = read_plan(config(data=data))
    main(["--config", config(data=data)])
    trainer = build_trainer(plan.student)
    assert trainer.train_dataset.column_names == ["context", "right", "negative_1", "negative_2", "scores"]
    sample = trainer.evaluator.samples[0]
    assert sample["context"].startswith("what is")
    assert sample["candidates"][:2] == ["it is " + sample["context"].removeprefix("what is "), "no"]


@pytest.mark.parametrize("processes", [2])
def test_a_student_of_two_processes_is_evaluated(config, tmp_path, processes):
    """Validation is without the teacher, also where distributed training wraps the model."""
    student = {**config.parts["student"], "eval_strategy": "steps", "eval_steps": 1, "bf16": False, "use_cpu": True}
    file = config(
        teacher={**config.parts["teacher"], "bf16": False, "use_cpu": True, "ddp_backend": "gloo"},
        student={**student, "ddp_backend": "gloo"},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, "-m", "poly_encoders.training.distill", "--config", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert PolyEncoder(str(tmp_path / "student"), device="cpu").rank("what is 3", ["it is 3", "it is 4"])


def test_a_teacher_that_one_has(config, tmp_path, saved_poly_encoder):
    main(["--config", config(), "--teacher", str(saved_poly_encoder)])
    assert not (tmp_path / "teacher").exists()
    assert "scores" in load_from_disk(str(tmp_path / "scores")).column_names


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
