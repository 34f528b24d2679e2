"""The few candidates that may still be among the best of one context, looked at ever more closely."""

import torch
from torch import Tensor

from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.exact import Slices, exact_scores
from poly_encoders.scoring.passes import Pass

AT_ONCE = 1024  # vectors gathered at a time
LONG = 2048  # beyond this many, and four times k, the next closer look pays


class Shortlist:
    """Estimated scores of one context's possible best candidates, with how far off each can be.

    Args:
        which: The context's place in its group.
        closer: The group's float32 pass.
        reader: All candidates.
        k: How many are wanted.
        approximate: Take estimates for the true scores when choosing.

    Attributes:
        threshold: At least k candidates score this much or more, so that whoever surely does not is out.
    """

    def __init__(self, which: int, closer: Pass, reader: CandidateReader, k: int, approximate: bool) -> None:
        self.which, self.closer, self.reader, self.k, self.approximate = which, closer, reader, k, approximate
        device = reader.device
        self.threshold = torch.tensor(-torch.inf, device=device)
        self.index = torch.empty(0, dtype=torch.int64, device=device)
        self.score, self.slack = (torch.empty(0, device=device) for _ in range(2))
        self.rough = torch.empty(0, dtype=torch.bool, device=device)  # not yet looked at in float32

    def add(self, index: Tensor, score: Tensor, slack: Tensor, in_float32: bool) -> None:
        """Put `(s,)` candidates on the list, raise the threshold, and strike out who is below it."""
        self.index, self.score = torch.cat([self.index, index]), torch.cat([self.score, score])
        self.slack = torch.cat([self.slack, slack])
        self.rough = torch.cat([self.rough, torch.full_like(index, not in_float32, dtype=torch.bool)])
        if self.approximate:
            self._keep_best()
            return
        if not in_float32:  # sharper estimates of the most likely give a higher threshold
            likely = self.score.topk(min(self.k, len(self.score))).indices
            self._look_closer(likely[self.rough[likely]])
        self._strike()
        if len(self.index) > max(LONG, 4 * self.k):
            self._look_closer(self.rough.nonzero().flatten())
            self._strike()
        if len(self.index) > max(LONG, 4 * self.k):  # near ties by the thousand
            self._score_exactly()
            self._keep_best()

    def finish(self) -> tuple[Tensor, Tensor]:
        """The k best, exactly: `(k,)` float32 scores and int64 indices."""
        if not self.approximate:
            self._look_closer(self.rough.nonzero().flatten())
            self._strike()
        self._score_exactly()
        self._keep_best()
        return self.score, self.index

    def _look_closer(self, places: Tensor) -> None:
        """Put float32 estimates in some places of the list."""
        for some in places.split(AT_ONCE):
            if len(some):
                vectors = self.reader.gather(self.index[some])
                self.score[some], self.slack[some] = self.closer.estimates(self.which, vectors)
        self.rough[places] = False

    def _strike(self) -> None:
        if len(self.index) >= self.k:
            sure = (self.score - self.slack).nan_to_num(nan=-torch.inf)
            self.threshold = torch.maximum(self.threshold, sure.topk(self.k).values[-1])
        self._keep((~(self.score + self.slack < self.threshold)).nonzero().flatten())

    def _score_exactly(self) -> None:
        context = Slices(self.closer.context[self.which])
        padding = None if self.closer.padding is None else self.closer.padding[self.which]
        parts = (self.reader.gather(some) for some in self.index.split(AT_ONCE))
        self.score = torch.cat([exact_scores(context, padding, rows, self.closer.scale) for rows in parts])
        self.slack = torch.zeros_like(self.score)
        self.rough = torch.zeros_like(self.rough)

    def _keep_best(self) -> None:
        """Take the scores for true, and keep the k best, equal ones in the order of their indices."""
        order = self.index.argsort()
        order = order[self.score[order].argsort(descending=True, stable=True)]
        self._keep(order[: self.k])
        if len(self.index) == self.k:
            self.threshold = self.score[-1]

    def _keep(self, places: Tensor) -> None:
        self.index, self.score, self.slack = self.index[places], self.score[places], self.slack[places]
        self.rough = self.rough[places]
