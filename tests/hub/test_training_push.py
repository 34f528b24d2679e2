"""Runs that push: told early when they cannot, one commit of the model alone, and no model lost to a failed push."""

import json
import logging

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from hub_client import logged_in
from poly_encoders.cli import app
from poly_encoders.hub.pushing import PushError
from poly_encoders.training import pretrain, train
from poly_encoders.training.runs.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.runs.trainers import BiEncoderTrainer, CrossEncoderTrainer, PolyEncoderTrainer

ROWS = [{"context": f"what is {i}", "positive": f"it is {i}"} for i in range(8)]
KINDS = {
    "poly": (PolyEncoderTrainer, PolyEncoderTrainingArguments),
    "bi": (BiEncoderTrainer, BiEncoderTrainingArguments),
    "cross": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
}
USUAL = {
    "push_to_hub": True,
    "hub_model_id": "acme/trained",
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
}


@pytest.fixture
def make(models, tmp_path):
    """A function that makes the trainer of a kind; it pushes to acme/trained unless told otherwise."""

    def made(kind="poly", **options):
        trainer_class, arguments_class = KINDS[kind]
        sampled = {"num_negatives": 2} if kind == "cross" else {}
        args = arguments_class(**{"output_dir": str(tmp_path / "out"), **USUAL, **sampled, **options})
        return trainer_class(model=models[f"acme/{kind}"], args=args, train_dataset=Dataset.from_list(ROWS))

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_training_is_one_commit_of_the_model_alone(kind, make, as_alice, tmp_path):
    trainer = make(kind, hub_private_repo=True, save_strategy="steps", save_steps=1)
    trainer.train()
    assert not as_alice.repositories  # nothing is made before there is a model
    url = trainer.push_to_hub().commit_url
    repository = as_alice.repositories["acme/trained"]
    assert repository.private
    assert as_alice.titles("acme/trained") == ["End of training", "initial commit"]
    assert url.endswith(repository.find("main").oid)
    pushed = as_alice.files("acme/trained")
    trainer.model.save_pretrained(str(tmp_path / "model"))
    saved = {f.relative_to(tmp_path / "model").as_posix(): f for f in (tmp_path / "model").rglob("*") if f.is_file()}
    assert {name: pushed[name] for name in pushed} == {name: file.read_bytes() for name, file in saved.items()}
    assert b'"acme/trained"' in pushed["README.md"]
    assert b"generated_from_trainer" in pushed["README.md"]
    assert (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").is_file()


def test_the_options_reach_the_hub(make, as_alice):
    trainer = make(hub_revision="run-1")
    trainer.train()
    trainer.push_to_hub("First")
    assert as_alice.files("acme/trained") == {}
    assert "model.safetensors" in as_alice.files("acme/trained", "run-1")
    trainer.args.hub_create_pr, trainer.args.hub_revision = True, None
    assert trainer.push_to_hub("Second").pr_url == f"{as_alice.url}/acme/trained/discussions/1"
    assert as_alice.files("acme/trained") == {}
    assert trainer.push_to_hub("Third", create_pr=False, blocking=False).result().commit_url
    assert as_alice.titles("acme/trained") == ["Third", "initial commit"]


def test_every_save_is_pushed_and_a_failure_does_not_stop_training(make, as_alice, no_waiting, caplog):
    as_alice.fail_next("POST", "/api/repos/create", 400)
    trainer = make(hub_model_id=None, hub_strategy="every_save", max_steps=3, save_strategy="steps", save_steps=1)
    assert trainer.hub_model_id == "alice/out"  # without a name the output folder gives it
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "Training goes on" in caplog.text
    assert as_alice.titles("alice/out") == [
        *["Training in progress, step 3", "Training in progress, step 2", "initial commit"]
    ]
    pushed = as_alice.files("alice/out")
    assert not [path for path in pushed if path.endswith((".pt", ".pth", ".bin")) or path == "trainer_state.json"]


@pytest.mark.parametrize(
    ("token", "options", "match"),
    [
        ("hf_alice_read", {}, "it may only read"),
        ("hf_bob", {}, "may not write to acme/trained .it is bob's"),
        ("hf_wrong", {}, "misspelt"),
        (None, {}, "not logged in"),
        ("hf_alice", {"hub_private_repo": True, "hub_model_id": "acme/open"}, "is public"),
        ("hf_bob", {"hub_create_pr": True}, "it is bob's"),
        ("hf_bob", {"hub_create_pr": True, "hub_model_id": "acme/open"}, None),
    ],
)
def test_who_may_not_push_is_told_before_training(token, options, match, make, models, hub):
    if "hub_model_id" in options:
        with logged_in(hub):
            models["acme/cross"].push_to_hub("acme/open")
    state = hub.state()
    with logged_in(hub, token):
        if match is None:
            make(**options)
        else:
            with pytest.raises(PushError, match=match) as caught:
                make(**options)
            assert "hf_" not in str(caught.value)
    assert hub.state() == state


def test_only_the_main_process_pushes(make, as_alice, monkeypatch):
    monkeypatch.setattr(PolyEncoderTrainer, "is_world_process_zero", lambda trainer: False)
    trainer = make(hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.push_to_hub() is None
    assert not as_alice.log


def test_a_failed_push_at_the_end_leaves_the_model_and_says_how_to_go_on(
    checkpoints, as_alice, no_waiting, tmp_path, caplog
):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {**USUAL, "hub_private_repo": True, "hub_revision": "next", "output_dir": str(tmp_path / "out")}
    options |= {"model_name_or_path": checkpoints(), "dataset": str(tmp_path / "data.jsonl"), "eval_split": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    as_alice.drop_next("PUT", "/lfs/", times=99)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as exited:
        train.main(["--config", str(tmp_path / "config.yaml")])
    assert exited.value.code == 1
    assert f"Saved to {tmp_path / 'out'}" in caplog.text
    # With all its options, or a private model would be made public by its repetition.
    command = f"poly-encoders push {tmp_path / 'out'} acme/trained --exist-ok --private --revision next"
    assert command in caplog.text
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    as_alice.faults.clear()
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert as_alice.repositories["acme/trained"].private
    assert as_alice.files("acme/trained", "next")["model.safetensors"] == weights


def test_a_pre_trained_encoder_goes_with_its_cross_encoder(checkpoints, as_alice, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--model_name_or_path", checkpoints(), "--dataset", str(tmp_path / "data.jsonl"), "--max_steps", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "4", "--report_to", "none"]
    arguments += ["--bf16", "false", "--use_cpu", "--push_to_hub", "--hub_model_id", "acme/pretrained"]
    pretrain.main(arguments)
    pushed = as_alice.files("acme/pretrained")
    assert {"model.safetensors", "tokenizer.json", "cross-encoder/model.safetensors", "README.md"} <= pushed.keys()
    assert b'PolyEncoder("acme/pretrained"' in pushed["README.md"]
    assert "cross-encoder/README.md" not in pushed
    assert not [path for path in pushed if path.endswith((".pt", ".pth", ".bin")) or "checkpoint-" in path]
    assert len(as_alice.titles("acme/pretrained")) == 2
