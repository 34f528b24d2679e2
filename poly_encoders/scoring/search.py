"""The best of very many candidates: a cheap pass over all, and exact scores for the few that it cannot exclude."""

import math
from collections.abc import Iterator
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from poly_encoders.hardware import has_fast_bf16
from poly_encoders.scoring.candidates import CandidateReader, PreparedCandidates, check_devices, is_float
from poly_encoders.scoring.few import PAIRS, best_of_few
from poly_encoders.scoring.passes import Pairs, Pass, Piece, Precision, Workspace, pieces
from poly_encoders.scoring.shortlist import Shortlist

CONTEXT_VECTORS_AT_ONCE = 2048  # columns of one matrix product: more gain nothing, and take memory
GROWTH = 64  # of the candidates seen between two settlements
RAISING = 4  # the same, of their own likely candidates raising the thresholds
WAITING = 2**18  # pairs of context and candidate found and not yet on a shortlist


class TopK(NamedTuple):
    """The best candidates of each context, best first, equal scores in the order of their indices."""

    scores: Tensor  # (batch, k) float32
    indices: Tensor  # (batch, k) int64


def top_k(
    context: Tensor | np.ndarray,
    candidates: PreparedCandidates | Tensor | np.ndarray,
    k: int,
    *,
    precision: Precision | None = None,
    scale: float = 1.0,
    where: Tensor | np.ndarray | None = None,
    show_progress_bar: bool = False,
) -> TopK:
    """The k best candidates for every context, without ever holding all scores.

    `"exact"` and `"float32"` give the same answer to the last bit: the best k by the score computed in float64 and
    rounded to float32, equal ones by index, whatever the pieces and the threads. They differ in the cheap pass over all
    that finds who can be among them: after one in bfloat16, or on the axes of prepared candidates,
    `poly_encoders.scoring.bounds` proves of those left out that they cannot, and where it proves that of fewer than
    nine in ten, float32 takes over. `"bfloat16"` is approximate: its pass alone decides which k are returned, so one
    close to the last place may be missing; their scores and order are exact.

    Each call costs a millisecond or two beside its pass. It is for a small k: for all of the candidates in order take
    `PolyEncoder.similarity` and a sort.

    Args:
        context: `(batch, m, dim)` context vectors; all-zero ones are padding. With m = 1 this is the exact search of a
            Bi-encoder.
        candidates: `(n, dim)`: a tensor on the contexts' device, a numpy or memory-mapped array, which is read in
            pieces, or what `prepare` made of either, which makes a cheaper pass.
        k: How many; all where there are fewer.
        precision: `"exact"` by default where the device has fast bfloat16 or candidates are prepared on axes, else
            `"float32"`.
        scale: The model's `final_scale`: 1 for basic attention.
        where: `(n,)` booleans: which candidates to choose from.
        show_progress_bar: Show one.

    Returns:
        `(batch, min(k, n))` scores and indices on the contexts' device.

    Raises:
        TypeError: vectors that are not of floating-point numbers, or a k that is no whole number.
        ValueError: shapes or devices that do not fit together, NaN or infinity in the vectors, scores that overflow
            float32, a negative k, a scale that is not positive, an unknown precision, another `where`.
    """
    context = _checked_context(context)
    # An array is on no device: its pieces go where the contexts are.
    reader = CandidateReader(candidates, context.device if isinstance(candidates, np.ndarray) else None, where)
    k = _checked(context, reader, k, scale, precision)
    number = len(reader) if reader.where is None else int(reader.where.sum())
    k = min(k, number)
    if k == 0 or len(context) == 0:
        scores = torch.zeros((len(context), k), dtype=torch.float32, device=context.device)
        return TopK(scores, scores.to(torch.int64))
    if precision is None:
        has_axes = reader.prepared is not None and reader.prepared.axes is not None
        precision = "exact" if has_axes or has_fast_bf16(context.device) else "float32"
    with torch.no_grad(), torch.autocast(context.device.type, enabled=False):  # the bounds know nothing of it
        context, padding = _padding_last(context)
        best = None
        if number * len(context) <= PAIRS and precision != "bfloat16":
            among = None if reader.where is None else reader.where.nonzero().flatten()
            best = best_of_few(context, padding, reader, among, k, scale)
        found = TopK(*(best or _best_of_many(context, padding, reader, k, scale, precision, show_progress_bar)))
    if not bool(found.scores.isfinite().all()):
        raise ValueError(
            "Scores overflow float32, so they cannot be ranked: the vectors are too long. Encode them again, or scale "
            "contexts and candidates down."
        )
    return found


def _best_of_many(
    context: Tensor,
    padding: Tensor | None,
    reader: CandidateReader,
    k: int,
    scale: float,
    precision: Precision,
    show_progress_bar: bool,
) -> Iterator[Tensor]:
    """Scores and indices, `(batch, k)` each, after a pass over all in pieces."""
    workspace: Workspace = {}
    contexts = min(len(context), max(1, CONTEXT_VECTORS_AT_ONCE // context.shape[1]))
    splits = [None] * len(context) if padding is None else padding.split(contexts)
    groups = [
        _Search(part, known, reader, k, scale, precision, workspace)
        for part, known in zip(context.split(contexts), splits, strict=False)
    ]
    with tqdm(total=len(reader), desc="Ranking", unit="candidate", disable=not show_progress_bar) as bar:
        for piece in pieces(reader, precision=precision, contexts=contexts, m=context.shape[1]):
            for group in groups:
                group.look_at(piece)
            bar.update(piece.size)
        return map(torch.cat, zip(*map(_Search.finish, groups), strict=True))


class _Search:
    """One group of `(g, m, dim)` contexts on its way through the candidates; groups take turns in one workspace."""

    def __init__(
        self,
        context: Tensor,
        padding: Tensor | None,
        reader: CandidateReader,
        k: int,
        scale: float,
        precision: Precision,
        room: Workspace,
    ) -> None:
        axes = None if reader.prepared is None else reader.prepared.axes
        self.approximate = precision == "bfloat16"
        self.float32 = Pass(context, padding, scale, "float32", room)
        self.usual = self.float32 if precision == "float32" else Pass(context, padding, scale, precision, room, axes)
        self.shortlist = Shortlist(self.float32, reader, k, self.approximate)
        self.found: list[Pairs] = []
        self.seen = self.seen_when_settled = self.seen_when_raised = 0

    def look_at(self, piece: Piece) -> None:
        """Sweep over a piece of the candidates, and note who may be among the best."""
        higher = None
        if not self.approximate and self.seen >= RAISING * self.seen_when_raised:
            higher, self.seen_when_raised = self.shortlist.raise_thresholds, self.seen + piece.size
        found = self.usual.survivors(piece, self.shortlist.threshold, self.shortlist.k, higher)
        self.found += [] if found is None else [found]
        self.seen += piece.size
        # Thresholds rise ever more slowly: it is enough to raise them when that many times more candidates were seen.
        if self.seen >= GROWTH * self.seen_when_settled or self._waiting() > WAITING:
            self._settle()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Scores and indices, once all candidates were looked at."""
        self._settle()
        return self.shortlist.finish()

    def _waiting(self) -> int:
        return sum(len(pairs.which) for pairs in self.found)

    def _settle(self) -> None:
        """Put those found on the shortlist, which raises the thresholds."""
        if not self.found:
            return
        looked_at = (self.seen - self.seen_when_settled) * self.shortlist.contexts
        if self.seen_when_settled and not self.approximate and self._waiting() > looked_at // 10:
            self.usual = self.float32  # the cheaper pass excludes too little to be worth it
        self.shortlist.add(self.found)
        self.found, self.seen_when_settled = [], self.seen


def _padding_last(context: Tensor) -> tuple[Tensor, Tensor | None]:
    """`(b, m, dim)` vectors with the padding behind the others, where it changes no sum, and `(b, m)` where it is.

    Fewer than m where all have padding, as where no context has so many turns.
    """
    padding = (context == 0).all(dim=-1)
    if not bool(padding.any()):
        return context, None
    padding &= ~padding.all(dim=-1, keepdim=True)  # nothing but zeros is no padding: every score is 0
    padding, order = padding.int().sort(dim=1, stable=True)
    longest = int((padding == 0).sum(dim=1).amax())
    context = context.take_along_dim(order[:, :longest, None], dim=1)
    return context, padding[:, :longest].bool() if bool(padding[:, :longest].any()) else None


def _checked_context(context: Tensor | np.ndarray) -> Tensor:
    if isinstance(context, np.ndarray) and is_float(context):
        context = torch.from_numpy(np.array(context, dtype=context.dtype.newbyteorder("=")))
    if not isinstance(context, Tensor) or not context.is_floating_point():
        what = context.dtype if isinstance(context, Tensor | np.ndarray) else f"a {type(context).__name__}"
        raise TypeError(f"Context vectors are {what}; expected a tensor or numpy array of floating-point numbers.")
    if context.dim() != 3 or 0 in context.shape[1:]:
        raise ValueError(
            f"Context vectors have shape {tuple(context.shape)}; expected (batch, m, dim), as encode_query gives it. "
            "For a single context of shape (m, dim) pass context[None]."
        )
    if len(context) and not bool(context.abs().amax().isfinite()):
        raise ValueError(
            "The context vectors hold NaN or infinity, so nothing can be ranked. Encode the contexts again."
        )
    return context.detach()


def _checked(context: Tensor, candidates: CandidateReader, k: int, scale: float, precision: str | None) -> int:
    """k, at most the number of candidates."""
    if context.shape[-1] != candidates.dim:
        raise ValueError(
            f"Context vectors are {context.shape[-1]} wide, candidate vectors {candidates.dim}; they must match. "
            "Encode both with one model, or rebuild the candidate cache."
        )
    check_devices(context, candidates)
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a whole number, got {k!r}.")
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}.")
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale!r}; take the model's final_scale.")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision is one of {', '.join(get_args(Precision))}, not {precision!r}.")
    return min(int(k), len(candidates))
