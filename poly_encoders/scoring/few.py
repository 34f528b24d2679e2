"""The best of so few candidates that a call's own steps would take longer than to multiply them all."""

import torch
from torch import Tensor

from poly_encoders.hardware import full_float32_products
from poly_encoders.scoring.bounds import DotError, lipschitz
from poly_encoders.scoring.candidates import CandidateReader, vector_norms
from poly_encoders.scoring.exact import exact_scores

PAIRS = 16384  # of a context and a candidate, at most
EXACT_AT_ONCE = 1024  # candidates that a context may leave for exact scores


def best_of_few(
    context: Tensor, padding: Tensor | None, reader: CandidateReader, among: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor] | None:
    """One float32 product, and exact scores of those that its error leaves in doubt.

    Args:
        context: `(g, m, dim)` context vectors.
        padding: `(g, m)`, true for those that take no part, which are the last; `None` where all do.
        reader: All candidates.
        among: `(n,)`, those to choose from, ascending; `None` for all.
        k: How many, at least 1 and at most n.
        scale: Factor on the dots inside the softmax.

    Returns:
        `(g, k)` float32 scores and int64 indices; `None` where too many are in doubt, as near ties are.
    """
    contexts, m, dim = context.shape
    rows = reader.take(slice(0, len(reader)) if among is None else among)
    known_norms = None if reader.prepared is None or among is not None else reader.prepared.norms
    longest = (vector_norms(rows, 0) if known_norms is None else known_norms).amax()
    dots = (rows.float() @ context.float().view(-1, dim).T).view(-1, contexts, m).transpose(0, 1)  # (g, n, m)
    logits = dots * scale
    if padding is not None:
        logits = logits.masked_fill(padding[:, None], -torch.inf)
    scores = (logits.softmax(dim=-1) * dots).sum(dim=-1)
    known = DotError(context, context, full_float32_products(context.device))
    # Of the k that look best each scores surely no less than the last of them looks, but for the error; the others have
    # an error of their own. Comparisons are turned so that infinity or NaN excludes nobody.
    least = scores.topk(k).values[:, -1] - 2 * lipschitz(m) * known.of(longest)
    possible = ~(scores < least[:, None])
    if int(possible.sum(dim=1).amax()) > max(EXACT_AT_ONCE, 4 * k):
        return None
    found = []
    for number, own in enumerate(possible):
        indices, here = own.nonzero().flatten(), slice(number, number + 1)
        exact = exact_scores(context[here], rows[indices][None], None if padding is None else padding[here], scale)[0]
        best = exact.sort(descending=True, stable=True)
        found.append((best.values[:k], indices[best.indices[:k]]))
    best_scores, indices = map(torch.stack, zip(*found, strict=True))
    return best_scores, indices if among is None else among[indices]
