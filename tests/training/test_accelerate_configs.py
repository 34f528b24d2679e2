"""The launch files of training/accelerate, read as Accelerate reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "training" / "accelerate"
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
    if name == "fsdp":
        expected = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False}
        expected |= {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}  # by the layers that the model names itself
        expected |= {"fsdp_state_dict_type": "FULL_STATE_DICT"}  # what a saved model is made of
        assert expected.items() <= config.fsdp_config.items()
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config
    if name == "deepspeed_zero2":
        assert {"zero_stage": 2, "offload_optimizer_device": "none"}.items() <= config.deepspeed_config.items()
