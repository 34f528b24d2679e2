"""What is searched: the rows of one version, most of them in derived files, those added since in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poly_encoders.index.cells import Cells
from poly_encoders.index.derived_files import Derived, derive, newest_derived
from poly_encoders.index.lance_store import LanceStore
from poly_encoders.scoring import PreparedCandidates, prepare, top_k

IN_MEMORY = 65536  # rows that need no files
STALE = 10  # part of the derived rows: when more were added since, files are made again
PROBES = 48  # cells that an approximate search looks into, at the least
SHARE = 1 / 32  # of all cells, where that is more
BUDGET = 4  # times as many cells, which a proof may take besides


@dataclass
class Found:
    """The best rows for one context, best first.

    Attributes:
        row_ids: `(k,)` uint64, Lance's.
        scores: `(k,)` float32.
        proven: No other rows are better: the answer is the exact one.
        looked_at: The share of the rows that were scored.
    """

    row_ids: np.ndarray
    scores: np.ndarray
    proven: bool = True
    looked_at: float = 1.0

    def merged(self, other: "Found", k: int) -> "Found":
        """The k best of both, equal ones by their ids."""
        ids, scores = np.concatenate([self.row_ids, other.row_ids]), np.concatenate([self.scores, other.scores])
        best = np.lexsort((ids, -scores))[:k]
        return Found(ids[best], scores[best], self.proven, self.looked_at)


class View:
    """One version of an index, ready to be searched."""

    def __init__(self, store: LanceStore, with_cells: bool = False, show_progress_bar: bool = False) -> None:
        self.store = store
        self.row_ids = np.sort(store.row_ids())
        self.derived = self._derived(with_cells, show_progress_bar)
        base = self.row_ids[:0] if self.derived is None else self.derived.row_ids
        alive = np.isin(base, self.row_ids)
        self.where = None if alive.all() else alive  # of the derived rows, those that are still there
        self.recent_ids = np.setdiff1d(self.row_ids, base, assume_unique=True)
        rows = np.empty((len(self.recent_ids), store.settings.dim), dtype=store.settings.dtype)
        for some, vectors in store.vectors(self.recent_ids):
            rows[np.searchsorted(self.recent_ids, some)] = vectors
        self.recent: PreparedCandidates = prepare(torch.from_numpy(rows))
        self.recent_rows = {
            row_id: (batch, place)
            for ids, batch in store.rows(self.recent_ids)
            for place, row_id in enumerate(ids.tolist())
        }

    def _derived(self, with_cells: bool, show_progress_bar: bool) -> Derived | None:
        known = newest_derived(self.store)
        if len(self.row_ids) <= IN_MEMORY:
            return known
        with_cells = with_cells or (known is not None and known.cells is not None)
        if known is not None and (known.cells is not None or not with_cells):
            both = len(np.intersect1d(known.row_ids, self.row_ids, assume_unique=True))
            recent, gone = len(self.row_ids) - both, len(known) - both
            if recent <= max(IN_MEMORY, len(known) // STALE) and gone <= len(known) // 2:
                return known
        return derive(self.store, with_cells, show_progress_bar)

    @property
    def has_cells(self) -> bool:
        """Whether an approximate search finds fewer rows to look at than there are."""
        return self.derived is None or self.derived.cells is not None

    def search(
        self, contexts: Tensor, k: int, *, scale: float, condition: str | None, cells: int | None, certify: bool
    ) -> list[Found]:
        """The k best rows for each of `(b, m, dim)` contexts.

        Args:
            contexts: Their vectors.
            k: How many.
            scale: The model's `final_scale`.
            condition: Which rows to choose from, in Lance's SQL; `None` for all.
            cells: Look into so many of the cells; `None` for all, which is exact.
            certify: Look into more, until the answer is proven or the budget is spent.
        """
        base_where, recent_where = self.where, None
        if condition is not None:
            matched = self.store.row_ids(condition)
            base_where = None if self.derived is None else np.isin(self.derived.row_ids, matched)
            recent_where = np.isin(self.recent_ids, matched)
        contexts = contexts.float().cpu()
        found = self._among(contexts, k, scale, self.recent, self.recent_ids, recent_where)
        if self.derived is None:
            return found
        where = None if base_where is None else torch.from_numpy(base_where)
        if cells is None or self.derived.cells is None:
            base = self._among(contexts, k, scale, self.derived.prepared, self.derived.row_ids, where)
            return [one.merged(other, k) for one, other in zip(base, found, strict=True)]
        return [
            self._in_cells(self.derived, self.derived.cells, context, k, scale, where, cells, certify, recent)
            for context, recent in zip(contexts, found, strict=True)
        ]

    def _in_cells(
        self,
        derived: Derived,
        cells: Cells,
        context: Tensor,
        k: int,
        scale: float,
        where: Tensor | None,
        number: int,
        certify: bool,
        found: Found,
    ) -> Found:
        """The best of the rows in the cells that look best, and of those found already."""
        score, highest = cells.scores(context, scale)
        left = score.argsort(descending=True).numpy()
        allowed = min(len(left), number * (1 + BUDGET if certify else 1))
        looked_at = done = 0
        while True:
            some, left = left[:number], left[number:]
            done += len(some)
            ranges = cells.ranges(some)
            looked_at += sum(stop - start for start, stop in ranges)
            [more] = self._among(context[None], k, scale, derived.prepared, derived.row_ids, where, ranges)
            found = more.merged(found, k)
            least = float(found.scores[-1]) if len(found.scores) == k > 0 else -np.inf
            left = left[~(highest[left] < least).numpy()]  # these alone may hold a better one
            if len(left) == 0 or not certify or done >= allowed:
                break
            number = min(number, allowed - done)
        found.proven = len(left) == 0
        found.looked_at = (looked_at + len(self.recent_ids)) / max(1, len(derived) + len(self.recent_ids))
        return found

    def _among(
        self, contexts: Tensor, k: int, scale: float, candidates: Any, ids: np.ndarray, where: Any, ranges: Any = None
    ) -> list[Found]:
        best = top_k(contexts, candidates, k, scale=scale, where=where, ranges=ranges)
        return [
            Found(ids[indices], scores)
            for indices, scores in zip(best.indices.numpy(), best.scores.numpy(), strict=True)
        ]

    def rows(self, row_ids: np.ndarray) -> list[dict[str, Any]]:
        """The `id`, `text` and metadata of some rows.

        Raises:
            ValueError: one is not as it was written.
        """
        known = {id_: self.recent_rows[id_] for id_ in row_ids.tolist() if id_ in self.recent_rows}
        found = {id_: batch.slice(place, 1).to_pylist()[0] for id_, (batch, place) in known.items()}
        others = np.array([id_ for id_ in row_ids.tolist() if id_ not in known], dtype=np.uint64)
        if self.derived is not None:
            found |= zip(others.tolist(), self.derived.rows.at(others), strict=True)
        return self.store.checked([dict(found[id_]) for id_ in row_ids.tolist()])


def default_cells(number: int) -> int:
    """How many of so many cells to look into."""
    return min(number, max(PROBES, round(number * SHARE)))
