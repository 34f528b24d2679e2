# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder's maths as functions of tensors: Humeau et al., arXiv:1905.01969, section 4.4.

    y(x)  = sum_i softmax_i(x . y_i) y_i        the candidate vector x attends over the context vectors y_i
    score = x . y(x)

y(x) is never built: with d_i = x . y_i the score is sum_i softmax(d)_i d_i. Padding is masked out of the softmax.
What is ours: a scale inside the softmax, one over a temperature, and turns in the place of codes.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers.utils.generic import maybe_autocast

from .configuration_poly_encoder import PolyEncoderConfig


def poly_score(context: Tensor, candidates: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Score every candidate against every context: `sum_i softmax(scale d)_i d_i` with `d_i = x . y_i`.

    Args:
        context: `(batch, m, dim)` context vectors. An all-zero vector is padding and takes no part.
        candidates: `(n, dim)` candidate vectors shared by the batch, or `(batch, n, dim)`, a set per context.
        scale: Factor on the dots inside the softmax: 1 for basic attention, `dim ** -0.5` for sqrt; over the model's
            temperature. `PolyEncoderModel.final_scale` has it.

    Returns:
        `(batch, n)` scores: raw dot products, unbounded, comparable only within a row. They are computed and returned
        in float32 (float64 for float64 inputs), under autocast as well: half precision would tie close candidates.

    Raises:
        ValueError: the shapes do not fit together.
    """
    dots, weights = poly_attention(context, candidates, scale)
    return (weights * dots).sum(dim=-1)


def poly_attention(context: Tensor, candidates: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
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


def turns_between(input_ids: Tensor, attention_mask: Tensor, boundaries: list[int] | None) -> Tensor:
    """The turn of each of `(batch, length)` tokens, where turns are what lies between tokens of these ids.

    Returns:
        `(batch, length)` int64: 0 for boundaries and padding, 1, 2, ... for the turns in their order.
    """
    real = attention_mask != 0
    inside = real & ~torch.isin(input_ids, torch.tensor(boundaries or [], device=input_ids.device, dtype=torch.long))
    after = ((real & ~inside).cumsum(dim=-1) + 1) * inside  # so many boundaries less one, which padding is not
    begins = inside & (after != pad(after.cummax(dim=-1).values[:, :-1], (1, 0)))
    return begins.cumsum(dim=-1) * inside


def turn_weights(turn_ids: Tensor, attention_mask: Tensor, m: int, max_length: int | None) -> tuple[Tensor, Tensor]:
    """How much of each token is in the mean of each of the last m turns.

    A turn of more than `max_length` tokens is split into as few windows as can be, of equal length but for one token,
    and each counts as one of the m. A context without a turn, as of special tokens alone, is one.

    Args:
        turn_ids: `(batch, length)` integers, growing along a row: 0 for a token in no turn, as special tokens are.
        attention_mask: `(batch, length)`, 0 for padding, on either side.
        m: How many to keep.
        max_length: Tokens in a window; no limit when left out.

    Returns:
        Weights `(batch, m, length)` of the turns in their order, all-zero behind the last one, and of the whole last
        turn, `(batch, 1, length)`: both float32, their rows of sum 1.
    """
    real = attention_mask != 0
    turns = turn_ids * real
    turns = torch.where((turns > 0).any(dim=-1, keepdim=True), turns, real.to(turns.dtype))
    inside = turns > 0
    last = inside & (turns == turns.amax(dim=-1, keepdim=True))
    begins = inside & (turns != pad(turns.cummax(dim=-1).values[:, :-1], (1, 0)))
    if max_length is not None:
        number = begins.cumsum(dim=-1)  # of the turn, 1, 2, ..., whatever the ids are
        place = inside.cumsum(dim=-1) - 1
        place = place - (place * begins).cummax(dim=-1).values  # of the token in its turn
        size = pad(torch.zeros_like(number), (0, 1)).scatter_add(-1, number, inside.long()).gather(-1, number)
        window = place * ((size + max_length - 1) // max_length) // size.clamp(min=1)
        begins = begins | (inside & (window > 0) & (window != pad(window[:, :-1], (1, 0))))
    pieces = begins.cumsum(dim=-1) * inside
    slots = pieces - (pieces.amax(dim=-1, keepdim=True) - m).clamp(min=0) - 1  # the last m have 0 to m - 1
    weights = (slots[:, None] == torch.arange(m, device=slots.device)[:, None]).float() * inside[:, None]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
    last_weights = last.float()[:, None]
    return weights, last_weights / last_weights.sum(dim=-1, keepdim=True).clamp(min=1)


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


class ReductionMixin:
    """How a Poly-encoder's hidden states become vectors, and the constants of its score; mixed into the model."""

    config: PolyEncoderConfig
    codes: Tensor
    log_temperature: Tensor
    last_turn_logit: Tensor
    training: bool

    @property
    def final_scale(self) -> float | Tensor:
        """Factor on the dots in the final attention's softmax; give it to `poly_score` for this model's vectors.

        A number; while a temperature is learnt, in training, a tensor `(1,)` with its gradient.
        """
        scale = self._scale()
        if isinstance(scale, float) or (scale.requires_grad and self.training):
            return scale
        return scale.item()

    @property
    def final_temperature(self) -> float | Tensor:
        """T of the final attention, as `config.final_temperature` or, `(1,)` float32, as it was learnt."""
        return (
            self.log_temperature.float().exp() if self.config.learn_final_temperature else self.config.final_temperature
        )

    @property
    def last_turn_share(self) -> float | Tensor:
        """How much of the last turn is in each turn's vector, as `config.last_turn_share` or as it was learnt."""
        return self.last_turn_logit.sigmoid() if self.config.learn_last_turn_share else self.config.last_turn_share

    def reduce_context(self, hidden: Tensor, attention_mask: Tensor, turn_ids: Tensor | None = None) -> Tensor:
        """Context vectors `(batch, m, dim)` from `(batch, length, dim)` hidden states, their mask and their turns."""
        if not (self.config.has_codes or self.config.has_turns):
            return self._unit(self._take_context_tokens(hidden, attention_mask))
        weights, last = self._context_weights(hidden, attention_mask, turn_ids)
        vectors = self._unit(torch.einsum("bml,bld->bmd", weights.to(hidden.dtype), hidden).to(hidden.dtype))
        if last is None:
            return vectors
        share = self.last_turn_share
        mixed = (1 - share) * vectors + share * self._unit(last.to(hidden.dtype) @ hidden)
        return mixed.masked_fill((weights == 0).all(dim=-1, keepdim=True), 0.0).to(hidden.dtype)

    def context_attention(self, hidden: Tensor, attention_mask: Tensor, turn_ids: Tensor | None = None) -> Tensor:
        """How much of each token is in each context vector; arguments as for `reduce_context`.

        Returns:
            `(batch, m, length)` weights, float32 (float64 for float64 hidden states). Each row sums to 1: over all
            tokens for learnt codes, over a turn's and the last turn's for turns (whatever the lengths of these two's
            vectors), on the one token taken for the other kinds; a row of padding is all-zero.
        """
        if not (self.config.has_codes or self.config.has_turns):
            precise = torch.promote_types(hidden.dtype, torch.float32)
            each = torch.eye(hidden.shape[1], dtype=precise, device=hidden.device).expand(len(hidden), -1, -1)
            return self._take_context_tokens(each, attention_mask)
        weights, last = self._context_weights(hidden, attention_mask, turn_ids)
        if last is None:
            return weights
        share = self.last_turn_share
        mixed = (1 - share) * weights + share * last
        return mixed.masked_fill((weights == 0).all(dim=-1, keepdim=True), 0.0)

    def _context_weights(
        self, hidden: Tensor, attention_mask: Tensor, turn_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weights `(batch, m, length)` in turns and codes, and in the last turn, where all have a share of it."""
        config, kinds, last = self.config, [], None
        if config.has_turns:
            turn_ids = torch.ones_like(attention_mask) if turn_ids is None else turn_ids
            turns, last = turn_weights(turn_ids, attention_mask, config.num_codes, config.max_turn_length)
            kinds.append(turns)
        if config.has_codes:
            kinds.append(self._code_weights(hidden, attention_mask))
        return torch.cat(kinds, dim=1), last if config.last_turn_share else None

    def _code_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        # A fresh product, so always aligned in memory: a loaded model computes bit for bit what the saved one did.
        codes = (self.codes * self._attention_scale(self.config.code_attention)).to(hidden.device, hidden.dtype)
        logits = torch.einsum("md,bld->bml", codes, hidden)
        logits = logits.masked_fill(attention_mask[:, None] == 0, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _unit(self, vectors: Tensor) -> Tensor:
        """Vectors at length 1 where the model's scores are cosines; all-zero ones, which are padding, stay."""
        if not self.config.normalize:
            return vectors
        # In half precision nothing would be divided by a length of nothing, which is NaN.
        return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1).to(vectors.dtype)

    def _take_context_tokens(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """Of `(batch, length, width)` values those of the tokens that become context vectors, `(batch, m, width)`."""
        kind, m = self.config.context_vectors, self.config.num_codes
        if kind == "first_m":
            return take_tokens(values, attention_mask, m)
        last = take_tokens(values, attention_mask, m, from_end=True)
        if kind == "last_m":
            return last
        return torch.cat([take_tokens(values, attention_mask, 1), last], dim=1)

    def reduce_candidate(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Candidate vectors `(n, dim)` from hidden states `(n, length, dim)` and their mask (section 4.2)."""
        if self.config.reduction == "first":
            return self._unit(take_tokens(hidden, attention_mask, 1)[:, 0])
        mask = attention_mask != 0
        if self.config.reduction == "first_m_mean":
            mask = mask & (mask.cumsum(dim=-1) <= self.config.num_codes)
        weights = mask[..., None].to(hidden.dtype)
        total = (hidden * weights).sum(dim=1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return self._unit((total / mask.sum(dim=-1, keepdim=True).clamp(min=1)).to(hidden.dtype))

    def _scale(self) -> float | Tensor:
        """`final_scale` as `forward` takes it: of a learnt temperature always a tensor, for which no device waits."""
        return self._attention_scale(self.config.final_attention) / self.final_temperature

    def _attention_scale(self, kind: Literal["basic", "sqrt"]) -> float:
        return self.config.hidden_size**-0.5 if kind == "sqrt" else 1.0


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
