"""The few candidates that may still be among the best of their context."""

import torch
from torch import Tensor

from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.exact import exact_scores
from poly_encoders.scoring.passes import Pairs, Pass

AT_ONCE = 2**20  # numbers gathered at a time
LONG = 2048  # a context with more candidates than this, and than four times k, needs exact scores, which part them


class Shortlist:
    """Estimated scores of the possible best candidates of a group of contexts, and how far off each can be.

    The pairs of one context are always in the order of the candidates. A place is a position among all pairs.

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
        self.contexts = len(closer.context)
        self.threshold = torch.full((self.contexts,), -torch.inf, dtype=torch.float32, device=closer.context.device)
        none = self.threshold[:0]
        self.pairs = Pairs(none.long(), none.long(), none, none, none, none.bool())

    def raise_thresholds(self, likely: Tensor) -> Tensor:
        """The thresholds, raised to what `(g, k)` different candidates surely score, if that is higher."""
        self.threshold = torch.maximum(self.threshold, self.closer.surely(self.reader, likely))
        return self.threshold

    def add(self, found: list[Pairs]) -> None:
        """Put pairs on the list, raise the thresholds, and strike out who is below them."""
        self.pairs = Pairs(*map(torch.cat, zip(self.pairs, *found, strict=True)))
        if self.approximate:
            self._score_exactly((~self.pairs.score.isfinite()).nonzero().flatten())  # those that bfloat16 cannot hold
            self._keep_best()
            return
        self._strike()
        # What those score that look best is a better threshold than what is sure of all.
        self._score_exactly(self._ranked_first(self.pairs.score))
        self._strike()
        if self._is_long():
            self._score_exactly(self._all())
            self._keep_best()

    def finish(self) -> tuple[Tensor, Tensor]:
        """The k best of each context, exactly: `(g, k)` float32 scores and int64 indices."""
        self._score_exactly(self._all())
        self._keep_best()
        best, _ = self._ranked(self.pairs.score)
        return self.pairs.score[best].view(-1, self.k), self.pairs.candidate[best].view(-1, self.k)

    def _all(self) -> Tensor:
        return torch.arange(len(self.pairs.candidate), device=self.pairs.candidate.device)

    def _is_long(self) -> bool:
        which = self.pairs.which
        return len(which) > LONG and int(which.bincount(minlength=1).amax()) > max(LONG, 4 * self.k)

    def _score_exactly(self, places: Tensor) -> None:
        """Put exact scores in those of the places where they are not yet known."""
        places, _ = self._by_context(places[~self.pairs.exact[places]])
        counts = self.pairs.which[places].bincount(minlength=self.contexts).tolist()
        for number, own in enumerate(places.split(counts)):
            here = slice(number, number + 1)
            context = self.closer.context[here]
            padding = None if self.closer.padding is None else self.closer.padding[here]
            for some in own.split(max(1, AT_ONCE // self.reader.dim)) if len(own) else []:
                vectors = self.reader.take(self.pairs.candidate[some])[None]
                score = exact_scores(context, vectors, padding, self.closer.scale)[0]
                for column in (self.pairs.score, self.pairs.least, self.pairs.most):
                    column[some] = score
        self.pairs.exact[places] = True

    def _ranked_first(self, score: Tensor) -> Tensor:
        """Places of the k best of each context."""
        places, rank = self._ranked(score)
        return places[rank < self.k]

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
        places = places[self.pairs.which[places].argsort(stable=True)]
        which = self.pairs.which[places]
        counts = which.bincount(minlength=self.contexts)
        return places, rank - (counts.cumsum(0) - counts)[which]

    def _strike(self) -> None:
        """Raise the thresholds to what k candidates surely score, and strike out who cannot."""
        self._raise_thresholds(self.pairs.least.nan_to_num(nan=-torch.inf, neginf=-torch.inf))
        self.pairs = self.pairs.at((~(self.pairs.most < self.threshold[self.pairs.which])).nonzero().flatten())

    def _keep_best(self) -> None:
        """Take the scores for true, and keep the k best of each context, equal ones by their indices."""
        self.pairs = self.pairs.at(self._raise_thresholds(self.pairs.score).sort().values)

    def _raise_thresholds(self, score: Tensor) -> Tensor:
        """Raise them to the k-th of these scores, where there are so many; the places of the first k."""
        places, rank = self._ranked(score)
        last = places[rank == self.k - 1]
        which = self.pairs.which[last]
        self.threshold[which] = torch.maximum(self.threshold[which], score[last])
        return places[rank < self.k]
