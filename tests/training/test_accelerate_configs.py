"""The launch files of training/accelerate: all are read as Accelerate reads them, and the CPU's starts a real run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from poly_encoders import BiEncoder

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "training" / "accelerate"
KINDS = {
    "cpu_2_processes": DistributedType.MULTI_GPU,  # the launcher's word for several processes on one machine
    "multi_gpu": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_every_file_is_known():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
    assert config.distributed_type == KINDS[name]
    assert config.num_processes > 1
    assert config.use_cpu == (name == "cpu_2_processes")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_fsdp_shards_layers_of_any_architecture():
    options = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config
    assert options["fsdp_version"] == 2
    assert options["fsdp_reshard_after_forward"]
    assert options["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in options
    assert options["fsdp_state_dict_type"] == "FULL_STATE_DICT"  # what a saved model is made of
    assert not options["fsdp_offload_params"]


def test_deepspeed_shards_gradients_and_optimizer():
    options = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config
    assert options["zero_stage"] == 2
    assert options["offload_optimizer_device"] == "none"


def test_two_processes_on_the_cpu(checkpoints, tmp_path):
    rows = [{"context": f"what is {i}", "right": f"it is {i}"} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "architecture": "bi-encoder",
        "model_name_or_path": checkpoints(),
        "dataset": str(tmp_path / "data.jsonl"),
        "eval_split": "train",
        "eval_set_size": 4,
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "ddp_backend": "gloo",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    files = ["--config_file", str(FOLDER / "cpu_2_processes.yaml"), "training/train.py"]
    done = subprocess.run(
        [*launch, *files, "--config", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert BiEncoder(str(tmp_path / "out"), device="cpu").rank("a", ["b"])
