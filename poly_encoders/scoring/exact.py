"""Scores that depend on the two texts' vectors alone: not on what else is scored, in which pieces, by how many threads.

A matrix product in floating point gives slightly different sums for other shapes or other threads, which would order
near ties differently and part exact duplicates. The score that counts is the one whose sums are added up in float64 in
one order, number by number, rounded to float32 once. A matrix product in float64 tells what that rounds to, but for
about one in ten thousand that lies so close to the middle between two float32 numbers that the order decides.
"""

import torch
from torch import Tensor

from poly_encoders.scoring.bounds import lipschitz

PRODUCTS_AT_ONCE = 2**20  # 8 MiB


def exact_scores(context: Tensor, candidates: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """Scores of `(h, s, dim)` candidates for `(h, m, dim)` contexts: `(h, s)` float32, rounded once, at the end.

    `padding`, `(h, m)`, is true where a context vector takes no part, which must come after those that do.
    """
    device = context.device
    if device.type == "mps":  # has no float64
        context, candidates = context.cpu(), candidates.cpu()
        padding = None if padding is None else padding.cpu()
    context, candidates = context.double(), candidates.double()
    padded = None if padding is None else padding[:, None]
    scores, room = _scores_and_room(context, candidates, padded, scale)
    exact = scores.float()
    doubtful = (scores - room).float() != (scores + room).float()  # NaN never equals
    for some in doubtful.nonzero().split(_rows(context)) if bool(doubtful.any()) else []:
        which, there = some.unbind(1)
        own = None if padding is None else padding[which]
        exact[which, there] = ordered_scores(context[which], candidates[which, there], own, scale).float()
    return exact.to(device)


def _scores_and_room(
    context: Tensor, candidates: Tensor, padding: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`(h, s)` float64 scores, and how far these and `ordered_scores` can be apart.

    Each has dots that are off by dim roundings of a product of two lengths, which the score follows by L(m); and
    weights that are off by those of their logit, of the exponential and of their sum, over dots that are two lengths
    apart at most (`poly_encoders.scoring.bounds`). All of it is taken twice, for both, and twice more.
    """
    dim, m = context.shape[-1], context.shape[-2]
    dots = candidates @ context.mT
    weights = _logits(dots, padding, scale).softmax(dim=-1)
    length = torch.linalg.vector_norm(candidates, dim=-1) * torch.linalg.vector_norm(context, dim=-1).amax(-1)[:, None]
    roundings = lipschitz(m) * (dim + 2) + 4 * (m + 8) + 16 * scale * length
    return (weights * dots).sum(dim=-1), length * roundings * 2.0**-51


def _rows(context: Tensor) -> int:
    return max(1, PRODUCTS_AT_ONCE // (context.shape[-1] * context.shape[-2]))


def ordered_scores(context: Tensor, candidates: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """Scores of `(s, dim)` candidates, each for its own of `(s, m, dim)` contexts: `(s,)` float64."""
    dots = _sum_by_halves(candidates[:, None] * context)
    logits = _logits(dots, padding, scale)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return ordered_sum(weights * dots) / ordered_sum(weights)


def _logits(dots: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    logits = dots * scale
    return logits if padding is None else logits.masked_fill(padding, -torch.inf)


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
