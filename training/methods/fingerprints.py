"""Short hashes by which a run knows again what it has made before."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def hashed(parts: Iterable[Any]) -> str:
    """A hash of bytes and arrays in a row."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def weights_fingerprint(module: nn.Module) -> str:
    """A hash of a module's state."""
    tensors = sorted(module.state_dict().items())
    parts = [(name, tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()) for name, tensor in tensors]
    return hashed(part for name, content in parts for part in (name.encode(), content))
