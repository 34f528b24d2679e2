"""Runs that are killed, stopped, starved of disk or fed NaN: nothing is lost, and resuming changes nothing."""

import errno
import json
import os
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

import forks
from poly_encoders.training import quickstart
from poly_encoders.training.runs.resuming import (
    STOPPED,
    DiskFullError,
    Stopped,
    checkpoint_to_resume,
    is_whole,
    lacks_room,
    last_checkpoint,
    train_to_end,
)
from poly_encoders.training.runs.trainers import NonFiniteLossError, PaperTrainer, PolyEncoderTrainer
from poly_encoders.training.train import build_trainer, main, make_options, run
from training_runs import KINDS, QUIET, assert_same_weights, logged, make_trainer, weights, write_rows


@pytest.fixture
def options(checkpoints, tmp_path):
    """A function from changes to the options of a run: two epochs, with dropout, saved at every third step."""

    def made(**changes):
        return {
            "model_name_or_path": checkpoints(),
            "dataset": write_rows(tmp_path / "data.jsonl", 24),
            "eval_dataset": write_rows(tmp_path / "validation.jsonl", 8),
            "eval_set_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            **QUIET,
            **changes,
        }

    return made


@pytest.fixture
def signal_in_step(monkeypatch):
    """A function that has SIGTERM come in the step of this number."""
    original = PaperTrainer.training_step

    def arranged(number):
        def step(trainer, *args, **kwargs):
            if trainer.state.global_step + 1 == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(PaperTrainer, "training_step", step)

    return arranged


def arguments(options, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    return ["--config", str(tmp_path / "config.yaml"), "--resume_from_checkpoint"]


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_weights(options, tmp_path):
    """kill -9 while it saves and after a save, then SIGTERM; each time it goes on from what is whole."""
    run(make_options(options(output_dir=str(tmp_path / "whole"))))
    folder, command = tmp_path / "out", ["training/train.py", *arguments(options(), tmp_path)]
    moments = [
        ("checkpoint-3/model.safetensors", signal.SIGKILL, -signal.SIGKILL),  # the optimizer's state is still to come
        ("checkpoint-6/trainer_state.json", signal.SIGKILL, -signal.SIGKILL),
        ("checkpoint-9/optimizer.pt", signal.SIGTERM, STOPPED),
    ]
    for file, number, code in moments:
        process = forks.Process(command)
        end = time.monotonic() + 120
        while not (folder / file).exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() == code, process.stderr.read()[-3000:]
        assert not (folder / "model.safetensors").exists()
    assert last_checkpoint(folder).name in ("checkpoint-9", "checkpoint-10", "checkpoint-11")
    forks.run(command)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("architecture", ["bi-encoder", "cross-encoder"])
def test_resuming_in_the_first_and_in_a_later_epoch(options, tmp_path, architecture):
    """Dropout, the order of the rows and the drawn candidates go on where they were, and so do both schedules."""
    changes = {"architecture": architecture, "lr_scheduler_type": "reduce_lr_on_plateau", "optimizer": "adamax"}
    plateau = {"factor": 0.4, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}  # lowers it every time
    changes |= {"lr_scheduler_kwargs": plateau, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2, "num_negatives": 3} if architecture == "cross-encoder" else {}
    settings = options(**changes)
    trainer = run(make_options(settings))
    rates = logged(trainer, "learning_rate")
    assert len(set(rates)) == 4  # half of it, all of it, and twice lower
    for stop in (3, 9):
        again = run(make_options({**settings, "resume_from_checkpoint": str(tmp_path / "out" / f"checkpoint-{stop}")}))
        assert_same_weights(again.model, trainer.model)
        assert logged(again, "learning_rate") == rates


@pytest.mark.parametrize(
    ("kind", "model_options"),
    [
        ("bi", {"reduction": "first"}),
        ("bi", {"reduction": "mean", "share_encoders": True}),
        ("bi", {"reduction": "first_m_mean"}),
        ("bi", {"reduction": "first_m_mean", "num_codes": 3, "share_encoders": True}),
        ("poly", {"reduction": "first_m_mean"}),
        ("poly", {"context_vectors": "learnt_codes"}),
        ("poly", {"config_kwargs": {"learn_final_temperature": True, "learn_last_turn_share": True}}),
        ("poly", {"context_vectors": "last_m", "share_encoders": True}),
        ("cross", {}),
    ],
)
def test_every_model_resumes_and_loads_its_best(kind, model_options, checkpoints, tmp_path):
    """A Bi-encoder with first_m_mean could not be resumed, and kept its last weights where its best were asked for."""
    data = Dataset.from_list([{"context": f"say {i}", "reply": f"{i} it is"} for i in range(8)])
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}

    def made(**options):
        return make_trainer(kind, checkpoints(), tmp_path, data, model_options, data, **{**settings, **options})

    def saved(step):
        return KINDS[kind][0](str(tmp_path / f"checkpoint-{step}"), device="cpu")

    trainer = made(load_best_model_at_end=True, greater_is_better=True)  # the loss falls, so the first is the "best"
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_same_weights(trainer.model, saved(1))
    last = saved(2)
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(again.model, last)


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}])
def test_what_the_loss_has_learnt_is_resumed_and_is_that_of_the_best(checkpoints, tmp_path, more):
    data = Dataset.from_list([{"context": f"say {i}", "reply": f"{i} it is"} for i in range(8)])
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", **more}
    settings |= {"learn_logit_scale": True, "logging_steps": 1}

    def made(**options):
        return make_trainer("poly", checkpoints(), tmp_path, data, None, data, **{**settings, **options})

    def saved(step):
        return load_file(tmp_path / f"checkpoint-{step}" / "loss.safetensors")["log_logit_scale"]

    trainer = made(load_best_model_at_end=True, greater_is_better=True)
    trainer.train()
    assert len({saved(step).item() for step in range(1, 5)}) == 4
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[-1])
    assert best < 4
    assert torch.equal(trainer.loss.log_logit_scale.detach(), saved(best))
    again, last = made(), saved(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.loss.log_logit_scale.detach(), last)
    (tmp_path / "checkpoint-2" / "loss.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"loss\.safetensors"):
        made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_best_checkpoint_that_cannot_be_loaded_is_an_error(options, tmp_path, monkeypatch):
    """Upstream logs one, and the last weights would be taken for the best."""
    monkeypatch.setattr(PolyEncoderTrainer, "_load_from_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(make_options(options(max_steps=3, load_best_model_at_end=True)))


def test_resuming_a_run_that_only_lacked_its_last_save(options, tmp_path):
    """Killed after the last checkpoint, in the middle of an epoch: not a step more is made."""
    settings = options(max_steps=9, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    settings |= {"greater_is_better": True, "save_total_limit": 2}
    whole = run(make_options(settings))
    assert whole.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "model.safetensors").unlink()
    again = run(make_options({**settings, "resume_from_checkpoint": "last"}))
    assert again.state.global_step == 9
    assert_same_weights(again.model, whole.model)  # the best ones, not those of checkpoint-9
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-10").exists()


def test_which_checkpoints_are_whole(tmp_path):
    args = KINDS["bi"][2](str(tmp_path), resume_from_checkpoint="last", **QUIET)
    assert checkpoint_to_resume(args) is None
    states = {2: '{"global_step": 2}', 4: '{"global_step": 4, "epo', 6: None, 8: '{"global_step": 2}'}
    for step, state in states.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "rng_state_0.pth").write_bytes(b"x")
    assert last_checkpoint(tmp_path, num_processes=2) is None  # the other process's is missing
    (tmp_path / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"x")
    assert last_checkpoint(tmp_path, num_processes=2).name == "checkpoint-2"
    for name in ("checkpoint-4", "checkpoint-5", "checkpoint-best"):
        args.resume_from_checkpoint = str(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
            checkpoint_to_resume(args)
    args.resume_from_checkpoint = "last"
    assert checkpoint_to_resume(args) == tmp_path / "checkpoint-2"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-best"}


# --- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_ends_with_143(options, tmp_path, signal_in_step, caplog):
    before = signal.getsignal(signal.SIGTERM)
    signal_in_step(5)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as exited:
        main(arguments(options(eval_strategy="no"), tmp_path))
    assert exited.value.code == STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "after step 5" in caplog.text
    assert "--resume_from_checkpoint" in caplog.text
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-5"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_sigterm_in_the_last_step_ends_what_would_follow(options, tmp_path, signal_in_step, monkeypatch):
    monkeypatch.setattr(PolyEncoderTrainer, "evaluate", lambda *_: pytest.fail("it evaluated"))
    signal_in_step(3)
    with pytest.raises(Stopped):
        run(make_options(options(max_steps=3, eval_strategy="no")))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_sigterm_ends_the_quick_start(checkpoints, tmp_path, signal_in_step, monkeypatch, capsys):
    """It saved, and then went on ranking for minutes. Once resumed, both models are in its table."""
    monkeypatch.setattr(quickstart, "console", Console(width=100))
    monkeypatch.setattr(quickstart, "keep_quiet", lambda: None)  # other tests read the log
    sets = [{"context": "a", "candidates": list("abcdefghijkl"), "label": 0}]
    monkeypatch.setattr(quickstart, "chitchat_ranking_sets", lambda *_, **__: sets)
    given = {"model_name_or_path": checkpoints(), "dataset": write_rows(tmp_path / "d.jsonl", 8), "output": tmp_path}
    given |= {"max_context_length": 20, "max_candidate_length": 20, "max_steps": 4, "per_device_train_batch_size": 2}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    signal_in_step(2)
    with pytest.raises(SystemExit) as exited:
        quickstart.main(words)
    assert exited.value.code == STOPPED
    assert is_whole(tmp_path / "quickstart-bi-encoder" / "checkpoint-2")
    signal_in_step(None)
    capsys.readouterr()
    results = quickstart.main([*words, "--resume_from_checkpoint"])
    assert [result.architecture for result in results] == ["bi-encoder", "poly-encoder"]
    (table,) = re.findall(r"│ Poly-encoder │(.*)│\n", capsys.readouterr().out)
    keys = ("recall@1", "recall@5", "mrr")
    numbers = [measured[key] for key in keys for measured in (results[1].before, results[1].after)]
    assert [float(cell) for cell in table.split("│")] == pytest.approx(numbers, abs=6e-4)
    assert (tmp_path / "quickstart-poly-encoder" / "model.safetensors").is_file()


def test_the_signal_s_checkpoint_stays_where_only_the_best_is_kept(options, tmp_path, signal_in_step):
    changes = {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_validation_mrr"}
    settings = options(**changes, save_steps=1, eval_steps=1, learning_rate=1e-8, max_steps=6)
    trainer = build_trainer(make_options(settings))
    signal_in_step(4)
    with pytest.raises(Stopped):
        train_to_end(trainer)
    assert is_whole(tmp_path / "out" / "checkpoint-4")
    signal_in_step(None)
    trainer.train()  # the signal is forgotten
    assert trainer.state.global_step == 6
    assert not trainer.signals.received


# --- what is no number -----------------------------------------------------------------------------------------------


def test_gradients_that_are_no_numbers_stop_the_run(options):
    trainer = build_trainer(make_options(options(eval_strategy="no")))
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (float("nan") if trainer.state.global_step == 3 else 1.0))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(NonFiniteLossError, match="step 4"):
        trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(options, tmp_path):
    trainer = build_trainer(make_options(options(eval_strategy="no")))
    original, forward, batches, before = trainer.data_collator, trainer.loss.forward, [], {}

    class Spy:
        valid_label_columns = original.valid_label_columns

        def __call__(self, rows):
            batches.append(rows)
            return original(rows)

    def loss(*inputs):
        if trainer.state.global_step != 7:
            return forward(*inputs)
        before.update(weights(trainer.model))
        return forward(*inputs) * float("nan")

    trainer.data_collator, trainer.loss.forward = Spy(), loss
    with pytest.raises(NonFiniteLossError, match="step 8") as caught:
        trainer.train()
    assert not [name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])]
    found = json.loads(caught.value.path.read_text())
    assert found["step"] == 8
    assert found["examples"] == [trainer.train_dataset[row] for row in found["rows"]]
    assert found["examples"] in batches[6:]  # of the second epoch
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-6"


def test_a_bad_batch_of_another_sampler_is_written_as_its_texts(options):
    trainer = build_trainer(make_options(options(eval_strategy="no", length_sorted_batches=False)))
    forward = trainer.loss.forward
    trainer.loss.forward = lambda *inputs: forward(*inputs) * float("inf")
    with pytest.raises(NonFiniteLossError, match="step 1") as caught:
        trainer.train()
    found = json.loads(caught.value.path.read_text())
    assert found.keys() == {"step", "context", "reply"}
    assert all(text.replace(" ", "").startswith("itis") for text in found["reply"])


# --- a full disk, and what is none -----------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size):
    """Writing more fails as it does on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk(options, tmp_path, file):
    """The step that cannot be saved is lost, what was saved before is not, and the run goes on from there."""
    settings = options(eval_strategy="no", max_steps=6, eval_split=None)
    run(make_options({**settings, "max_steps": 3}))
    saved, resumed = tmp_path / "out" / "checkpoint-3", {**settings, "resume_from_checkpoint": "last"}
    with (
        files_no_larger_than((saved / file).stat().st_size - 1),
        pytest.raises(DiskFullError, match=rf"step 6 .*the last whole checkpoint is {saved}. Make room"),
    ):
        run(make_options(resumed))
    assert last_checkpoint(tmp_path / "out") == saved
    assert run(make_options(resumed)).state.global_step == 6
    assert is_whole(tmp_path / "out" / "checkpoint-6")


def test_other_errors_are_not_said_to_be_a_full_disk(options, monkeypatch):
    """Any OSError in training was, and so was one of torch.save that had another cause."""
    trainer = build_trainer(make_options(options(eval_strategy="no", save_steps=1)))

    def fails(error):
        def raising(*_, **__):
            raise error

        return raising

    disk = OSError(errno.ENOSPC, "No space left on device")
    zip_writer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 0 vs 1")
    places = [(trainer, "training_step"), (trainer.model, "save_pretrained"), (torch, "save")]
    for error in (FileNotFoundError(errno.ENOENT, "gone"), PermissionError(errno.EACCES, "no"), zip_writer):
        for place, name in places:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, fails(error))
                with pytest.raises(type(error)) as caught:
                    train_to_end(trainer)
            assert caught.value is error
    with monkeypatch.context() as patch:  # of something else that is written, whose own message says what it is
        patch.setattr(trainer, "training_step", fails(disk))
        with pytest.raises(OSError, match="No space left") as caught:
            train_to_end(trainer)
    assert caught.value is disk


def test_what_lacks_room(tmp_path):
    rooms = {errno.ENOSPC: True, errno.EDQUOT: True, errno.EFBIG: True, errno.EACCES: False, errno.EIO: False}
    for number, expected in rooms.items():
        error = OSError(number, os.strerror(number))
        wrapped = RuntimeError("of a writer")
        wrapped.__cause__ = error
        rust = SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        assert [lacks_room(each, tmp_path) for each in (error, wrapped, rust)] == [expected] * 3


def test_asking_for_room_changes_no_file(tmp_path):
    """What torch.save wrote last was written on, and that might be a whole checkpoint's, or a user's own file."""
    (tmp_path / "optimizer.pt").write_bytes(b"whole")
    zip_writer = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert not lacks_room(zip_writer, tmp_path)
    with files_no_larger_than(1 << 19):
        assert lacks_room(zip_writer, tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("optimizer.pt", b"whole")]


def test_the_curve_lies_beside_the_checkpoints(options, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run(make_options(options(max_steps=6)))
    folder = tmp_path / "out"
    entries = json.loads((folder / "evaluation.json").read_text())
    assert [entry["step"] for entry in entries] == [3, 6, 6]  # while training, and at the end
    assert {"eval_loss", "eval_validation_mrr", "eval_validation_recall@1"} <= entries[0].keys()
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
