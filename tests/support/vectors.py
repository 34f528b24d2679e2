"""Contexts and candidates made to be hard to rank in low precision."""

from collections.abc import Callable

import torch
from torch import Tensor


def _halfway(candidates: Tensor) -> Tensor:
    """Numbers that rounding to bfloat16 moves as far as it can."""
    exponents = torch.randint(-3, 4, candidates.shape).float()
    return candidates.sign() * (1 + 2.0**-8 + 2.0**-20) * 2**exponents


def _lengths(n: int) -> Tensor:
    return torch.logspace(-1, 1, n)[torch.randperm(n), None]


def _spectrum(dim: int) -> Tensor:
    """Falling, so that a few coordinates hold nearly all."""
    return torch.logspace(0, -2, dim)


def _flattened(vectors: Tensor) -> Tensor:
    """Vectors that lie almost in a few of the directions, as those of real texts do."""
    rotation = torch.linalg.qr(torch.randn(vectors.shape[-1], vectors.shape[-1], generator=torch.manual_seed(7)))[0]
    return (vectors * _spectrum(vectors.shape[-1])) @ rotation.T


def _in_a_subspace(vectors: Tensor) -> Tensor:
    """Vectors in a quarter of the directions, but for rounding: beside axes nothing is left to hide behind."""
    dim = vectors.shape[-1]
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.manual_seed(7)).double())[0]
    part = max(1, dim // 4)
    return (vectors[..., :part].double() @ rotation[:part]).to(vectors.dtype)


MAKERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "normal": lambda y, x: (y, x),
    "one direction": lambda y, x: (y.abs(), x.abs()),
    "all negative": lambda y, x: (y.abs(), -x.abs()),
    "near ties": lambda y, x: (y, x[:1] + 1e-5 * x),
    "duplicates": lambda y, x: (y, x[torch.randint(0, max(1, len(x) // 8), (len(x),))]),
    "halfway between bfloat16": lambda y, x: (y, _halfway(x)),
    "long and short": lambda y, x: (y, x * _lengths(len(x)) ** 4),
    "huge": lambda y, x: (y * 1e15, x * 1e15 * _lengths(len(x))),
    "squares overflow": lambda y, x: (y * 1e-10, x * 1e25 * _lengths(len(x))),
    "tiny": lambda y, x: (y * 1e-19, x * 1e-15 * _lengths(len(x))),
    "subnormal": lambda y, x: (y, x * 1e-39 * _lengths(len(x))),
    "zeros": lambda y, x: (y, torch.where(torch.rand(len(x), 1) < 0.5, 0.0, x)),
    "few directions": lambda y, x: (_flattened(y), _flattened(x)),
    "one subspace": lambda y, x: (_in_a_subspace(y), _in_a_subspace(x)),
    "contexts beside the axes": lambda y, x: (y, x * _spectrum(x.shape[-1])),
    "same context vectors": lambda y, x: (y[:, :1].expand_as(y).clone(), x),
}
KINDS = list(MAKERS)


def vectors(kind: str, b: int, m: int, n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`(b, m, dim)` context vectors and `(n, dim)` candidates, float32, of a kind named above."""
    torch.manual_seed(seed)
    return MAKERS[kind](torch.randn(b, m, dim), torch.randn(n, dim))
