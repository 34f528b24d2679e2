"""The best of so few candidates that a call's own steps would take longer than to multiply them all."""

import torch
from torch import Tensor

from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.exact import exact_scores
from poly_encoders.scoring.passes import Pass, Piece

PAIRS = 16384  # of a context and a candidate, at most
EXACT_AT_ONCE = 1024  # candidates that a context may leave for exact scores


def best_of_few(
    context: Tensor, padding: Tensor | None, reader: CandidateReader, k: int, scale: float
) -> tuple[Tensor, Tensor] | None:
    """One float32 product, and exact scores of those that its error leaves in doubt.

    Args:
        context: `(g, m, dim)` context vectors.
        padding: `(g, m)`, true for those that take no part, which are the last; `None` where all do.
        reader: All candidates.
        k: How many, at least 1 and at most all.
        scale: Factor on the dots inside the softmax.

    Returns:
        `(g, k)` float32 scores and int64 indices; `None` where too many are in doubt, as near ties are.
    """
    sweep = Pass(context, padding, scale, "float32", {})
    nothing_yet = torch.full((len(context),), -torch.inf, device=context.device)
    pairs = sweep.survivors(Piece(reader, 0, len(reader)), nothing_yet, k, lambda likely: sweep.surely(reader, likely))
    assert pairs is not None  # the k best at least
    if len(pairs.which) > len(context) * max(EXACT_AT_ONCE, 4 * k):
        return None
    found = []
    for number, vectors in enumerate(context):
        indices = pairs.candidate[pairs.which == number]
        own = None if padding is None else padding[number]
        exact = exact_scores(vectors, reader.take(indices), own, scale).to(context.device)
        best = exact.sort(descending=True, stable=True)
        found.append((best.values[:k], indices[best.indices[:k]]))
    scores, indices = map(torch.stack, zip(*found, strict=True))
    return scores, indices
