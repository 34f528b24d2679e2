"""All scores of contexts against candidates, with gradients, in little more memory than they take themselves."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from poly_encoders.modeling import check_vectors, poly_score
from poly_encoders.scoring.candidates import check_devices

# Dots held at once, 8 MiB in float32: large enough for fast products, small enough to stay in the cache.
DOTS_AT_ONCE = 2**21
VECTORS_AT_ONCE = 2**22  # numbers in the vectors of a piece, on either side: 16 MiB, copied where they are not float32


def score(
    context: Tensor, candidates: Tensor, scale: float | Tensor = 1.0, *, dots_at_once: int = DOTS_AT_ONCE
) -> Tensor:
    """`poly_score` in pieces, forward and backward: of the `(batch, n, m)` dots only a piece is held, and none is kept.

    The gradient is the closed form `d score / d d_i = w_i (1 + scale (d_i - score))` with `w = softmax(scale d)`, from
    dots computed again, so that only the inputs and the scores wait for the backward pass. It works under autocast
    (in float32) and `torch.compile`, where it is one operator. Its gradient has no gradient, and `torch.func` does not
    know it: take `poly_score` for those. A learnt scale and forward-mode derivatives go there by themselves.

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
    check_devices(context, candidates)
    check_vectors(context, candidates)
    plain = isinstance(scale, Tensor) and scale.requires_grad
    if not plain and not torch.compiler.is_compiling():
        plain = any(unpack_dual(vectors).tangent is not None for vectors in (context, candidates))
    return poly_score(context, candidates, scale) if plain else _score(context, candidates, float(scale), dots_at_once)


@torch.library.custom_op("poly_encoders::score", mutates_args=())
def _score(context: Tensor, candidates: Tensor, scale: float, dots_at_once: int) -> Tensor:
    scores = _no_scores(context, candidates)
    with torch.autocast(context.device.type, enabled=False):
        for some, y, own, rows in _groups(context, candidates, dots_at_once):
            for few, _, dots, weights in _attended(y, own, rows, scale):
                score = weights.mul_(dots).sum(dim=-1)
                scores[some, few] = score if own.dim() == 3 else score.T
    return scores


@_score.register_fake
def _no_scores(context: Tensor, candidates: Tensor, *others: Any) -> Tensor:
    return context.new_empty((context.shape[0], candidates.shape[-2]), dtype=_dtype(context, candidates))


@torch.library.custom_op("poly_encoders::score_backward", mutates_args=())
def _score_backward(
    grad: Tensor, context: Tensor, candidates: Tensor, scores: Tensor, scale: float, at_once: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of contexts and candidates, each empty where it is not wanted."""
    for_context = context.new_empty(context.shape if wanted[0] else 0)
    for_candidates = candidates.new_zeros(candidates.shape if wanted[1] else 0, dtype=scores.dtype)
    with torch.autocast(context.device.type, enabled=False):
        for some, y, own, rows in _groups(context, candidates, at_once):
            for_y = y.new_zeros(y.shape)
            for few, x, dots, weights in _attended(y, own, rows, scale):
                score, outer = scores[some, few, None], grad[some, few, None]
                if own.dim() == 2:
                    score, outer = score.transpose(0, 1), outer.transpose(0, 1)
                for_dots = dots.sub_(score).mul_(scale).add_(1).mul_(weights).mul_(outer)
                if own.dim() == 2:
                    for_dots = for_dots.flatten(1)  # (n, b * m)
                if wanted[0] and own.dim() == 2:
                    for_y.view(-1, y.shape[-1]).addmm_(for_dots.T, x)
                elif wanted[0]:
                    for_y.baddbmm_(for_dots.transpose(1, 2), x)
                if wanted[1] and own.dim() == 2:
                    for_candidates[few].addmm_(for_dots, y.flatten(0, 1))
                elif wanted[1]:
                    for_candidates[some, few] = for_dots @ y
            if wanted[0]:
                for_context[some] = for_y.to(context.dtype)
    return for_context, for_candidates.to(candidates.dtype)


@_score_backward.register_fake
def _(grad: Tensor, context: Tensor, candidates: Tensor, *others: Any) -> list[Tensor]:
    return [x.new_empty(x.shape if wanted else 0) for x, wanted in zip((context, candidates), others[-1], strict=True)]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    context, candidates, ctx.scale, ctx.dots_at_once = inputs
    ctx.save_for_backward(context, candidates, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    wanted = list(ctx.needs_input_grad[:2])
    found = _score_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.dots_at_once, wanted)
    return found[0] if wanted[0] else None, found[1] if wanted[1] else None, None, None


_score.register_autograd(_backward, setup_context=_keep)


def _groups(context: Tensor, candidates: Tensor, dots_at_once: int) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
    """Some contexts at a time: which, their vectors, their candidates, and how many of these at once.

    Of both enough for a fast product, where there are as many.
    """
    batch, m, dim = context.shape
    n, most = candidates.shape[-2], max(1, VECTORS_AT_ONCE // max(1, dim))
    contexts = max(1, min(batch, dots_at_once // max(1, m * min(n, 512)), most // max(1, m)))
    shared = candidates.dim() == 2
    rows = max(1, min(n, dots_at_once // max(1, contexts * m), most if shared else most // contexts))
    for some in _slices(batch, contexts):
        yield some, context[some].to(_dtype(context, candidates)), candidates if shared else candidates[some], rows


def _attended(
    context: Tensor, candidates: Tensor, rows: int, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Contexts against all their candidates, so many of these at a time: which, their vectors, dots and weights.

    Dots and softmax weights are `(n, batch, m)` for `(n, dim)` candidates, `(batch, n, m)` for `(batch, n, dim)`: as
    the product writes them the softmax reads them, with nothing to transpose.
    """
    padding = (context == 0).all(dim=-1)  # (batch, m)
    asking_is_cheap = padding.device.type == "cpu"  # it would stall a GPU
    for few in _slices(candidates.shape[-2], rows):
        x = candidates[..., few, :].to(context.dtype)
        if x.dim() == 2:
            dots, takes_no_part = (x @ context.flatten(0, 1).T).view(len(x), *padding.shape), padding
        else:
            dots, takes_no_part = x @ context.transpose(1, 2), padding[:, None]
        logits = dots if scale == 1.0 else dots * scale
        if not asking_is_cheap or bool(padding.any()):
            logits = logits.masked_fill(takes_no_part, torch.finfo(dots.dtype).min)
        yield few, x, dots, logits.softmax(dim=-1)


def _dtype(context: Tensor, candidates: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(context.dtype, candidates.dtype), torch.float32)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
