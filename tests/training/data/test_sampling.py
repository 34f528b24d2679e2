"""Length-sorted batches: every row once, little padding, the same again for a seed and an epoch."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from poly_encoders.training.data.collators import row_lengths, text_length
from poly_encoders.training.data.sampling import LengthSortedBatchSampler


def sampler(lengths, batch_size=4, drop_last=False, seed=0):
    return LengthSortedBatchSampler(range(len(lengths)), lengths, batch_size, drop_last, seed=seed)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_every_row_once(lengths, batch_size, drop_last, epoch):
    batches_of = sampler(lengths, batch_size, drop_last)
    batches_of.set_epoch(epoch)
    batches = list(batches_of)
    assert len(batches) == len(batches_of)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    if drop_last:
        assert all(len(batch) == batch_size for batch in batches)
        assert len(lengths) - len(rows) < batch_size
    else:
        assert sorted(rows) == list(range(len(lengths)))
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_hold_rows_of_about_one_length():
    lengths = np.random.default_rng(0).integers(1, 500, 4000).tolist()
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in sampler(lengths, 16)]
    assert np.mean(spread) < 50  # unsorted: some 440
    order = [np.mean([lengths[row] for row in batch]) for batch in sampler(lengths, 16)]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3  # and the batches come in no order


def test_seed_and_epoch_say_it_all():
    lengths = list(range(40))
    first, again, other = sampler(lengths), sampler(lengths), sampler(lengths, seed=1)
    assert list(first) == list(first) == list(again)
    assert list(first) != list(other)
    first.set_epoch(1)
    assert list(first) != list(again)


def test_lengths_of_all_forms_of_context():
    data = Dataset.from_dict({"context": [["abc", "de"], ["f" * 90]], "reply": ["gh", "i" * 70]})
    assert row_lengths(data, (10, 20)) == [7, 30]
    assert text_length([{"role": "user", "content": "abc"}]) == 3
    with pytest.raises(ValueError, match="1 lengths for 2 rows"):
        LengthSortedBatchSampler(range(2), [1], 2, False)
