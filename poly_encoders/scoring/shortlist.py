"""The few candidates that may still be among the best of their context, looked at ever more closely."""

from collections.abc import Iterator

import torch
from torch import Tensor

from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.exact import Slices, exact_scores
from poly_encoders.scoring.passes import Pass

AT_ONCE = 2**20  # numbers gathered at a time, of all contexts together
FEW = 64  # exact scores of so many, and of four times k, cost less than another look at them
LONG = 2048  # a context with more candidates than this, and than four times k, needs the next closer look


class Shortlist:
    """Estimated scores of the possible best candidates of a group of contexts, and how far off each can be.

    The pairs of context and candidate lie side by side in columns, so that no step is repeated for each context; those
    of one context always in the order of their indices.

    Args:
        closer: The group's float32 pass.
        reader: All candidates.
        k: How many are wanted.
        approximate: Take estimates for the true scores when choosing.

    Attributes:
        threshold: `(g,)`, float32. At least k candidates score that much or more, so whoever surely does not is out.
    """

    def __init__(self, closer: Pass, reader: CandidateReader, k: int, approximate: bool) -> None:
        self.closer, self.reader, self.k, self.approximate = closer, reader, k, approximate
        device, self.contexts = closer.context.device, len(closer.context)
        self.threshold = torch.full((self.contexts,), -torch.inf, dtype=torch.float32, device=device)
        self.which, self.index = (torch.empty(0, dtype=torch.int64, device=device) for _ in range(2))
        self.score, self.slack = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
        self.rough = torch.empty(0, dtype=torch.bool, device=device)  # not yet looked at in float32

    def add(self, which: Tensor, index: Tensor, score: Tensor, slack: Tensor, in_float32: bool) -> None:
        """Put `(s,)` pairs on the list, raise the thresholds, and strike out who is below them."""
        self.which, self.index = torch.cat([self.which, which]), torch.cat([self.index, index])
        self.score, self.slack = torch.cat([self.score, score]), torch.cat([self.slack, slack])
        self.rough = torch.cat([self.rough, torch.full_like(index, not in_float32, dtype=torch.bool)])
        if self.approximate:
            self._score_exactly((~self.score.isfinite()).nonzero().flatten())  # those that bfloat16 cannot hold
            self._keep_best()
            return
        if not in_float32:  # sharper estimates of the most likely give higher thresholds
            order, rank = self._ranked(self.score)
            likely = order[rank < self.k]
            self._look_closer(likely[self.rough[likely]])
        self._strike()
        if self._is_long():
            self._look_closer(self.rough.nonzero().flatten())
            self._strike()
        if self._is_long():  # near ties by the thousand
            self._score_exactly(torch.arange(len(self.index), device=self.index.device))
            self._keep_best()

    def finish(self) -> tuple[Tensor, Tensor]:
        """The k best of each context, exactly: `(g, k)` float32 scores and int64 indices."""
        if len(self.index) > self.contexts * (FEW + 4 * self.k) and not self.approximate:
            self._look_closer(self.rough.nonzero().flatten())
            self._strike()
        self._score_exactly(torch.arange(len(self.index), device=self.index.device))
        self._keep_best()
        best, _ = self._ranked(self.score)
        return self.score[best].view(self.contexts, self.k), self.index[best].view(self.contexts, self.k)

    def _is_long(self) -> bool:
        return len(self.which) > LONG and int(self.which.bincount(minlength=1).amax()) > max(LONG, 4 * self.k)

    def _look_closer(self, places: Tensor) -> None:
        """Put float32 estimates in some places of the list."""
        for here, contexts, vectors, there in self._gathered(places):
            score, slack = self.closer.estimates(contexts, vectors)
            self.score[here], self.slack[here] = score[there], slack[there]
        self.rough[places] = False

    def _score_exactly(self, places: Tensor) -> None:
        """Put exact scores in some places of the list."""
        for here, contexts, vectors, there in self._gathered(places):
            padding = None if self.closer.padding is None else self.closer.padding[contexts]
            slices = Slices(self.closer.context[contexts]), Slices(vectors)
            score = exact_scores(*slices, padding, self.closer.scale)
            self.score[here] = score.to(self.score.device)[there]
        self.slack[places] = 0
        self.rough[places] = False

    def _gathered(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
        """The candidates in some places of the list, in blocks with as many for each of some contexts.

        Yields:
            Some of the places, `(p,)`; the contexts of a block, `(h,)`; the block, `(h, c, dim)`, with zeros where a
            context has fewer than others; and where in the block each place is, two of `(p,)`.
        """
        places, rank = self._by_context(places)
        while len(places):
            contexts, row = self.which[places].unique(return_inverse=True)
            width = max(1, AT_ONCE // (len(contexts) * self.reader.dim))
            first = (rank < width).nonzero().flatten()
            there = (row[first], rank[first])
            rows = self.reader.gather(self.index[places[first]])
            block = rows.new_zeros((len(contexts), int(there[1].amax()) + 1, self.reader.dim))
            block[there] = rows
            yield places[first], contexts, block, there
            others = (rank >= width).nonzero().flatten()
            places, rank = places[others], rank[others] - width

    def _ranked(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """Places by context and then by falling score, and the rank of each within its context, 0 for the first.

        Equal scores stay in the order of their indices; NaN, of which nothing is known, comes first.
        """
        return self._by_context(score.argsort(descending=True, stable=True))

    def _by_context(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Places by context, else in the order in which they are, and the rank of each within its context."""
        rank = torch.arange(len(places), device=places.device)
        if self.contexts == 1:
            return places, rank
        places = places[self.which[places].argsort(stable=True)]
        counts = self.which[places].bincount(minlength=self.contexts)
        return places, rank - (counts.cumsum(0) - counts)[self.which[places]]

    def _strike(self) -> None:
        sure = (self.score - self.slack).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        places, rank = self._ranked(sure)
        last = places[rank == self.k - 1]  # of every context that has k
        self.threshold[self.which[last]] = torch.maximum(self.threshold[self.which[last]], sure[last])
        self._keep((~(self.score + self.slack < self.threshold[self.which])).nonzero().flatten())

    def _keep_best(self) -> None:
        """Take the scores for true, and keep the k best of each context, equal ones by their indices."""
        places, rank = self._ranked(self.score)
        last = places[rank == self.k - 1]
        self.threshold[self.which[last]] = self.score[last]
        self._keep(places[rank < self.k].sort().values)

    def _keep(self, places: Tensor) -> None:
        self.which, self.index = self.which[places], self.index[places]
        self.score, self.slack, self.rough = self.score[places], self.slack[places], self.rough[places]
