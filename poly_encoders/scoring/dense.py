"""All scores of contexts against candidates, with gradients, in little more memory than they take themselves."""

from typing import Any

import torch
from torch import Tensor

from poly_encoders.modeling import check_vectors

# Dots held at once, 8 MiB in float32: large enough for fast products, small enough to stay in the cache.
DOTS_AT_ONCE = 2**21


def score(context: Tensor, candidates: Tensor, scale: float = 1.0, *, dots_at_once: int = DOTS_AT_ONCE) -> Tensor:
    """`poly_score` in pieces, forward and backward: nothing of size `(batch, n, m)` is ever held or kept.

    The gradient is the closed form `d score / d d_i = w_i (1 + scale (d_i - score))` with `w = softmax(scale d)`, from
    dots computed again, so that only the inputs and the scores wait for the backward pass. It works under autocast
    (in float32, as `poly_score`) and `torch.compile`, where it is one operator, and cannot itself be differentiated.

    Args:
        context: `(batch, m, dim)` context vectors; all-zero ones are padding.
        candidates: `(n, dim)`, or `(batch, n, dim)` for candidates per context, on the same device.
        scale: As for `poly_score`.
        dots_at_once: Most dots of contexts with candidates held at a time; less memory, more steps.

    Returns:
        `(batch, n)` scores on the vectors' device: float32, float64 for float64 inputs.

    Raises:
        ValueError: the shapes do not fit together, or the devices differ.
    """
    if context.device != candidates.device:
        raise ValueError(
            f"Context vectors are on {context.device}, candidate vectors on {candidates.device}. "
            "Move one of them with .to(device) first."
        )
    check_vectors(context, candidates)
    return _score(context, candidates, float(scale), dots_at_once)


@torch.library.custom_op("poly_encoders::score", mutates_args=())
def _score(context: Tensor, candidates: Tensor, scale: float, dots_at_once: int) -> Tensor:
    shared = candidates.dim() == 2
    scores = context.new_empty((len(context), candidates.shape[-2]), dtype=_dtype(context, candidates))
    contexts, rows = _piece_sizes(context, candidates, dots_at_once)
    with torch.autocast(context.device.type, enabled=False):
        for some in _slices(len(context), contexts):
            vectors = context[some].to(scores.dtype)
            for few in _slices(candidates.shape[-2], rows):
                piece = (candidates[few] if shared else candidates[some, few]).to(scores.dtype)
                dots, weights = _attend(vectors, piece, scale)
                found = weights.mul_(dots).sum(dim=-1)
                scores[some, few] = found.T if shared else found
    return scores


@_score.register_fake
def _(context: Tensor, candidates: Tensor, scale: float, dots_at_once: int) -> Tensor:
    return context.new_empty((context.shape[0], candidates.shape[-2]), dtype=_dtype(context, candidates))


@torch.library.custom_op("poly_encoders::score_backward", mutates_args=())
def _score_backward(
    gradient: Tensor, context: Tensor, candidates: Tensor, scores: Tensor, scale: float, dots_at_once: int
) -> tuple[Tensor, Tensor]:
    shared = candidates.dim() == 2
    into_context, into_candidates = torch.empty_like(context), torch.zeros_like(candidates, dtype=scores.dtype)
    contexts, rows = _piece_sizes(context, candidates, dots_at_once)
    with torch.autocast(context.device.type, enabled=False):
        for some in _slices(len(context), contexts):
            vectors = context[some].to(scores.dtype)
            into_vectors = torch.zeros_like(vectors)
            for few in _slices(candidates.shape[-2], rows):
                piece = (candidates[few] if shared else candidates[some, few]).to(scores.dtype)
                dots, weights = _attend(vectors, piece, scale)
                found, outer = scores[some, few, None], gradient[some, few, None]
                if shared:
                    found, outer = found.transpose(0, 1), outer.transpose(0, 1)
                into_dots = dots.sub_(found).mul_(scale).add_(1).mul_(weights).mul_(outer)
                if shared:
                    into_dots = into_dots.flatten(1)  # (rows, contexts * m)
                    into_vectors.view(-1, vectors.shape[-1]).addmm_(into_dots.T, piece)
                    into_candidates[few].addmm_(into_dots, vectors.flatten(0, 1))
                else:
                    into_vectors.baddbmm_(into_dots.transpose(1, 2), piece)
                    into_candidates[some, few] = into_dots @ vectors
            into_context[some] = into_vectors.to(context.dtype)
    return into_context, into_candidates.to(candidates.dtype)


@_score_backward.register_fake
def _(
    gradient: Tensor, context: Tensor, candidates: Tensor, scores: Tensor, scale: float, dots_at_once: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(context), torch.empty_like(candidates)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    context, candidates, ctx.scale, ctx.dots_at_once = inputs
    ctx.save_for_backward(context, candidates, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_score_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.dots_at_once), None, None


_score.register_autograd(_backward, setup_context=_keep)


def _attend(context: Tensor, candidates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dots and softmax weights of a piece: `(n, batch, m)` for `(n, dim)` candidates, `(batch, n, m)` for their own.

    In that order the product writes them as the softmax reads them, with nothing to transpose.
    """
    batch, m, dim = context.shape
    padding = (context == 0).all(dim=-1)  # (batch, m)
    if candidates.dim() == 2:
        dots = (candidates @ context.reshape(-1, dim).T).view(-1, batch, m)
    else:
        dots, padding = candidates @ context.transpose(1, 2), padding[:, None]
    logits = dots if scale == 1.0 else dots * scale
    if padding.device.type != "cpu" or bool(padding.any()):  # asking would stall a GPU
        logits = logits.masked_fill(padding, torch.finfo(dots.dtype).min)
    return dots, logits.softmax(dim=-1)


def _dtype(context: Tensor, candidates: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(context.dtype, candidates.dtype), torch.float32)


def _piece_sizes(context: Tensor, candidates: Tensor, dots_at_once: int) -> tuple[int, int]:
    """Contexts and candidates of one piece: both enough for a fast product, where there are as many."""
    m, n = context.shape[1], candidates.shape[-2]
    contexts = max(1, min(len(context), dots_at_once // max(1, m * min(n, 512))))
    return contexts, max(1, min(n, dots_at_once // max(1, contexts * m)))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
