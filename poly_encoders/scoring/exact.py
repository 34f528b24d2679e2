"""Scores that depend on the two texts' vectors alone: not on what else is scored, in which pieces, by how many threads.

A matrix product in floating point gives slightly different sums for other shapes or other threads, which would order
near ties differently and part exact duplicates. Here vectors are cut into slices of so few bits that the products of
two slices add up without rounding in float64, in any order (Ozaki et al., "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication and its applications", Numerical Algorithms 59, 2012).
"""

import functools
import math

import torch
from torch import Tensor

MOST_SLICES = 8  # 168 bits at dim 768; two or three hold ordinary vectors


class Slices:
    """`(..., dim)` vectors as a sum of float64 parts of few bits each (21 for dim = 768), the largest first.

    As many as it takes until nothing is left of any vector, so that they are the vectors and not near them.
    """

    def __init__(self, vectors: Tensor) -> None:
        bits = (53 - math.ceil(math.log2(max(2, vectors.shape[-1]))) - 1) // 2
        rest = vectors.cpu().double() if vectors.device.type == "mps" else vectors.double()  # mps has no float64
        largest = rest.abs().amax(dim=-1, keepdim=True)
        # The power of two above it, without rounding, so that scaling by it is exact; 1 for a vector of zeros.
        step = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
        self.parts: list[Tensor] = []
        while not self.parts or (len(self.parts) < MOST_SLICES and bool(rest.any())):
            step = step * 2.0**-bits
            self.parts.append((rest / step).round_().mul_(step))
            rest = rest - self.parts[-1]


def exact_scores(context: Slices, candidates: Slices, padding: Tensor | None, scale: float) -> Tensor:
    """Scores of `(..., s, dim)` candidates for `(..., m, dim)` contexts: `(..., s)` float32, rounded once, at the end.

    `padding`, `(..., m)`, is true where a context vector takes no part, which must come after those that do.
    """
    # All slices with all in one product, and their sums from the smallest up, in an order of our own.
    s, m = candidates.parts[0].shape[-2], context.parts[0].shape[-2]
    products = torch.cat(candidates.parts, dim=-2) @ torch.cat(context.parts, dim=-2).transpose(-1, -2)
    pairs = [(i, j) for i in range(len(candidates.parts)) for j in range(len(context.parts))]
    ordered = sorted(pairs, key=sum, reverse=True)
    terms = [products[..., i * s : (i + 1) * s, j * m : (j + 1) * m] for i, j in ordered]
    dots = functools.reduce(torch.add, terms)
    logits = dots * scale
    if padding is not None:
        logits = logits.masked_fill(padding[..., None, :].to(dots.device), -torch.inf)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return (ordered_sum(weights * dots) / ordered_sum(weights)).float()


def ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, by neighbours: an order that neither other rows nor zeros at the end change."""
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]
