"""FSDP for sentence-transformers models: sharded by layers, and saved whole.

Upstream names no layers to shard by, so that the whole model would be one shard, and it saves the very tensors that
are in shards. Here the backbones name their layers, and a copy on the CPU takes the gathered weights and is saved.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def shard_by_layers(plugin: Any, model: nn.Module) -> None:
    """Tell Accelerate's FSDP plugin which layers to shard, unless the options named some."""
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of layers that the backbones in `model` want kept in one piece."""
    modules = list(model.modules())
    backbones = [module for module in modules if isinstance(module, PreTrainedModel)]
    wanted = {name for backbone in backbones for name in backbone._no_split_modules or []}
    return sorted(wanted & {type(module).__name__ for module in modules})


class WholeModel:
    """A copy of a model as it is before it is sharded, to save its weights in."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).cpu()

    def with_weights(self, state: dict[str, Tensor]) -> Any:
        """The copy, with the weights that were gathered from all shards."""
        self.model.load_state_dict({name: weight.cpu() for name, weight in state.items()})
        return self.model
