"""Scores that depend on the two texts' vectors alone: not on what else is scored, in which pieces, by how many threads.

A matrix product in floating point gives slightly different sums for other shapes or other threads, which would order
near ties differently and part exact duplicates. Here every dot product is added up in float64 in one order, number by
number; products of two float32 numbers are exact there. That is slow, and for the few that are left.
"""

import torch
from torch import Tensor

PRODUCTS_AT_ONCE = 2**20  # 8 MiB


def exact_scores(context: Tensor, candidates: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """Scores of `(..., s, dim)` candidates for `(..., m, dim)` contexts: `(..., s)` float32, rounded once, at the end.

    `padding`, `(..., m)`, is true where a context vector takes no part, which must come after those that do.
    """
    if context.device.type == "mps":  # has no float64
        context, candidates = context.cpu(), candidates.cpu()
    context = context.double()[..., None, :, :]
    rows = max(1, PRODUCTS_AT_ONCE // context.numel())
    dots = torch.cat(
        [_sum_by_halves(some.double()[..., None, :] * context) for some in candidates.split(rows, dim=-2)], -2
    )
    logits = dots * scale
    if padding is not None:
        logits = logits.masked_fill(padding[..., None, :].to(dots.device), -torch.inf)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return (ordered_sum(weights * dots) / ordered_sum(weights)).float()


def _sum_by_halves(terms: Tensor) -> Tensor:
    """The sum over the last axis, in place: the first half and the second, number by number, till one is left."""
    while (width := terms.shape[-1]) > 1:
        half = (width + 1) // 2
        terms[..., : width - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0]


def ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, by neighbours: an order that neither other rows nor zeros at the end change."""
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]
