"""What FSDP needs of us, as far as one process can show it."""

from types import SimpleNamespace

import pytest
import torch

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.runs.sharding import WholeModel, layer_classes, shard_by_layers

KINDS = [PolyEncoder, BiEncoder, CrossEncoder]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_to_shard_by(kind, checkpoints):
    """`_no_split_modules` is transformers' own and not public: a release without it fails here."""
    model = kind(checkpoints(), device="cpu")
    assert "BertLayer" in layer_classes(model)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    shard_by_layers(plugin, model)
    assert "BertLayer" in plugin.transformer_cls_names_to_wrap
    own = SimpleNamespace(transformer_cls_names_to_wrap=["Mine"])
    shard_by_layers(own, model)
    assert own.transformer_cls_names_to_wrap == ["Mine"]


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_weights_are_saved(kind, checkpoints, tmp_path):
    model = kind(checkpoints(), device="cpu")
    whole = WholeModel(model)
    gathered = {name: weight + 0.125 for name, weight in model.state_dict().items() if weight.is_floating_point()}
    gathered = {**model.state_dict(), **gathered}
    whole.with_weights(gathered).save_pretrained(str(tmp_path))
    saved = kind(str(tmp_path), device="cpu").state_dict()
    assert saved.keys() == gathered.keys()
    for name, weight in gathered.items():
        assert torch.equal(saved[name], weight), name
