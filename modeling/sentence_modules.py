# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What the stock modules of sentence-transformers compute, from the folders that they were saved in.

Only those that a Bi-encoder or a Cross-encoder of poly_encoders is made of: a text encoder, poolings, a dense layer.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.modeling_utils import load_state_dict

#: From features to features, as a module of sentence-transformers.
SentenceModule: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]

#: A module's class, without its package, and its folder within the model's.
Entry: TypeAlias = tuple[str, str]


def read_json(file: Path, default: Any = None) -> Any:
    """What a JSON file says, or the default where there is no such file.

    Raises:
        OSError: it is not there, and there is no default.
        ValueError: it is no JSON.
    """
    if default is not None and not file.is_file():
        return default
    return json.loads(file.read_text(encoding="utf-8"))


def read_entries(folder: Path) -> list[Entry]:
    """The modules of a saved model, in order; a text encoder alone where none are listed."""
    listed = read_json(folder / "modules.json", default=[{"type": "Transformer", "path": ""}])
    return [(_class_name(entry["type"]), _within(entry["path"])) for entry in listed]


def read_sides(folder: Path) -> dict[str, list[Entry]]:
    """The modules of a saved Bi-encoder for the sides `"query"` and `"document"`, which may be the same ones."""
    first, *rest = read_entries(folder)
    if first[0] != "Router":
        return {"query": [first, *rest], "document": [first, *rest]}
    root = folder / first[1]
    router = read_json(root / "router_config.json")
    return {
        side: [
            *((_class_name(router["types"][name]), _within(first[1], name)) for name in router["structure"][side]),
            *rest,
        ]
        for side in ("query", "document")
    }


def _within(*names: str) -> str:
    """A path of folders within the model's own.

    Raises:
        ValueError: it leads out of there.
    """
    path = PurePosixPath(*names)
    if path.is_absolute() or ".." in path.parts or "\\" in str(path) or ":" in str(path):
        raise ValueError(f"The model names the folder {str(path)!r}, which is not within its own. Save it again.")
    return str(path)


def _class_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


class TextEncoder:
    """A tokenizer and the model behind it, in evaluation mode, on the accelerator if there is one.

    Args:
        folder: Where both were saved.
        classifier: Whether the model gives a score by itself, and not token vectors.

    Attributes:
        settings: What sentence-transformers saved of it, `query_length` and `document_length` among that.

    Raises:
        OSError: files are missing, or weights in them.
    """

    def __init__(self, folder: Path, classifier: bool = False) -> None:
        self.classifier = classifier
        self.settings: dict[str, Any] = read_json(folder / "sentence_bert_config.json", default={})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = _load_model(folder, classifier).to(default_device()).eval()
        self._accepted = set(inspect.signature(type(self.model).forward).parameters)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, encoding: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoding, on the model's device, with `token_embeddings`, `(n, length, dim)`, or `scores`, `(n, 1)`."""
        features = {name: tensor.to(self.device) for name, tensor in encoding.items()}
        inputs = {name: tensor for name, tensor in features.items() if name in self._accepted}
        output = self.model(**inputs, return_dict=True)
        if self.classifier:
            return {**features, "scores": output.logits}
        return {**features, "token_embeddings": output.last_hidden_state}


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _load_model(folder: Path, classifier: bool) -> Any:
    auto_class: Any = AutoModelForSequenceClassification
    if not classifier:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Encoders alone of T5 and its kin.
        auto_class = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    model, info = auto_class.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    # The pooler of an encoder whose token vectors are used is not used.
    if missing := sorted(name for name in info["missing_keys"] if classifier or "pooler." not in name):
        raise OSError(
            f"The weights do not hold {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} ({len(missing)} in "
            "all), which config.json calls for. Download or save the model again."
        )
    return model


def load_module(folder: Path, kind: str, device: torch.device, prompted: bool) -> SentenceModule:
    """A module that comes after the encoder.

    Args:
        folder: Where it was saved.
        kind: Its class.
        device: Where it is to compute.
        prompted: Whether the model puts prompts before texts.

    Raises:
        ValueError: it is of a kind, or has a setting, that is not known here.
    """
    settings = read_json(folder / "config.json")
    if kind == "Pooling":
        if prompted and not settings.get("include_prompt", True):
            raise ValueError("The model's pooling leaves its prompts out, which is not known here; use poly_encoders.")
        modes = settings["pooling_mode"]
        return _Pooling([modes] if isinstance(modes, str) else modes)
    if kind == "FirstMMeanPooling":
        return _Pooling(["mean"], first=settings["m"])
    if kind == "Dense" and not settings.get("use_residual", False):
        return _Dense(folder, settings, device)
    raise ValueError(f"The model has a {kind} module that is not known here. Score with poly_encoders itself.")


class _Pooling:
    """Token vectors to one vector: `sentence_embedding`, `(n, dim)`, or the modes' vectors one after another."""

    def __init__(self, modes: list[str], first: int | None = None) -> None:
        if unknown := sorted(set(modes) - _POOLINGS.keys()):
            raise ValueError(f"The model pools by {unknown[0]!r}; known here are {', '.join(_POOLINGS)}.")
        self.modes, self.first = modes, first

    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, mask = features["token_embeddings"], features["attention_mask"] != 0
        if self.first is not None:
            mask = mask & (mask.cumsum(dim=-1) <= self.first)
        precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        vectors = [_POOLINGS[mode](precise, mask).to(hidden.dtype) for mode in self.modes]
        return {**features, "sentence_embedding": torch.cat(vectors, dim=-1)}


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(dim=1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _first(hidden.flip(1), mask.flip(1))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True)


def _mean_by_root(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted_sum(hidden, mask) / mask.sum(dim=1, keepdim=True).sqrt()


def _mean_by_place(hidden: Tensor, mask: Tensor) -> Tensor:
    places = mask.cumsum(dim=1) * mask
    return _weighted_sum(hidden, places) / places.sum(dim=1, keepdim=True)


def _weighted_sum(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights[..., None].to(hidden.dtype)).sum(dim=1)


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


# sentence-transformers' names. Each takes `(n, length, dim)` and a `(n, length)` mask with a token in every row.
_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_place,
}


class _Dense:
    """A linear layer and its activation."""

    def __init__(self, folder: Path, settings: dict[str, Any], device: torch.device) -> None:
        self.linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
        weights = load_state_dict(str(folder / "model.safetensors"))
        self.linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
        self.linear.to(device).requires_grad_(False)
        self.activation = activation(settings.get("activation_function", "torch.nn.Tanh"))
        self.source = settings.get("module_input_name", "sentence_embedding")
        self.target = settings.get("module_output_name") or self.source

    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = features[self.source].to(self.linear.weight.dtype)
        return {**features, self.target: self.activation(self.linear(vectors))}


def activation(path: str | None) -> nn.Module:
    """An activation function by its name, which must be one of torch.nn; the identity where there is no name.

    Raises:
        ValueError: it is another, whose code would have to be run.
    """
    if path is None:
        return nn.Identity()
    found = getattr(nn, _class_name(path), None)
    if not path.startswith("torch.nn.") or not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"The model's activation {path!r} is not known here; expected a module of torch.nn.")
    return found()
