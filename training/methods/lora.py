"""Low-rank adapters: LoRA (Hu et al., arXiv:2106.09685) in the backbones of any of the three encoders.

    W x  becomes  W x + (alpha / rank) B A x        W frozen, A random, B zero: nothing changes at the start

The backbones learn through A and B alone. What stands outside them learns as before: the codes of a Poly-encoder, the
scoring layers of a Cross-encoder. A pooler that was training goes on too, because it is often as new as what reads it.
Merging adds B A to W, which gives back a plain model.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
_POOLER = r"(.*\.)?pooler(\..*)?"  # learns whole or not at all


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
) -> None:
    """Put LoRA layers into every backbone of `model`, in place, and freeze the backbones around them.

    Scores stay as they are until the first training step. A was drawn from torch's global generator: seed it first.

    Args:
        model: A `PolyEncoder`, `BiEncoder` or `CrossEncoder`. Encoders that are shared get one set of layers.
        rank: Rows of A, `(rank, in)`, and columns of B, `(out, rank)`.
        alpha: The product BA is scaled by `alpha / rank`; `2 * rank` when left out.
        dropout: Probability, on the input of A.
        target_modules: Names of linear layers, or the ends of their paths (`["query", "value"]`); or "all-linear".

    Raises:
        ImportError: peft is not installed.
        ValueError: a rank below 1, a dropout that is no probability, names that a backbone has no linear layer for, or
            a model that has LoRA layers already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'poly-encoders[peft]'") from error
    if rank < 1:
        raise ValueError(f"The rank of LoRA must be at least 1, got {rank}. To train all weights, leave LoRA out.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"The dropout of LoRA must be at least 0 and below 1, got {dropout}.")
    if has_lora(model):
        raise ValueError("This model has LoRA layers already. Train those, or start from merged_copy(model).")
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    backbones = find_backbones(model)
    for backbone in backbones:  # all, before any is changed
        _check_names(backbone, names)
    for backbone in backbones:
        pooler = {name: p for name, p in backbone.named_parameters() if re.fullmatch(_POOLER, name)}
        trained = [parameter for parameter in pooler.values() if parameter.requires_grad]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
            exclude_modules=_POOLER if pooler else None,
        )
        inject_adapter_in_model(config, backbone)  # freezes all but its own layers
        for parameter in trained:
            parameter.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether `model` has LoRA layers, which needs no peft to be told."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def find_backbones(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in `model` that hold no other, each once; a ValueError where there is none."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = [one for one in models if not any(part in models for part in one.modules() if part is not one)]
    if not inner:
        raise ValueError(f"This {type(model).__name__} has no transformers backbone to put LoRA layers into.")
    return inner


def _check_names(backbone: PreTrainedModel, names: list[str]) -> None:
    """See that there are linear layers of every name; peft warns of some that are missing, and refuses only all."""
    linear = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    ends = [f".{path}" for path in linear if not re.fullmatch(_POOLER, path)]
    unknown = [name for name in names if not any(end.endswith(f".{name}") for end in ends)]
    if names != [ALL_LINEAR] and (unknown or not names):
        raise ValueError(
            f"{type(backbone).__name__} has no linear layers named {unknown or names}. Choose among "
            f"{sorted({end.rsplit('.', 1)[-1] for end in ends})}, give more of their paths, or say '{ALL_LINEAR}'."
        )


def merged_copy(model: Any) -> Any:
    """A copy of `model` in which every LoRA layer is merged into its base layer and gone.

    It has the parameter names of the model before `add_lora`, and saves and loads without peft. The original stays as
    it is. With LoRA off, it is a plain copy.
    """
    # The card's data know the trainer, hence data sets and optimizer: the copy gets its own record of the same values.
    card = getattr(model, "model_card_data", None)
    merged = copy.deepcopy(model, {} if card is None else {id(card): copy.copy(card)})
    if card is not None:
        merged.model_card_data.register_model(merged)
    for path, layer in list(merged.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, layer.get_base_layer())
    for module in merged.modules():
        vars(module).pop("peft_config", None)
    return merged


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by parameter name, as copies on the CPU: LoRA matrices, codes, scoring layers."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in trained.items()}


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` took from a model that was set up in the same way.

    Raises:
        ValueError: missing or unexpected names, or other shapes; the model is then as it was.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted, found = ({name: each.shape for name, each in of.items()} for of in (parameters, state))
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(
            f"This state does not fit what trains in the model: {len(wrong)} parameters are missing, unexpected or of "
            f"another shape ({', '.join(wrong[:3])}, ...). Build the model and add LoRA as when it was saved."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
