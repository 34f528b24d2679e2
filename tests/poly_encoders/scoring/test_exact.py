"""Scores that do not depend on what else is scored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poly_encoders.modeling import poly_score
from poly_encoders.scoring.exact import Slices, exact_scores


def scores_of(context, rows, scale=1.0, padding=None):
    return exact_scores(Slices(context), padding, rows, scale)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 900), m=st.integers(1, 9), step=st.integers(1, 40))
def test_pieces_give_the_same_bits(seed, dim, m, step):
    torch.manual_seed(seed)
    context, rows = torch.randn(m, dim), torch.randn(41, dim) * torch.logspace(-3, 3, 41)[:, None]
    whole = scores_of(context, rows)
    assert torch.equal(whole, torch.cat([scores_of(context, some) for some in rows.split(step)]))
    order = torch.randperm(41)
    assert torch.equal(whole[order], scores_of(context, rows[order]))


@pytest.mark.parametrize("scale", [1.0, 768**-0.5])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e15])
def test_they_are_the_plain_scores(scale, size):
    torch.manual_seed(0)
    context, rows = torch.randn(16, 768) / size, torch.randn(50, 768) * size
    expected = poly_score(context[None].double(), rows.double(), scale)[0]
    torch.testing.assert_close(scores_of(context, rows, scale).double(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 3, 384, 768, 1024, 4096])
def test_slices_add_up_to_the_vectors(dim):
    torch.manual_seed(0)
    vectors = torch.randn(20, dim) * torch.logspace(-40, 30, 20)[:, None]
    slices = Slices(vectors)
    largest = vectors.double().abs().amax(dim=1, keepdim=True)
    assert ((slices.high + slices.low - vectors.double()).abs() <= 2.0**-36 * largest).all()


@pytest.mark.parametrize("dim", [2, 7, 384, 768, 4096])
def test_products_of_slices_are_exact_at_their_worst(dim):
    """All bits set and all signs alike: the largest sum that must still fit in float64."""
    vector = torch.full((1, dim), 1 - 2.0**-24)
    slices = Slices(vector)
    for one, other in ((slices.high, slices.high), (slices.high, slices.low)):
        product = int(one[0, 0] * 2.0**60) * int(other[0, 0] * 2.0**60) * dim  # in whole numbers, without rounding
        assert int((one @ other.T).item() * 2.0**120) == product


def test_zeros_and_padding():
    context, rows = torch.randn(4, 6), torch.randn(3, 6)
    assert not scores_of(torch.zeros(4, 6), rows).any()
    assert not scores_of(context, torch.zeros(3, 6)).any()
    padding = torch.tensor([False, False, True, True])
    padded = torch.where(padding[:, None], 0.0, context)
    torch.testing.assert_close(scores_of(padded, rows, padding=padding), scores_of(context[:2], rows))
