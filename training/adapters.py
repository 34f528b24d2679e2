"""Low-rank adapters: LoRA (Hu et al., arXiv:2106.09685) in the backbones of any of the three encoders.

    W x  becomes  W x + (alpha / rank) B A x        W frozen, A random, B zero: nothing changes at the start

The backbones learn through A and B alone. What stands outside them learns as before: the codes of a Poly-encoder, the
scoring layers of a Cross-encoder. A pooler that was training goes on too, because it is often as new as what reads it.
Merging adds B A to W, which gives back a plain model.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"

# Linear layers with these in their path are no targets: a pooler learns whole or not at all.
_POOLER = re.compile(r"(^|\.)pooler(\.|$)")


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
    backbones = list(find_backbones(model))
    targets = [_target_paths(backbone, target_modules) for backbone in backbones]  # all, before any is changed
    for backbone, paths in zip(backbones, targets, strict=True):
        pooler = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad and _POOLER.search(name)]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            # One expression, matched against whole paths: peft takes plain names for the ends of longer ones.
            target_modules="|".join(re.escape(path) for path in paths),
        )
        inject_adapter_in_model(config, backbone)  # freezes all but its own layers
        for _, parameter in pooler:
            parameter.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether `model` has LoRA layers, which needs no peft to be told."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def find_backbones(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models in `model` that hold no other, each once: its encoders without what is built on them.

    Raises:
        ValueError: there is none.
    """
    found = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner = (part for part in module.modules() if part is not module)
            if not any(isinstance(part, PreTrainedModel) for part in inner):
                found = True
                yield module
    if not found:
        raise ValueError(f"This {type(model).__name__} has no transformers backbone to put LoRA layers into.")


def _target_paths(backbone: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Paths within `backbone` of the linear layers that are wanted."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    linear = [
        path for path, module in backbone.named_modules() if isinstance(module, nn.Linear) and not _POOLER.search(path)
    ]
    if names == [ALL_LINEAR]:
        return linear
    matched = {name: [path for path in linear if path == name or path.endswith(f".{name}")] for name in names}
    unknown = [name for name, paths in matched.items() if not paths]
    if unknown or not names:
        ends = sorted({path.rsplit(".", 1)[-1] for path in linear})
        raise ValueError(
            f"{type(backbone).__name__} has no linear layers named {unknown or names}. Choose among {ends}, give more "
            f"of their paths, or say '{ALL_LINEAR}'."
        )
    return [path for path in linear if any(path in paths for paths in matched.values())]


def merged_copy(model: Any) -> Any:
    """A copy of `model` in which every LoRA layer is merged into its base layer and gone.

    It has the parameter names of the model before `add_lora`, and saves and loads without peft. The original stays as
    it is. With LoRA off, it is a plain copy.
    """
    # The card's data know the trainer, hence data sets and optimizer: the copy gets its own record of the same values.
    card = getattr(model, "model_card_data", None)
    memo = {} if card is None else {id(card): copy.copy(card)}
    merged = copy.deepcopy(model, memo)
    if card is not None:
        merged.model_card_data.register_model(merged)
    for path, layer in list(merged.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, layer.get_base_layer())
    for module in merged.modules():
        if isinstance(module, PreTrainedModel) and "peft_config" in vars(module):
            del module.peft_config
    return merged


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by parameter name, as copies on the CPU: LoRA matrices, codes, scoring layers.

    Of a model without LoRA, all parameters that are not frozen. For checkpoints, beside the merged model:
    `safetensors.torch.save_file(trainable_state(model), path)`.
    """
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` took from a model that was set up in the same way.

    Raises:
        ValueError: missing or unexpected names, or other shapes; the model is then as it was.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = {
        "missing": sorted(parameters.keys() - state.keys()),
        "unexpected": sorted(state.keys() - parameters.keys()),
        "of another shape": sorted(
            name for name in parameters.keys() & state.keys() if parameters[name].shape != state[name].shape
        ),
    }
    if any(problems.values()):
        said = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"This state does not fit what trains in the model ({said}). Build the model and add LoRA with the options "
            "that it was saved with."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
