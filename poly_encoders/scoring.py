"""Scoring many candidates with cached vectors: `poly_score` in pieces that bound its memory."""

import torch
from torch import Tensor

from poly_encoders.modeling import poly_score

# Dots held at once, 64 MiB in float32: enough for full speed, little beside the vectors themselves.
DOTS_AT_ONCE = 2**24


def score(context: Tensor, candidates: Tensor, scale: float = 1.0, *, dots_at_once: int = DOTS_AT_ONCE) -> Tensor:
    """`poly_score` over any number of contexts and shared candidates, in chunks of both.

    Args:
        context: `(batch, m, dim)` context vectors; all-zero ones are padding.
        candidates: `(n, dim)`, or `(batch, n, dim)`, on the same device.
        scale: As for `poly_score`.
        dots_at_once: Most elements of a `(batch, n, m)` piece held at a time.

    Returns:
        `(batch, n)` scores, float32, on the vectors' device. The pieces change nothing but the memory.

    Raises:
        ValueError: the shapes do not fit together, or the devices differ.
    """
    if context.device != candidates.device:
        raise ValueError(
            f"Context vectors are on {context.device}, candidate vectors on {candidates.device}. "
            "Move one of them with .to(device) first."
        )
    needs_gradient = torch.is_grad_enabled() and (context.requires_grad or candidates.requires_grad)
    fits = context.dim() == 3 and context.shape[0] * context.shape[1] * candidates.shape[-2] <= dots_at_once
    if needs_gradient or fits or context.dim() != 3 or candidates.dim() != 2 or 0 in context.shape:
        return poly_score(context, candidates, scale)
    m = context.shape[1]
    rows = max(1, min(len(candidates), dots_at_once // m))  # candidates per piece
    contexts = max(1, dots_at_once // (m * rows))
    return torch.cat(
        [
            torch.cat([poly_score(part, piece, scale) for piece in candidates.split(rows)], dim=1)
            for part in context.split(contexts)
        ]
    )
