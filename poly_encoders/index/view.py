"""What is searched: the rows of one version, most of them in derived files, those added since in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poly_encoders.index.derived_files import Derived, derive, newest_derived
from poly_encoders.index.lance_store import ID, LanceStore
from poly_encoders.scoring import PreparedCandidates, prepare, top_k

IN_MEMORY = 65536  # rows that need no files
STALE = 10  # part of the derived rows: when more were added since, files are made again
FEW = 16384  # rows to choose from: all of them are scored sooner than a graph finds some


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


class Hits(list[dict[str, Any]]):
    """The best candidates for one context, best first: dicts of `id`, `score`, `text` and the metadata.

    Attributes:
        proven: No other candidate is better: these are what scoring all of them gives.
        looked_at: The share of the candidates that were scored.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], proven: bool, looked_at: float) -> None:
        super().__init__(rows)
        self.proven, self.looked_at = proven, looked_at


class View:
    """One version of an index, ready to be searched."""

    def __init__(self, store: LanceStore, with_graph: bool = False, show_progress_bar: bool = False) -> None:
        self.store = store
        self.row_ids = np.sort(store.row_ids())
        self.derived = self._derived(with_graph, show_progress_bar)
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

    def _derived(self, with_graph: bool, show_progress_bar: bool) -> Derived | None:
        known = newest_derived(self.store)
        if len(self.row_ids) <= IN_MEMORY:
            return known
        with_graph = with_graph or (known is not None and known.graph is not None)
        if known is not None and (known.graph is not None or not with_graph):
            both = len(np.intersect1d(known.row_ids, self.row_ids, assume_unique=True))
            recent, gone = len(self.row_ids) - both, len(known) - both
            if recent <= max(IN_MEMORY, len(known) // STALE) and gone <= len(known) // 2:
                return known
        return derive(self.store, with_graph, show_progress_bar)

    @property
    def has_graph(self) -> bool:
        """Whether an approximate search has all it needs."""
        return self.derived is None or len(self.row_ids) <= IN_MEMORY or self.derived.graph is not None

    def search(
        self,
        contexts: Tensor,
        k: int,
        *,
        scale: float,
        condition: str | None,
        approximate: bool,
        neighbours: int | None,
    ) -> list[Found]:
        """The k best rows for each of `(b, m, dim)` contexts.

        Args:
            contexts: Their vectors.
            k: How many.
            scale: The model's `final_scale`.
            condition: Which rows to choose from, in Lance's SQL; `None` for all.
            approximate: Score only what the graph finds.
            neighbours: That each context vector looks for in it.
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
        number = len(self.derived) if base_where is None else int(base_where.sum())
        if approximate and self.derived.graph is not None and number > max(FEW, k):
            base = [self._near(self.derived, context, k, scale, base_where, neighbours) for context in contexts]
        else:
            base = self._among(contexts, k, scale, self.derived.prepared, self.derived.row_ids, base_where)
        return [one.merged(other, k) for one, other in zip(base, found, strict=True)]

    def _near(
        self, derived: Derived, context: Tensor, k: int, scale: float, where: Any, neighbours: int | None
    ) -> Found:
        """The best of the rows that the graph finds for an `(m, dim)` context."""
        assert derived.graph is not None
        used = (context != 0).any(dim=1)
        places = derived.graph.nearest(context[used].numpy(), k, where, neighbours)
        if len(places) < k:  # a filter has cut the links to others
            [found] = self._among(context[None], k, scale, derived.prepared, derived.row_ids, where)
            return found
        rows = torch.from_numpy(np.array(derived.prepared.vectors[places]))
        [found] = self._among(context[None], k, scale, rows, derived.row_ids[places])
        found.proven = False
        found.looked_at = (len(places) + len(self.recent_ids)) / (len(derived) + len(self.recent_ids))
        return found

    def _among(
        self, contexts: Tensor, k: int, scale: float, candidates: Any, ids: np.ndarray, where: Any = None
    ) -> list[Found]:
        best = top_k(contexts, candidates, k, scale=scale, where=where)
        return [
            Found(ids[indices], scores)
            for indices, scores in zip(best.indices.numpy(), best.scores.numpy(), strict=True)
        ]

    def hits(self, found: list[Found]) -> list[Hits]:
        """What was found with its rows.

        Raises:
            ValueError: a row is not as it was written.
        """
        answers = []
        for one in found:
            rows = zip(self._rows(one.row_ids.tolist()), one.scores.tolist(), strict=True)
            scored = ({ID: row.pop(ID), "score": score, **row} for row, score in rows)
            answers.append(Hits(scored, one.proven, one.looked_at))
        return answers

    def _rows(self, row_ids: list[int]) -> list[dict[str, Any]]:
        others = np.array([id_ for id_ in row_ids if id_ not in self.recent_rows], dtype=np.uint64)
        found = {} if self.derived is None else dict(zip(others.tolist(), self.derived.rows.at(others), strict=True))
        for id_ in row_ids:
            if id_ in self.recent_rows:
                batch, place = self.recent_rows[id_]
                found[id_] = batch.slice(place, 1).to_pylist()[0]
        return self.store.checked([found[id_] for id_ in row_ids])
