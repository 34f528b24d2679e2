"""Poolings and dense layers, against those of sentence-transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

import tiny
from poly_encoders import BiEncoder
from poly_encoders.modeling.sentence_modules import TextEncoder, activation, load_module, read_sides

CPU = torch.device("cpu")


def features(left):
    torch.manual_seed(0)
    mask = tiny.token_batch(5, 7, left=left)["attention_mask"]
    return {"token_embeddings": torch.randn(5, 7, 8), "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", [*Pooling.POOLING_MODES, ("mean", "max", "cls")])
def test_poolings(mode, left, tmp_path):
    pooling = Pooling(8, mode)
    pooling.save(str(tmp_path))
    ours = load_module(tmp_path, "Pooling", CPU, prompted=False)(features(left))["sentence_embedding"]
    torch.testing.assert_close(ours, pooling(features(left))["sentence_embedding"])


@pytest.mark.parametrize(
    "options", [{}, {"activation_function": nn.Identity(), "module_output_name": "scores"}, {"bias": False}]
)
def test_dense_layers(options, tmp_path):
    dense = Dense(8, 3, **options)
    dense.save(str(tmp_path))
    vectors = {"sentence_embedding": torch.randn(4, 8)}
    ours = load_module(tmp_path, "Dense", CPU, prompted=False)(vectors)
    torch.testing.assert_close(ours[dense.module_output_name], dense({**vectors})[dense.module_output_name])


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("LayerNorm", {}, "a LayerNorm module that is not known"),
        ("Dense", {"use_residual": True}, "a Dense module that is not known"),
        ("Pooling", {"pooling_mode": "median"}, "pools by 'median'"),
        ("Pooling", {"pooling_mode": "mean", "include_prompt": False}, "leaves its prompts out"),
    ],
)
def test_what_is_not_known_is_refused(kind, settings, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=said):
        load_module(tmp_path, kind, CPU, prompted=True)


@pytest.mark.parametrize("path", ["os.system", "torch.nn.functional.relu", "torch.nn.Missing", "mine.Identity"])
def test_an_activation_runs_no_code_of_others(path):
    with pytest.raises(ValueError, match="not known here"):
        activation(path)


def test_missing_weights_are_not_made_up(checkpoints, tmp_path):
    BiEncoder(checkpoints(), share_encoders=True, device="cpu").save(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"do not hold encoder.layer.0.output.dense.bias \(1 in all\)"):
        TextEncoder(tmp_path)


def test_the_sides_of_a_folder(checkpoints, tmp_path):
    BiEncoder(checkpoints(), device="cpu").save(str(tmp_path))
    assert read_sides(tmp_path) == {
        side: [("Transformer", f"{side}_0_Transformer"), ("Pooling", f"{side}_1_Pooling")]
        for side in ("query", "document")
    }


@pytest.mark.parametrize("path", ["../other", "/elsewhere", "a/../../b", "C:\\\\models"])
def test_no_module_is_read_from_outside_of_the_folder(path, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": path}]))
    with pytest.raises(ValueError, match="not within its own"):
        read_sides(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Router", "path": ""}]))
    routes = {"types": {path: "x.Transformer"}, "structure": {"query": [path], "document": [path]}}
    (tmp_path / "router_config.json").write_text(json.dumps(routes))
    with pytest.raises(ValueError, match="not within its own"):
        read_sides(tmp_path)


def test_pickled_weights_are_not_read(checkpoints, tmp_path):
    shutil.copytree(checkpoints(), tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        TextEncoder(tmp_path / "model")
