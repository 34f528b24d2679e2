"""Scores that depend on the two texts' vectors alone: not on what else is scored, in which pieces, on which machine.

A matrix product in floating point gives slightly different sums for other shapes, other threads or other processors,
which would order near ties differently and part exact duplicates. Here vectors are cut into slices of so few bits that
their products add up without rounding in float64, in any order (Ozaki et al., "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication and its applications", Numerical Algorithms 59, 2012).
"""

import math

import torch
from torch import Tensor


class Slices:
    """`(..., dim)` vectors as a sum of two float64 parts of few bits; together 42 bits for dim = 768.

    Attributes:
        high, low: `(..., dim)`. Products of high parts, and of a high with a low part, add up exactly over dim.
    """

    def __init__(self, vectors: Tensor) -> None:
        bits = (53 - math.ceil(math.log2(max(2, vectors.shape[-1]))) - 1) // 2
        vectors = float64(vectors)
        largest = vectors.abs().amax(dim=-1, keepdim=True)
        # The power of two above it, without rounding, so that scaling by it is exact; 1 for a vector of zeros.
        power = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
        step = power * 2.0**-bits
        self.high = (vectors / step).round_().mul_(step)
        step *= 2.0**-bits
        self.low = (vectors - self.high).div_(step).round_().mul_(step)


def exact_scores(context: Slices, padding: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    """Scores of candidates for one context, rounded once, at the end.

    Args:
        context: Slices of `(m, dim)` context vectors.
        padding: `(m,)`, true where a context vector takes no part; `None` where all do.
        rows: `(s, dim)` candidate vectors of any floating dtype.
        scale: Factor on the dots inside the softmax.

    Returns:
        `(s,)` float32. Before that rounding they are within 1e-10 of the vectors' lengths multiplied.
    """
    candidates = Slices(rows)
    # Two products, as each costs more to start than to do; every one of their sums is exact.
    dots, small = (candidates.high @ torch.cat([context.high, context.low]).T).chunk(2, dim=-1)
    dots = dots + (small + candidates.low @ context.high.T)
    padding = None if padding is None else padding.to(dots.device)
    return softmax_mean(dots, padding, scale).float().to(rows.device)


def softmax_mean(dots: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """`sum_i softmax(scale d)_i d_i` of `(s, m)` dots, `(s,)`, without those that `padding`, one row or s, marks."""
    logits = dots if scale == 1.0 else dots * scale
    if padding is not None:
        logits = logits.masked_fill(padding, torch.finfo(dots.dtype).min)
    return (logits.softmax(dim=-1) * dots).sum(dim=-1)


def float64(vectors: Tensor) -> Tensor:
    """The vectors in float64: where they are, or on the CPU if their device does not have it."""
    return vectors.cpu().double() if vectors.device.type == "mps" else vectors.double()
