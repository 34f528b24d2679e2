"""Runs that are killed, stopped, starved of disk or fed NaN: nothing is lost, and resuming changes nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from poly_encoders.training.checkpoints import (
    checked_checkpoint,
    is_whole,
    last_checkpoint,
    remove_broken_checkpoints,
)
from poly_encoders.training.running import STOPPED, Stopped, train_to_end
from poly_encoders.training.train import build_trainer, make_options, run
from poly_encoders.training.trainers import NonFiniteLossError

ROOT = Path(__file__).parent.parent.parent
STEPS = 12


@pytest.fixture
def options(checkpoints, tmp_path):
    """A function from changes to the options of a run: two epochs, with dropout, saved at every third step."""
    rows = [{"context": [f"what is {i}", "well" * (i % 7)], "right": f"it is {i}"} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(**changes):
        return {
            "model_name_or_path": checkpoints(),
            "dataset": str(data),
            "eval_split": "train",
            "eval_set_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }

    return made


def command(options, tmp_path, *more):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    return [sys.executable, "training/train.py", "--config", str(config), *more]


def start(options, tmp_path, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(options, tmp_path, *more), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def weights(folder):
    files = [file for file in folder.glob("**/model.safetensors") if "checkpoint-" not in str(file)]
    assert files
    return {f"{file.relative_to(folder)}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(options, tmp_path):
    """kill -9 while it trains, while it saves, and after a save; each time it goes on from what is whole."""
    whole = start(options(output_dir=str(tmp_path / "whole")), tmp_path)
    assert whole.wait(timeout=200) == 0, whole.stderr.read()[-3000:]
    folder = tmp_path / "out"
    moments = [
        lambda: (folder / "checkpoint-3" / "model.safetensors").exists(),  # the optimizer's state is still to come
        lambda: (folder / "checkpoint-6" / "trainer_state.json").exists(),
        lambda: (folder / "checkpoint-9" / "optimizer.pt").exists(),
    ]
    killed = []
    for moment in moments:
        process = start(options(), tmp_path, "--resume_from_checkpoint")
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL
        killed.append(last_checkpoint(folder))
    process = start(options(), tmp_path, "--resume_from_checkpoint")
    assert process.wait(timeout=200) == 0, process.stderr.read()[-3000:]
    assert killed[1] is not None
    assert killed[1].name in ("checkpoint-6", "checkpoint-3")
    assert_equal(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.parametrize("architecture", ["bi-encoder", "cross-encoder"])
@pytest.mark.parametrize("stop", [3, 9])
def test_resuming_in_the_first_and_in_a_later_epoch(options, tmp_path, architecture, stop):
    """Dropout, the order of the rows and the drawn candidates go on where they were, and so do both schedules."""
    changes = {"architecture": architecture, "lr_scheduler_type": "reduce_lr_on_plateau", "optimizer": "adamax"}
    changes |= {"lr_scheduler_kwargs": {"factor": 0.4, "patience": 0}, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2, "num_negatives": 3} if architecture == "cross-encoder" else {}
    settings = options(**changes, output_dir=str(tmp_path / "whole"))
    trainer = run(make_options(settings))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) > 1
    again = run(make_options({**settings, "resume_from_checkpoint": str(tmp_path / "whole" / f"checkpoint-{stop}")}))
    for (name, expected), found in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    rates_again = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
    assert rates_again == rates


def test_sigterm_saves_first(options, tmp_path):
    folder = tmp_path / "out"
    process = start(options(max_steps=10**6, save_total_limit=1, eval_strategy="no"), tmp_path)
    wait_for(lambda: (folder / "checkpoint-3" / "trainer_state.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == STOPPED, errors[-3000:]
    assert "--resume_from_checkpoint" in errors
    saved = last_checkpoint(folder)
    assert f"after step {saved.name.split('-')[1]}," in errors
    assert not (folder / "model.safetensors").exists()


def test_a_signal_stops_after_the_step(options, tmp_path):
    trainer = build_trainer(make_options(options()))
    original = trainer.training_step

    def step(*args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.training_step = step
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="step 5"):
        train_to_end(trainer)
    assert signal.getsignal(signal.SIGTERM) is before
    assert is_whole(tmp_path / "out" / "checkpoint-5")


def test_the_signal_s_checkpoint_stays_where_only_the_best_is_kept(options, tmp_path):
    changes = {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_train_mrr"}
    trainer = build_trainer(make_options(options(**changes, save_steps=1, eval_steps=1, learning_rate=1e-8)))
    original = trainer.training_step

    def step(*args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.training_step = step
    with pytest.raises(Stopped):
        train_to_end(trainer)
    assert is_whole(tmp_path / "out" / "checkpoint-5")
    trainer.training_step = original
    trainer.train()  # the signal is forgotten
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_resuming_a_run_that_only_lacked_its_last_save(options, tmp_path, schedule):
    """Killed after the last checkpoint, in the middle of an epoch: not a step more is made."""
    settings = options(max_steps=9, lr_scheduler_type=schedule, eval_strategy="no")
    whole = run(make_options(settings))
    (tmp_path / "out" / "model.safetensors").unlink()
    again = run(make_options({**settings, "resume_from_checkpoint": "last"}))
    assert again.state.global_step in (0, 9)
    for (name, expected), found in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-10").exists()


def test_gradients_that_are_no_numbers_stop_the_run_too(options, tmp_path):
    trainer = build_trainer(make_options(options(eval_strategy="no")))
    parameter = trainer.model[0].model.codes
    parameter.register_hook(lambda gradient: gradient * (float("nan") if trainer.state.global_step == 3 else 1.0))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(NonFiniteLossError, match="step 4"):
        trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_loss_that_is_no_number_stops_the_run(options, tmp_path):
    trainer = build_trainer(make_options(options()))
    original, weights_before = trainer.loss.forward, []

    def forward(features, labels=None):
        loss = original(features, labels)
        if trainer.state.global_step != 7:
            return loss
        weights_before.extend(parameter.detach().clone() for parameter in trainer.model.parameters())
        return loss * float("nan")

    trainer.loss.forward = forward
    with pytest.raises(NonFiniteLossError, match="step 8") as caught:
        trainer.train()
    for parameter, before in zip(trainer.model.parameters(), weights_before, strict=True):
        assert torch.equal(parameter, before)
    found = json.loads(caught.value.path.read_text())
    assert found["step"] == 8
    assert len(found["rows"]) == len(found["examples"]) == 4
    assert [trainer.train_dataset[row] for row in found["rows"]] == found["examples"]
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-6"


def test_the_rows_of_a_bad_batch_are_those_that_were_trained_on(options, tmp_path):
    trainer = build_trainer(make_options(options()))
    batches = []
    original = trainer.data_collator

    class Spy:
        valid_label_columns = original.valid_label_columns

        def __call__(self, rows):
            batches.append(rows)
            return original(rows)

    trainer.data_collator = Spy()
    forward = trainer.loss.forward
    trainer.loss.forward = lambda *inputs: forward(*inputs) * (float("nan") if trainer.state.global_step == 8 else 1.0)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert json.loads(caught.value.path.read_text())["examples"] in batches


FULL_DISK = """
    import resource, signal, sys
    from poly_encoders.training.train import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk(options, tmp_path, file):
    """The step that cannot be saved is lost, what was saved before is not, and the run goes on from there."""
    settings = options(eval_strategy="no", max_steps=6)
    run(make_options({**settings, "max_steps": 3}))
    saved = tmp_path / "out" / "checkpoint-3"
    limit = (saved / file).stat().st_size - 1
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(FULL_DISK))
    resumed = [*command(settings, tmp_path, "--resume_from_checkpoint")[2:], str(limit)]
    done = subprocess.run([sys.executable, str(script), *resumed], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{saved} is whole. Make room" in done.stderr
    assert last_checkpoint(tmp_path / "out") == saved
    again = run(make_options({**settings, "resume_from_checkpoint": "last"}))
    assert again.state.global_step == 6
    assert is_whole(tmp_path / "out" / "checkpoint-6")


def test_which_checkpoints_are_whole(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in (
        (2, '{"global_step": 2}'),
        (4, '{"global_step": 4, "epo'),
        (6, None),
        (8, '{"global_step": 2}'),
    ):
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
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checked_checkpoint(tmp_path / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checked_checkpoint(tmp_path / "checkpoint-5")
    assert {path.name for path in remove_broken_checkpoints(tmp_path)} == {f"checkpoint-{n}" for n in (4, 6, 8)}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-best"}


def test_the_curve_lies_beside_the_checkpoints(options, tmp_path):
    pytest.importorskip("matplotlib")
    run(make_options(options(max_steps=6)))
    folder = tmp_path / "out"
    entries = json.loads((folder / "evaluation.json").read_text())
    assert [entry["step"] for entry in entries] == [3, 6, 6]  # while training, and at the end
    assert {"eval_loss", "eval_train_mrr", "eval_train_recall@1"} <= entries[0].keys()
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
