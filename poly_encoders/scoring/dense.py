"""All scores of contexts against candidates, with gradients, in little more memory than they take themselves."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from poly_encoders.modeling import check_vectors, poly_score

# Dots held at once, 8 MiB in float32: large enough for fast products, small enough to stay in the cache.
DOTS_AT_ONCE = 2**21
VECTORS_AT_ONCE = 2**22  # numbers in the vectors of a piece, on either side: 16 MiB, copied where they are not float32


def score(context: Tensor, candidates: Tensor, scale: float = 1.0, *, dots_at_once: int = DOTS_AT_ONCE) -> Tensor:
    """`poly_score` in pieces, forward and backward: of the `(batch, n, m)` dots only a piece is held, and none is kept.

    The gradient is the closed form `d score / d d_i = w_i (1 + scale (d_i - score))` with `w = softmax(scale d)`, from
    dots computed again, so that only the inputs and the scores wait for the backward pass. It works under autocast
    (in float32, as `poly_score`) and `torch.compile`, where it is one operator. Its gradient has no gradient, and
    `torch.func` does not know it: take `poly_score` for those. A scale that is learnt and forward-mode derivatives go
    to `poly_score` by themselves.

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
    if _needs_plain_form(context, candidates, scale):
        return poly_score(context, candidates, scale)
    return _score(context, candidates, float(scale), dots_at_once)


def _needs_plain_form(context: Tensor, candidates: Tensor, scale: float | Tensor) -> bool:
    if isinstance(scale, Tensor) and scale.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return False
    return any(unpack_dual(vectors).tangent is not None for vectors in (context, candidates))


@torch.library.custom_op("poly_encoders::score", mutates_args=())
def _score(context: Tensor, candidates: Tensor, scale: float, dots_at_once: int) -> Tensor:
    shared = candidates.dim() == 2
    scores = context.new_empty((len(context), candidates.shape[-2]), dtype=_dtype(context, candidates))
    contexts, rows = _piece_sizes(context, candidates, dots_at_once)
    with torch.autocast(context.device.type, enabled=False):
        for some in _slices(len(context), contexts):
            y = context[some].to(scores.dtype)  # (b, m, dim)
            for few, _, dots, weights in _attended(y, candidates if shared else candidates[some], rows, scale):
                score = weights.mul_(dots).sum(dim=-1)
                scores[some, few] = score.T if shared else score
    return scores


@_score.register_fake
def _(context: Tensor, candidates: Tensor, scale: float, dots_at_once: int) -> Tensor:
    return context.new_empty((context.shape[0], candidates.shape[-2]), dtype=_dtype(context, candidates))


@torch.library.custom_op("poly_encoders::score_backward", mutates_args=())
def _score_backward(
    gradient: Tensor,
    context: Tensor,
    candidates: Tensor,
    scores: Tensor,
    scale: float,
    dots_at_once: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of contexts and candidates, each empty where it is not wanted."""
    shared, dtype = candidates.dim() == 2, scores.dtype
    for_context = context.new_empty(context.shape if wanted[0] else 0)
    for_candidates = candidates.new_zeros(candidates.shape if wanted[1] else 0, dtype=dtype)
    contexts, rows = _piece_sizes(context, candidates, dots_at_once)
    with torch.autocast(context.device.type, enabled=False):
        for some in _slices(len(context), contexts):
            y = context[some].to(dtype)  # (b, m, dim)
            for_y = y.new_zeros(y.shape)
            for few, x, dots, weights in _attended(y, candidates if shared else candidates[some], rows, scale):
                score, outer = scores[some, few, None], gradient[some, few, None]
                if shared:
                    score, outer = score.transpose(0, 1), outer.transpose(0, 1)
                for_dots = dots.sub_(score).mul_(scale).add_(1).mul_(weights).mul_(outer)
                if shared:
                    for_dots = for_dots.flatten(1)  # (n, b * m)
                if wanted[0] and shared:
                    for_y.view(-1, y.shape[-1]).addmm_(for_dots.T, x)
                elif wanted[0]:
                    for_y.baddbmm_(for_dots.transpose(1, 2), x)
                if wanted[1] and shared:
                    for_candidates[few].addmm_(for_dots, y.flatten(0, 1))
                elif wanted[1]:
                    for_candidates[some, few] = for_dots @ y
            if wanted[0]:
                for_context[some] = for_y.to(context.dtype)
    return for_context, for_candidates.to(candidates.dtype)


@_score_backward.register_fake
def _(
    gradient: Tensor,
    context: Tensor,
    candidates: Tensor,
    scores: Tensor,
    scale: float,
    dots_at_once: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    for_context = context.new_empty(context.shape if wanted[0] else 0)
    return for_context, candidates.new_empty(candidates.shape if wanted[1] else 0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    context, candidates, ctx.scale, ctx.dots_at_once = inputs
    ctx.save_for_backward(context, candidates, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    wanted = list(ctx.needs_input_grad[:2])
    found = _score_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.dots_at_once, wanted)
    return found[0] if wanted[0] else None, found[1] if wanted[1] else None, None, None


_score.register_autograd(_backward, setup_context=_keep)


def _attended(
    context: Tensor, candidates: Tensor, rows: int, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some contexts against all candidates, so many of these at a time: which, their vectors, dots and weights."""
    for few in _slices(candidates.shape[-2], rows):
        x = candidates[..., few, :].to(context.dtype)  # (n, dim) or (batch, n, dim)
        yield few, x, *_attend(context, x, scale)


def _attend(context: Tensor, candidates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dots and softmax weights of a piece: `(n, batch, m)` for `(n, dim)` candidates, `(batch, n, m)` for their own.

    In that order the product writes them as the softmax reads them, with nothing to transpose.
    """
    batch, m, _ = context.shape
    padding = (context == 0).all(dim=-1)  # (batch, m)
    if candidates.dim() == 2:
        dots = (candidates @ context.flatten(0, 1).T).view(len(candidates), batch, m)
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
    batch, m, dim = context.shape
    n, most = candidates.shape[-2], max(1, VECTORS_AT_ONCE // max(1, dim))
    contexts = max(1, min(batch, dots_at_once // max(1, m * min(n, 512)), most // max(1, m)))
    own = 1 if candidates.dim() == 2 else contexts
    return contexts, max(1, min(n, dots_at_once // max(1, contexts * m), most // own))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
