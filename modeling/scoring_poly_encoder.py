# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder's maths as functions of tensors: Humeau et al., arXiv:1905.01969, section 4.4.

    y(x)  = sum_i softmax_i(x . y_i) y_i        the candidate vector x attends over the context vectors y_i
    score = x . y(x)

y(x) is never built: with d_i = x . y_i the score is sum_i softmax(d)_i d_i. Padding is masked out of the softmax.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast


def poly_score(context: Tensor, candidates: Tensor, scale: float = 1.0) -> Tensor:
    """Score every candidate against every context: `sum_i softmax(scale d)_i d_i` with `d_i = x . y_i`.

    Args:
        context: `(batch, m, dim)` context vectors. An all-zero vector is padding and takes no part.
        candidates: `(n, dim)` candidate vectors shared by the batch, or `(batch, n, dim)`, a set per context.
        scale: Factor on the dots inside the softmax: 1 for basic attention, `dim ** -0.5` for sqrt.

    Returns:
        `(batch, n)` scores: raw dot products, unbounded, comparable only within a row. They are computed and returned
        in float32 (float64 for float64 inputs), under autocast as well: half precision would tie close candidates.

    Raises:
        ValueError: the shapes do not fit together.
    """
    dots, weights = poly_attention(context, candidates, scale)
    return (weights * dots).sum(dim=-1)


def poly_attention(context: Tensor, candidates: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `poly_score` is made of, arguments and errors as there.

    Returns:
        The dots `d_i = x . y_i` and their weights `softmax(scale d)`, 0 for padding: both `(batch, n, m)`, float32
        (float64 for float64 inputs).
    """
    check_vectors(context, candidates)
    with maybe_autocast(device_type=context.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(context.dtype, candidates.dtype), torch.float32)
        context, candidates = context.to(dtype), candidates.to(dtype)
        if candidates.dim() == 2:
            # One flat product, as in poly_encoders.scoring, so that both give the same bits.
            dots = (candidates @ context.flatten(0, 1).T).unflatten(1, context.shape[:2]).transpose(0, 1)
        else:
            dots = torch.einsum("bmd,bnd->bnm", context, candidates)
        padding = (context == 0).all(dim=-1)[:, None]  # (batch, 1, m)
        weights = (dots * scale).masked_fill(padding, torch.finfo(dtype).min).softmax(dim=-1)
    return dots, weights


def check_vectors(context: Tensor, candidates: Tensor) -> None:
    """Raise a ValueError that says what is wrong with the shapes, if they are not as `poly_score` takes them."""
    if context.dim() != 3 or candidates.dim() not in (2, 3):
        raise ValueError(
            f"Context vectors have shape {tuple(context.shape)}, candidate vectors {tuple(candidates.shape)}; expected "
            "(batch, m, dim) and (n, dim) or (batch, n, dim). Encode contexts with get_context_features (encode_query) "
            "and candidates with get_candidate_features (encode_document)."
        )
    if context.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"Context vectors are {context.shape[-1]} wide, candidate vectors {candidates.shape[-1]}; they must match. "
            "Encode both with one model, or rebuild the candidate cache."
        )
    if candidates.dim() == 3 and context.shape[0] != candidates.shape[0]:
        raise ValueError(
            f"There are {context.shape[0]} contexts but {candidates.shape[0]} sets of candidates. Pass one set per "
            "context, (batch, n, dim), or one set for all of them, (n, dim)."
        )


def padding_last(attention_mask: Tensor) -> Tensor | None:
    """`(n, length)` positions that put padding behind the tokens; `None` where it is there, as far as that is known."""
    asking_is_cheap = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()  # else it would stall
    real = attention_mask != 0
    if asking_is_cheap and bool((real[:, :-1] >= real[:, 1:]).all()):
        return None
    return torch.argsort(real, dim=-1, descending=True, stable=True)


def reordered(tensor: Tensor, order: Tensor) -> Tensor:
    """`(n, length, ...)` values in the order of `(n, length)` positions."""
    index = order.to(tensor.device).reshape(*order.shape, *[1] * (tensor.dim() - 2))
    return tensor.take_along_dim(index, dim=1)


def reordered_twice(attention: Tensor, order: Tensor) -> Tensor:
    """`(n, heads, length, length)` attention in the order of `(n, length)` positions; of a window, the rows alone."""
    order = order.to(attention.device)
    rows = attention.take_along_dim(order[:, None, :, None], dim=2)
    return rows.take_along_dim(order[:, None, None, :], dim=3) if rows.shape[2] == rows.shape[3] else rows


def take_tokens(hidden: Tensor, attention_mask: Tensor, m: int, from_end: bool = False) -> Tensor:
    """The first or last m hidden states that are not padding, in order: `(batch, m, dim)`, all-zero where none is left.

    Works for padding on either side, and of any size.
    """
    real = attention_mask != 0
    lengths = real.sum(dim=-1, keepdim=True)  # (batch, 1)
    order = torch.argsort(real, dim=-1, descending=True, stable=True)  # positions, real tokens first
    rank = torch.arange(m, device=hidden.device)[None]  # (1, m)
    start = (lengths - m).clamp(min=0) if from_end else torch.zeros_like(lengths)
    index = order.gather(1, (rank + start).clamp(max=hidden.shape[1] - 1))
    taken = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return taken.masked_fill((rank >= lengths)[..., None], 0.0)


def refuse_nonfinite(numbers: Tensor) -> None:
    """Let no NaN and no infinity pass.

    Raises:
        ValueError: there is one.
    """
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            "The model gave numbers that are NaN or infinite: its weights are broken, or overflow in this "
            "precision. Load a good checkpoint, or use float32."
        )


def best_first(scores: Tensor, top_k: int | None = None) -> list[tuple[int, float]]:
    """The best of `(n,)` scores with their positions, best first, equal ones in the order given.

    Score every different text once, and give each of its places that score: of equal rows, a matrix product may make
    numbers that differ in the last bit.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    refuse_nonfinite(scores)
    values, order = scores.sort(descending=True, stable=True)
    return list(zip(order.tolist(), values.tolist(), strict=True))[:top_k]
