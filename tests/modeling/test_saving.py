"""Checkpoints on disk: a save that fails changes nothing, and broken files are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from poly_encoders import PolyEncoderModel
from poly_encoders.modeling import staged_folder


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    old = tiny.poly_model(seed=0)
    old.save_pretrained(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny.poly_model(seed=1, num_codes=9).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert torch.equal(PolyEncoderModel.from_pretrained(folder).codes, old.codes)


def test_saving_over_keeps_other_files_and_drops_stale_shards(tmp_path):
    tiny.poly_model(seed=0).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model = tiny.poly_model(seed=1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("model-*.safetensors"))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(PolyEncoderModel.from_pretrained(tmp_path).codes, model.codes)


def test_sharded_save_loads(tmp_path):
    model = tiny.poly_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = PolyEncoderModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_shared_weights_are_stored_once(tmp_path):
    apart, together = tiny.poly_model(), tiny.poly_model(share_encoders=True)
    apart.save_pretrained(tmp_path / "apart")
    together.save_pretrained(tmp_path / "together")
    sizes = [
        sum(t.numel() for t in load_file(tmp_path / name / "model.safetensors").values())
        for name in ("apart", "together")
    ]
    encoder = sum(parameter.numel() for parameter in together.context_encoder.parameters())
    assert sizes[0] - sizes[1] == encoder


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        tiny.poly_model().save_pretrained(tmp_path / "file")


def test_staging_leaves_nothing_behind(tmp_path):
    def interrupted():
        with staged_folder(tmp_path / "model") as staging:
            Path(staging, "model.safetensors").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", range(1, 8))
def test_a_failure_while_files_move_puts_the_old_ones_back(tmp_path, monkeypatch, after):
    folder = tmp_path / "model"
    tiny.poly_model(seed=0).save_pretrained(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    moves = []
    original = Path.replace

    def sometimes(self, target):
        moves.append(target)
        if len(moves) == after:
            raise OSError("Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", sometimes)
    with pytest.raises(OSError, match="Input/output"):
        tiny.poly_model(seed=1, num_codes=9).save_pretrained(folder)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    tiny.poly_model().save_pretrained(tmp_path / "model", is_main_process=False)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
