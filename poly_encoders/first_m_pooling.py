# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The mean of the first m outputs, the paper's third reduction, as a sentence-transformers module.

sentence-transformers has no such pooling, so this file is saved beside the models that use it, and must import
nothing of poly_encoders.
"""

from typing import Any

import torch
from sentence_transformers.base.modules import Module


class FirstMMeanPooling(Module):
    """Average the first m hidden states that are not padding (Humeau et al., arXiv:1905.01969, section 4.2).

    Args:
        embedding_dimension: Width of the hidden states.
        m: How many to average; a shorter text averages all it has.
    """

    config_keys = ["embedding_dimension", "m"]  # noqa: RUF012  (upstream's form)

    def __init__(self, embedding_dimension: int, m: int) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"m must be at least 1, got {m}.")
        self.embedding_dimension = embedding_dimension
        self.m = m

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds `sentence_embedding`, `(batch, dim)`, from `token_embeddings`, `(batch, length, dim)`."""
        hidden = features["token_embeddings"]
        mask = features["attention_mask"] != 0
        mask = mask & (mask.cumsum(dim=-1) <= self.m)
        total = (hidden * mask[..., None].to(hidden.dtype)).sum(
            dim=1, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        features["sentence_embedding"] = (total / mask.sum(dim=-1, keepdim=True).clamp(min=1)).to(hidden.dtype)
        return features

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
