"""One pass over candidates in low precision: rough scores, how far off they can be, and who cannot be excluded."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from poly_encoders.hardware import adds_bf16_in_float32, full_float32_products
from poly_encoders.scoring.bounds import BFLOAT16_STEP, DotError, lipschitz
from poly_encoders.scoring.candidates import CandidateReader, vector_norms

Precision = Literal["exact", "float32", "bfloat16"]
Workspace: TypeAlias = dict[torch.dtype, Tensor]

# Sizes on the CPU, found by trying. A piece is large, so that the few steps that follow its product weigh little;
# float32 products go by blocks within it, which stay in the cache.
DOTS_AT_ONCE = 2**24
MOST_ROWS = 65536
ROWS_TO_ROUND = 8192  # in a piece whose rounded copy is made on the way
FEWEST_ROWS = 1024
VECTORS_AT_ONCE = 2**20  # numbers of candidates gathered at a time
CLEAR = 256  # a context with more candidates in a piece that cannot be excluded wants a higher threshold
GPU_MEMORY_SHARE = 8  # a piece may take one part in eight of what is free
PAIR_BYTES = 64  # beside its dots, what a pair of context and candidate takes that cannot be excluded


class Piece:
    """Consecutive candidates of a reader on their way through a pass, `size` of them from `start` on."""

    def __init__(self, reader: CandidateReader, start: int, size: int) -> None:
        self.reader, self.start, self.size = reader, start, size
        here = slice(start, start + size)
        # (r,), once they are known
        self.norms = None if reader.prepared is None else reader.prepared.norms[here]
        self.allowed = None if reader.where is None else reader.where[here]
        self.count = size if self.allowed is None else int(self.allowed.sum())

    @functools.cached_property
    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(r, dim)` bfloat16, and the `(r,)` bounds of norms and of residuals."""
        return self.reader.rounded(self.start, self.start + self.size)


def pieces(reader: CandidateReader, *, precision: Precision, contexts: int, m: int) -> Iterator[Piece]:
    """The candidates in order, in pieces that suit the device and these contexts of m vectors."""
    if reader.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(reader.device)
        rows = max(FEWEST_ROWS, free // GPU_MEMORY_SHARE // (contexts * (4 * m + PAIR_BYTES) + 6 * reader.dim))
    else:
        is_ready = reader.prepared is not None and (precision == "exact" or reader.prepared.axes is None)
        most = MOST_ROWS if is_ready or precision == "float32" else ROWS_TO_ROUND
        rows = min(most, max(FEWEST_ROWS, DOTS_AT_ONCE // (contexts * (m + PAIR_BYTES // 4))))
    # Equal parts, but round ones: some odd numbers of rows take a product half as long again.
    rows = min(rows, math.ceil(len(reader) / max(1, math.ceil(len(reader) / rows)) / FEWEST_ROWS) * FEWEST_ROWS)
    for start in range(0, len(reader), max(1, rows)):
        yield Piece(reader, start, min(rows, len(reader) - start))


class Pairs(NamedTuple):
    """Pairs of a context and a candidate side by side, `(s,)` each, so that no step is repeated for each context."""

    which: Tensor  # the context
    candidate: Tensor
    score: Tensor
    least: Tensor  # the true score is surely as much
    most: Tensor  # and no more
    exact: Tensor  # whether the score is the true one

    def at(self, places: Tensor) -> "Pairs":
        return Pairs(*(column[places] for column in self))


class Pass:
    """Rough scores of one group of contexts with their error bounds.

    Args:
        context: `(g, m, dim)` context vectors.
        padding: `(g, m)`, true for those that take no part; `None` where all do.
        scale: Factor on the dots inside the softmax.
        precision: In float32, or else in bfloat16: `"exact"` with bounds, `"bfloat16"` without.
        workspace: Memory for products, empty at first. Fresh memory is slow to write to, so passes that take turns
            share it.
        axes: `(dim, p)` axes on which the candidates were prepared: an exact pass is of the coordinates on them, in
            float32, in place of bfloat16.
    """

    def __init__(
        self,
        context: Tensor,
        padding: Tensor | None,
        scale: float,
        precision: Precision,
        workspace: Workspace,
        axes: Tensor | None = None,
    ) -> None:
        low, bounded = precision != "float32", precision != "bfloat16"
        self.context, self.padding, self.scale, self.low, self.workspace = context, padding, scale, low, workspace
        self.axes = axes = axes if precision == "exact" else None
        if padding is not None:
            # Zeros would have the largest dot where all others are negative; another copy of a real vector has not.
            first = (~padding).int().argmax(dim=1)
            context = torch.where(padding[..., None], context.take_along_dim(first[:, None, None], dim=1), context)
        if axes is None:
            self.kept = context.to(torch.bfloat16 if low else torch.float32)
        else:
            self.kept = (context.cpu().double() @ axes.cpu().double()).float().to(context.device)
        self.columns = self.kept.flatten(0, 1).T  # (dim, g * m), or (p, g * m) on axes
        # On a CPU, products of bfloat16 come back in it.
        self.low_out = low and axes is None and context.device.type == "cpu"
        self.step = BFLOAT16_STEP if self.low_out and bounded else 0.0
        is_full = (low and axes is None) or full_float32_products(context.device)
        known = DotError(context, self.kept, is_full, axes)
        self.error: Callable[..., Tensor] = known.of if bounded else lambda norms, *others: norms * 0
        self.lipschitz = lipschitz(context.shape[1])

    def survivors(
        self, piece: Piece, threshold: Tensor, k: int, higher: Callable[[Tensor], Tensor] | None = None
    ) -> Pairs | None:
        """The pairs of context and candidate whose true score may reach the context's `(g,)` threshold, if any.

        Comparisons are turned so that a bound of infinity or NaN excludes nobody.

        Args:
            piece: The candidates.
            threshold: `(g,)`.
            k: How many are wanted.
            higher: Makes a better threshold of `(g, k)` candidates that are likely to be high; asked where many remain.
        """
        dots, norms, residuals = self._low_dots(piece) if self.low else self._dots(piece)
        dots = dots.view(piece.size, *self.kept.shape[:2])  # (r, g, m)
        largest = self._largest(dots)
        high = self._high_enough(largest, threshold, norms, residuals, piece.allowed)
        if higher is not None and piece.count >= k and int(high.sum()) > (CLEAR + k) * len(threshold):
            if piece.allowed is not None:
                lowest = -torch.inf if largest.is_floating_point() else torch.iinfo(largest.dtype).min
                largest = largest.masked_fill(~piece.allowed[:, None], lowest)
            threshold = higher(largest.T.topk(k).indices + piece.start)
            high = self._high_enough(largest, threshold, norms, residuals, piece.allowed)
        row, which = high.nonzero().unbind(1)
        if len(row) == 0:
            return None
        dots = dots[row, which].float()
        error = self.error(norms[row], None if residuals is None else residuals[row], which)
        bounded = self._bounded(dots, error + self.step * dots.abs().amax(dim=-1), which)
        possible = (~(bounded[2] < threshold[which])).nonzero().flatten()
        unknown = torch.zeros_like(row, dtype=torch.bool)
        return Pairs(which, row + piece.start, *bounded, unknown).at(possible)

    def estimates(self, which: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rough scores in float32 of `(h, c, dim)` candidates, c for each of the `(h,)` contexts, and their bounds."""
        dots = vectors.float() @ self.kept[which].transpose(1, 2)
        norms = vector_norms(vectors.flatten(0, 1), 0).view(dots.shape[:-1])
        return self._bounded(dots, self.error(norms, None, (which, None)), (which, None))

    def surely(self, reader: CandidateReader, likely: Tensor) -> Tensor:
        """What all of some `(g, k)` different candidates score at least, `(g,)`: so the k-th best of all does."""
        contexts = max(1, VECTORS_AT_ONCE // (likely.shape[1] * reader.dim))
        found = []
        for some, which in zip(
            likely.split(contexts), torch.arange(len(likely), device=likely.device).split(contexts), strict=True
        ):
            vectors = reader.take(some.flatten()).unflatten(0, some.shape)
            least = self.estimates(which, vectors)[1]
            found.append(least.nan_to_num(nan=-torch.inf, neginf=-torch.inf).amin(dim=1))
        return torch.cat(found)

    def _bounded(
        self, dots: Tensor, error: Tensor, which: Tensor | tuple[Tensor, None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of `(..., m)` dots that are off by no more than an error, and their lower and upper bounds."""
        score, slack = self._score(dots, which), self.lipschitz * error
        return score, score - slack, torch.minimum(score + slack, dots.amax(dim=-1) + error)

    def _score(self, dots: Tensor, which: Tensor | tuple[Tensor, None]) -> Tensor:
        """`sum_i softmax(scale d)_i d_i` of `(..., m)` dots with the contexts that `which` picks."""
        logits = dots if self.scale == 1.0 else dots * self.scale
        if self.padding is not None:
            logits = logits.masked_fill(self.padding[which], -torch.inf)  # below any logit, which may overflow
        return (logits.softmax(dim=-1) * dots).sum(dim=-1)

    def _largest(self, dots: Tensor) -> Tensor:
        """The largest of `(r, g, m)` dots, `(r, g)`: of bfloat16 ones the bits.

        The bits of numbers from 0 up order as integers do, which are several times faster to compare, and those of
        negative numbers are below.
        """
        return (dots.view(torch.int16) if self.low_out else dots).amax(dim=-1)

    def _high_enough(
        self,
        largest: Tensor,
        threshold: Tensor,
        norms: Tensor,
        residuals: Tensor | None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """`(r, g)`: whether the largest dot of an allowed candidate may reach the threshold, by the largest error here.

        Nearly all end here, in as few steps as can be. Of bfloat16 dots all pass a threshold that the error makes 0.
        What lies beside axes differs, so that there each has an error of its own.
        """
        if self.axes is not None and residuals is not None:
            high = ~(largest + self.error(norms[:, None], residuals[:, None]) < threshold)
        else:
            error = self.error(norms.amax(), None if residuals is None else residuals.amax())
            threshold = (threshold - error) / (1 + self.step)
            if self.low_out:
                # Lowered by a step, so that rounding the threshold does not raise it.
                least = torch.where(threshold > 0, threshold * (1 - BFLOAT16_STEP), -torch.inf).to(torch.bfloat16)
                bits = torch.where(least > 0, least.view(torch.int16), torch.iinfo(torch.int16).min)
                high = largest >= bits
            else:
                high = ~(largest < threshold)
        return high if allowed is None else high & allowed[:, None]

    def _room(self, rows: int) -> Tensor:
        """`(rows, g * m)` for the dots of so many candidates."""
        size, dtype = rows * self.columns.shape[1], self.columns.dtype
        if size > self.workspace.get(dtype, self.columns[:0]).numel():
            self.workspace[dtype] = self.columns.new_empty(size)
        return self.workspace[dtype][:size].view(rows, -1)

    def _low_dots(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        if self.axes is not None:
            rows, norms, residuals = piece.reader.of_prepared(piece.start, piece.start + piece.size)
            return torch.mm(rows, self.columns, out=self._room(piece.size)), norms, residuals
        rows, norms, residuals = piece.rounded
        if self.low_out:
            dots = torch.mm(rows, self.columns, out=self._room(piece.size))
        elif adds_bf16_in_float32(rows.device):
            dots = torch.mm(rows, self.columns, out_dtype=torch.float32)
        else:  # how other devices add up is not written down
            dots = rows.float() @ self.columns.float()
        return dots, norms, residuals

    def _dots(self, piece: Piece) -> tuple[Tensor, Tensor, None]:
        dots, norms = self._room(piece.size), []
        for start, rows in piece.reader.blocks(piece.start, piece.start + piece.size):
            torch.mm(rows.float(), self.columns, out=dots[start - piece.start :][: len(rows)])
            if piece.norms is None:  # while the block is in the cache
                norms.append(vector_norms(rows, start))
        piece.norms = torch.cat(norms) if piece.norms is None else piece.norms
        return dots, piece.norms, None
