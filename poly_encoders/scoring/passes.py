"""One pass over candidates in low precision: rough scores, how far off they can be, and who cannot be excluded."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from poly_encoders.hardware import adds_bf16_in_float32, full_float32_products
from poly_encoders.scoring.bounds import BFLOAT16_STEP, DotError, dot_error, lipschitz
from poly_encoders.scoring.candidates import CandidateReader, PreparedCandidates, rounded, vector_norms
from poly_encoders.scoring.exact import softmax_mean

# Sizes on the CPU, found by trying. A piece is large, so that the few steps that follow its product weigh little;
# float32 products go by blocks within it, which stay in the cache.
DOTS_AT_ONCE = 2**22
MOST_ROWS = 65536
ROWS_TO_ROUND = 8192  # in a piece whose rounded copy is made on the way
FEWEST_ROWS = 1024
FIRST_ROWS = 1024  # nobody can be excluded yet, so all of them get a rough score
GROWTH = 64  # of the pieces, and of the candidates seen between two settlements
GPU_MEMORY_SHARE = 8  # a piece may take one part in eight of what is free
PAIR_BYTES = 64  # beside its dots, what a pair of context and candidate takes that cannot be excluded


class Piece:
    """Consecutive candidates on their way through a pass.

    Args:
        reader: All candidates.
        prepared: What was prepared of them, if anything.
        start, stop: Which.
    """

    def __init__(self, reader: CandidateReader, prepared: PreparedCandidates | None, start: int, stop: int) -> None:
        self.reader, self.prepared, self.start, self.size = reader, prepared, start, stop - start
        self.norms = None if prepared is None else prepared.norms[start:stop]  # (r,), once they are known

    @functools.cached_property
    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(r, dim)` bfloat16, and the `(r,)` bounds of norms and of residuals."""
        if self.prepared is None:
            return rounded(self.reader, self.start, self.start + self.size)
        here = slice(self.start, self.start + self.size)
        return self.prepared.low[here], self.prepared.norms[here], self.prepared.residuals[here]


def pieces(
    reader: CandidateReader, prepared: PreparedCandidates | None, *, low: bool, contexts: int, m: int
) -> Iterator[Piece]:
    """The candidates in order, in pieces that grow to the size that suits the device.

    Args:
        reader: The candidates.
        prepared: What was prepared of them, if anything.
        low: Whether the pass is in bfloat16.
        contexts, m: How many contexts go through the pass at once, and the vectors of each.
    """
    if reader.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(reader.device)
        rows = max(FEWEST_ROWS, free // GPU_MEMORY_SHARE // (contexts * (4 * m + PAIR_BYTES) + 6 * reader.dim))
    else:
        most = ROWS_TO_ROUND if low and prepared is None else MOST_ROWS
        rows = min(most, max(FEWEST_ROWS, DOTS_AT_ONCE // (contexts * (m + PAIR_BYTES // 4))))
    start, size = 0, min(FIRST_ROWS, rows)
    while start < len(reader):
        left = len(reader) - start
        if size == rows:  # equal parts, but round ones: some odd numbers of rows take a product half as long again
            rows = size = min(rows, math.ceil(left / math.ceil(left / rows) / FEWEST_ROWS) * FEWEST_ROWS)
        stop = start + min(size, left)
        yield Piece(reader, prepared, start, stop)
        start, size = stop, min(GROWTH * size, rows)


class Workspace:
    """Room for products, the same one again and again, because fresh memory is slow to write to."""

    def __init__(self) -> None:
        self._room: dict[torch.dtype, Tensor] = {}

    def room(self, rows: int, columns: Tensor) -> Tensor:
        """`(rows, c)` for the product with `(dim, c)` columns, of their dtype and on their device."""
        size = rows * columns.shape[1]
        if size > self._room.get(columns.dtype, columns[:0]).numel():
            self._room[columns.dtype] = columns.new_empty(size)
        return self._room[columns.dtype][:size].view(rows, columns.shape[1])


class Pass:
    """Rough scores of one group of contexts, in bfloat16 or float32, with their error bounds.

    Args:
        context: `(g, m, dim)` context vectors.
        padding: `(g, m)`, true for those that take no part; `None` where all do.
        scale: Factor on the dots inside the softmax.
        workspace: Where products go; passes that take turns may share it.
        low: In bfloat16 instead of float32.
        bounded: False to take rough scores for the true ones.
    """

    def __init__(
        self,
        context: Tensor,
        padding: Tensor | None,
        scale: float,
        workspace: Workspace,
        *,
        low: bool,
        bounded: bool = True,
    ) -> None:
        self.context, self.padding, self.scale, self.low = context, padding, scale, low
        self.workspace = workspace
        _, self.m, dim = context.shape
        if padding is not None:
            # Zeros would have the largest dot where all others are negative; another copy of a real vector has not.
            first = (~padding).int().argmax(dim=1)
            context = torch.where(padding[..., None], context.take_along_dim(first[:, None, None], dim=1), context)
        self.kept = context.to(torch.bfloat16 if low else torch.float32)
        self.columns = self.kept.reshape(-1, dim).T  # (dim, g * m)
        # On a CPU, products of bfloat16 come back in it.
        self.low_out = low and context.device.type == "cpu"
        self.step = BFLOAT16_STEP if self.low_out and bounded else 0.0
        full = low or full_float32_products(context.device)
        self.error = dot_error(context, self.kept, full_float32=full)
        if not bounded:
            self.error = DotError(*(torch.zeros_like(part) for part in self.error))
        self.lipschitz = lipschitz(self.m)

    def survivors(self, piece: Piece, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The pairs of context and candidate whose true score may reach the context's `(g,)` threshold.

        Returns:
            `(s,)` tensors: the context, the candidate's index, its rough score, and how far at most that is off; or
            `None` if there are none. Comparisons are turned so that a bound of infinity or NaN excludes nobody.
        """
        dots, norms, residuals = self._low_dots(piece) if self.low else self._dots(piece)  # dots: (r, g, m)
        row, which = self._high_enough(dots, threshold, norms, residuals).nonzero().unbind(1)
        if len(row) == 0:
            return None
        dots = dots[row, which].float()
        score = softmax_mean(dots, None if self.padding is None else self.padding[which], self.scale)
        error = self.error.of(norms[row], None if residuals is None else residuals[row], which)
        slack = self.lipschitz * (error + self.step * dots.abs().amax(dim=-1))
        possible = (~(score + slack < threshold[which])).nonzero().flatten()
        return which[possible], row[possible] + piece.start, score[possible], slack[possible]

    def _high_enough(self, dots: Tensor, threshold: Tensor, norms: Tensor, residuals: Tensor | None) -> Tensor:
        """`(r, g)`: whether the largest dot may reach the threshold, by the largest error in the piece.

        Nearly all candidates end here, so these are as few steps as can be. Where dots are bfloat16, a threshold that
        the error brings down to 0 lets all through.
        """
        error = self.error.of(norms.amax(), None if residuals is None else residuals.amax())
        threshold = (threshold - error) / (1 + self.step)
        if not self.low_out:
            return ~(dots.amax(dim=-1) < threshold)
        # The bits of numbers from 0 up order as integers do, which are several times faster to compare, and those of
        # negative numbers are below. Lowered by a step, so that rounding the threshold does not raise it.
        least = torch.where(threshold > 0, threshold * (1 - BFLOAT16_STEP), -torch.inf).to(torch.bfloat16)
        bits = torch.where(least > 0, least.view(torch.int16), torch.iinfo(torch.int16).min)
        return dots.view(torch.int16).amax(dim=-1) >= bits

    def estimates(self, which: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Rough scores in float32 of `(h, c, dim)` candidates, c for each of the `(h,)` contexts, and their slacks."""
        dots = vectors.float() @ self.kept[which].transpose(1, 2)
        score = softmax_mean(dots, None if self.padding is None else self.padding[which, None], self.scale)
        norms = vector_norms(vectors.flatten(0, 1), 0).view(score.shape)
        return score, self.lipschitz * self.error.of(norms, None, (which, None))

    def _low_dots(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        rows, norms, residuals = piece.rounded
        if self.low_out:
            dots = torch.mm(rows, self.columns, out=self.workspace.room(piece.size, self.columns))
        elif adds_bf16_in_float32(rows.device):
            dots = torch.mm(rows, self.columns, out_dtype=torch.float32)
        else:  # how other devices add up is not written down
            dots = rows.float() @ self.columns.float()
        return dots.view(piece.size, -1, self.m), norms, residuals

    def _dots(self, piece: Piece) -> tuple[Tensor, Tensor, None]:
        dots, norms = self.workspace.room(piece.size, self.columns), []
        for start, rows in piece.reader.blocks(piece.start, piece.start + piece.size):
            torch.mm(rows.float(), self.columns, out=dots[start - piece.start :][: len(rows)])
            if piece.norms is None:  # while the block is in the cache
                norms.append(vector_norms(rows, start))
        if piece.norms is None:
            piece.norms = torch.cat(norms)
        return dots.view(piece.size, -1, self.m), piece.norms, None
