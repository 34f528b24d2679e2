"""training/train.py: options, and whole runs as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.arguments import TRAINING_ARGUMENTS
from poly_encoders.training.train import main, parse_options

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


@pytest.fixture
def config(checkpoints, tmp_path):
    rows = [{"context": f"what is {i}", "right": f"it is {i}"} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "config.yaml"
    options = {
        "model_name_or_path": checkpoints(),
        "dataset": str(data),
        "eval_split": "train",
        "eval_set_size": 4,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": "5e-4",
        "num_negatives": 2,
        "save_strategy": "no",
        "report_to": "none",
    }

    def write(**changes):
        merged = {**options, **changes}
        if merged.get("architecture") != "cross-encoder":
            merged.pop("num_negatives", None)
        file.write_text(yaml.safe_dump(merged))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [("poly-encoder", PolyEncoder), ("bi-encoder", BiEncoder), ("cross-encoder", CrossEncoder)],
)
def test_a_run_of_each(config, tmp_path, architecture, model_class):
    main(["--config", config(architecture=architecture), "--max_candidate_length", "10"])
    model = model_class(str(tmp_path / "out"), device="cpu")
    assert len(model.rank("what is 3", ["it is 3", "it is 4"])) == 2
    assert (tmp_path / "out" / "eval" / "candidate_ranking_train.csv").is_file()


def test_accelerate_launch(config, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    done = subprocess.run(
        [*command, "training/train.py", "--config", config(), "--num_codes", "3"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert PolyEncoder(str(tmp_path / "out"), device="cpu")[0].config.num_codes == 3


@pytest.mark.parametrize("changes", [{}, {"gather_across_devices": True, "mini_batch_size": 2}], ids=["plain", "all"])
def test_two_processes(config, tmp_path, changes):
    """Distributed training refuses parameters without a gradient, and uneven sides."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [
            *command,
            "training/train.py",
            "--config",
            config(bf16=False, use_cpu=True, ddp_backend="gloo", save_strategy="steps", save_steps=1, **changes),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert PolyEncoder(str(tmp_path / "out"), device="cpu").rank("a", ["b"])
    assert {file.name for file in (tmp_path / "out" / "checkpoint-1").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_the_command_line_comes_before_the_file(config):
    options = parse_options(["--config", config(), "--max_steps", "7", "--num_codes", "5"])
    assert options.training.max_steps == 7
    assert options.model.num_codes == 5
    assert options.training.learning_rate == 5e-4
    assert options.training.per_device_train_batch_size == 4


def test_later_files_come_before_earlier_ones(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("num_codes: 9\nmax_steps: 3\n")
    options = parse_options(["--config", config(num_codes=5), str(other), "--max_steps", "7"])
    assert (options.model.num_codes, options.training.max_steps) == (9, 7)
    assert options.training.per_device_train_batch_size == 4


def test_resuming_needs_no_name(config):
    assert parse_options(["--config", config()]).training.resume_from_checkpoint is None
    assert parse_options(["--config", config(), "--resume_from_checkpoint"]).training.resume_from_checkpoint == "last"
    named = parse_options(["--config", config(), "--resume_from_checkpoint", "x/checkpoint-3"])
    assert named.training.resume_from_checkpoint == "x/checkpoint-3"


def test_nothing_is_trained_when_the_validation_split_is_empty(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="eval_split null"):
        main(["--config", config(eval_dataset=str(empty))])
    assert not (tmp_path / "out").exists()


def test_a_bad_line_is_named(config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "right": "b"}\n{"context": "c", "right"\n')
    with pytest.raises(ValueError, match="Line 2"):
        main(["--config", config(dataset=str(bad))])


def test_options_that_do_not_exist(config):
    with pytest.raises(ValueError, match=r"\['num_code'\]"):
        parse_options(["--config", config(num_code=3)])
    with pytest.raises(ValueError, match="num_negatives"):
        parse_options(["--config", config(architecture="cross-encoder"), "--architecture", "bi-encoder"])
    with pytest.raises(FileNotFoundError, match="no config file"):
        parse_options(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="architecture"):
        parse_options(["--config", config(architecture="tri-encoder")])


@pytest.mark.parametrize(
    "file", [file for file in CONFIGS if not file.stem.endswith(("_pretrain", "_distill"))], ids=lambda file: file.stem
)
def test_every_config_parses(file):
    options = parse_options(["--config", str(file)])
    assert isinstance(options.training, TRAINING_ARGUMENTS[options.model.architecture])
