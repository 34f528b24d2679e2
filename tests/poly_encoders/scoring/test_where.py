"""`top_k` among some of the candidates."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders.scoring import passes, prepare, search, top_k
from vectors import KINDS, vectors


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    form=st.sampled_from([None, "bfloat16", "axes"]),
    precision=st.sampled_from(["exact", "float32"]),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    few=st.booleans(),
)
def test_it_is_as_if_the_others_were_not_there(kind, seed, form, precision, share, few):
    context, candidates = vectors(kind, b=3, m=5, n=200, dim=16, seed=seed)
    where = torch.rand(200, generator=torch.manual_seed(seed)) < share
    places = where.nonzero().flatten()
    expected = top_k(context, candidates[places], 10)
    held = prepare(candidates, form=form) if form else candidates
    pairs = search.PAIRS if few else 0
    with (
        mock.patch.multiple(passes, FEWEST_ROWS=2, MOST_ROWS=7, ROWS_TO_ROUND=7, CLEAR=3),
        mock.patch.object(search, "PAIRS", pairs),
    ):
        found = top_k(context, held, 10, precision=precision, where=where)
    assert torch.equal(found.indices, places[expected.indices])
    assert torch.equal(found.scores, expected.scores)


def test_a_choice_that_makes_no_sense_is_refused():
    context, candidates = torch.randn(1, 2, 4), torch.randn(9, 4)
    for where in (torch.ones(8, dtype=torch.bool), torch.ones(9), np.ones((9, 1), dtype=bool)):
        with pytest.raises(ValueError, match="expected booleans, one for each of the 9"):
            top_k(context, candidates, 2, where=where)
