"""Batches of texts of about one length, so that little of a batch is padding."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sentence_transformers.base.sampler import DefaultBatchSampler

# Batches sorted together: enough for equal lengths, few enough that every epoch has other batches.
BATCHES_SORTED_TOGETHER = 50


class LengthSortedBatchSampler(DefaultBatchSampler):
    """Shuffles, sorts pools of some batches by length, cuts them, and shuffles the batches.

    The order is a function of the seed and the epoch alone: a run that resumes, and a search for the rows of a batch,
    see the same batches.

    Args:
        dataset: What to sample from; only its length counts here.
        lengths: One number a row, of any unit. Rows of one length stay in random order.
        batch_size, drop_last, seed: As upstream's.
    """

    def __init__(self, dataset: Any, lengths: Sequence[float], batch_size: int, drop_last: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **kwargs)
        if len(lengths) != len(dataset):
            raise ValueError(f"There are {len(lengths)} lengths for {len(dataset)} rows; give one for each.")
        self.lengths = np.asarray(lengths)
        self.set_epoch(0)

    def __len__(self) -> int:
        batches = len(self.lengths) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng((self.seed, self.epoch))
        order = draw.permutation(len(self.lengths))
        pool, end = BATCHES_SORTED_TOGETHER * self.batch_size, len(order) - len(order) % self.batch_size
        for start in range(0, end, pool):
            piece = order[start : min(start + pool, end)]
            order[start : start + len(piece)] = piece[np.argsort(self.lengths[piece], kind="stable")]
        for number in draw.permutation(end // self.batch_size):
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
        if end < len(order) and not self.drop_last:
            yield order[end:].tolist()
