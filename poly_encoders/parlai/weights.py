"""ParlAI's weights as BERT's.

A ParlAI encoder of the variant `xlm` is a post-norm BERT without a pooler: LN(word + position + segment), then layers
of LN(x + attention(x)) and LN(x + ffn(x)). Every tensor keeps its values and its shape; the names differ, and so do
LayerNorm's epsilon (1e-5) and, in front and behind, two factors (on the word embeddings and on the last output).
"""

import math
import re

import torch
from torch import Tensor
from transformers import BertConfig

from poly_encoders.parlai.settings import PAIR_FRAME, Settings
from poly_encoders.parlai.tokenizer import Vocabulary

# ParlAI's name -> transformers', within the embeddings and within a layer.
_EMBEDDINGS = {
    "embeddings.weight": "word_embeddings.weight",
    "position_embeddings.weight": "position_embeddings.weight",
    "norm_embeddings.weight": "LayerNorm.weight",
    "norm_embeddings.bias": "LayerNorm.bias",
}
_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "norm2": "output.LayerNorm",
}


class Weights:
    """A state dict that is taken apart tensor by tensor, so that what nobody asked for is noticed at the end."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._left = dict(weights)

    def take(self, name: str, dimensions: int) -> Tensor:
        """Remove and return a tensor of so many dimensions, in float32; a ValueError where it is none or not finite."""
        if name not in self._left:
            raise ValueError(f"The checkpoint has no weight {name!r}. Its model and model.opt do not belong together.")
        tensor = self._left.pop(name)
        plain = tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dim() != dimensions or tensor.numel() == 0:
            raise ValueError(
                f"The checkpoint's weight {name!r} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} "
                f"({tensor.layout}, {tensor.device}); expected floating-point numbers in {dimensions} dimensions."
            )
        tensor = tensor.to(torch.float32)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The checkpoint's weight {name!r} holds NaN or infinity. Take one from before that.")
        return tensor

    def drop_copy(self, name: str, original: Tensor) -> None:
        """Remove a tensor that ParlAI saves under a second name, if it is there; a ValueError where it is another."""
        copy = self._left.pop(name, original)
        if copy.shape != original.shape or not torch.equal(copy.to(torch.float32), original):
            raise ValueError(
                f"The checkpoint's weight {name!r} should be a second name of another tensor, but differs from it: it "
                "has a part of its own, which has no place here."
            )

    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, of what is left."""
        return [name for name in self._left if name.startswith(prefix)]

    def check_empty(self) -> None:
        """Raise a ValueError that names what is left, if anything is."""
        if names := sorted(self._left):
            raise ValueError(
                f"The checkpoint has weights that have no place here: {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''} ({len(names)} in all). It is not converted, because its scores "
                "would be others without them."
            )


def take_encoder(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Take one encoder's tensors, under ParlAI's names without the prefix; a ValueError where one is missing."""
    numbers = re.findall(rf"^{prefix}\.layers\.(\d+)\.", "\n".join(weights.names(prefix)), re.MULTILINE)
    num_layers = 1 + max(map(int, numbers), default=-1)
    if num_layers == 0:
        raise ValueError(f"The checkpoint's encoder {prefix!r} has no layers. It does not belong to its model.opt.")
    shapes = dict.fromkeys(_EMBEDDINGS, 2) | {"norm_embeddings.weight": 1, "norm_embeddings.bias": 1}
    if weights.names(f"{prefix}.segment_embeddings."):
        shapes["segment_embeddings.weight"] = 2
    for layer in range(num_layers):
        for part in _LAYER:
            shapes[f"layers.{layer}.{part}.weight"] = 1 if part.startswith("norm") else 2
            shapes[f"layers.{layer}.{part}.bias"] = 1
    return {name: weights.take(f"{prefix}.{name}", dimensions) for name, dimensions in shapes.items()}


def bert_config(encoder: dict[str, Tensor], words: Vocabulary, settings: Settings) -> BertConfig:
    """One encoder's configuration, of the sizes of its tensors; a ValueError where the options name others."""
    segments = encoder.get("segment_embeddings.weight")
    sizes = {
        "embedding_size": encoder["embeddings.weight"].shape[1],
        "ffn_size": encoder["layers.0.ffn.lin1.weight"].shape[0],
        "n_layers": sum(name.endswith("norm2.weight") for name in encoder),
        "n_positions": len(encoder["position_embeddings.weight"]),
        "n_segments": 0 if segments is None else len(segments),
    }
    for name, value in settings.sizes.items():
        if sizes[name] != value:
            raise ValueError(
                f"The checkpoint's weights are made for {name}={sizes[name]}, but its options call for {name}={value}. "
                "Its model and model.opt do not belong together."
            )
    if sizes["embedding_size"] % settings.num_heads:
        raise ValueError(
            f"The checkpoint is {sizes['embedding_size']} wide, which does not divide into "
            f"n_heads={settings.num_heads}. Its model and model.opt do not belong together."
        )
    if sizes["n_positions"] < (least := PAIR_FRAME + 2 if settings.kind == "cross" else 3):
        raise ValueError(
            f"The checkpoint has positions for {sizes['n_positions']} tokens; with the start and end tokens, a text (a "
            f"pair, for a Cross-encoder) needs at least {least}. Its model and model.opt do not belong together."
        )
    return BertConfig(
        vocab_size=len(words.ids),
        hidden_size=sizes["embedding_size"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=settings.num_heads,
        intermediate_size=sizes["ffn_size"],
        hidden_act=settings.activation,
        max_position_embeddings=sizes["n_positions"],
        type_vocab_size=max(1, sizes["n_segments"]),
        layer_norm_eps=1e-5,  # BERT's own 1e-12 would move scores by 1e-4
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.attention_dropout,
        pad_token_id=words.ids[settings.null_token],
    )


def bert_weights(
    encoder: dict[str, Tensor], words: Vocabulary, settings: Settings, *, scale_output: bool = False
) -> dict[str, Tensor]:
    """One encoder's state dict for a `BertModel`, all but its pooler's; an alias has a copy of the row it stands for.

    With `scale_output`, `output_scaling` goes into the last LayerNorm, for models that have no such factor.
    """
    rows = encoder["embeddings.weight"]
    state = {f"embeddings.{theirs}": encoder[ours] for ours, theirs in _EMBEDDINGS.items()}
    # BERT always adds a segment; ParlAI as well, its first, wherever it has any.
    none = torch.zeros(1, rows.shape[1])
    state["embeddings.token_type_embeddings.weight"] = encoder.get("segment_embeddings.weight", none)
    if settings.scale_embeddings:
        rows = rows * math.sqrt(rows.shape[1])
    state["embeddings.word_embeddings.weight"] = torch.cat([rows, rows[words.alias_targets]])
    for name, tensor in encoder.items():
        if name.startswith("layers."):
            _, number, part = name.split(".", 2)
            part, kind = part.rsplit(".", 1)
            state[f"encoder.layer.{number}.{_LAYER[part]}.{kind}"] = tensor
    if scale_output:
        last = f"encoder.layer.{sum(name.endswith('norm2.weight') for name in encoder) - 1}.output.LayerNorm"
        for name in (f"{last}.weight", f"{last}.bias"):
            state[name] = state[name] * settings.output_scaling
    return state
