"""Scores that do not depend on what else is scored."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders.modeling import poly_score
from poly_encoders.scoring import exact
from poly_encoders.scoring.exact import PRODUCTS_AT_ONCE, exact_scores, ordered_scores, ordered_sum
from vectors import KINDS, vectors


def scores_of(context, rows, scale=1.0, padding=None):
    return exact_scores(context[None], rows[None], None if padding is None else padding[None], scale)[0]


def in_order(context, rows, scale=1.0, padding=None):
    """The slow, obvious twin: every sum in the one order."""
    context, rows = context.double().expand(len(rows), *context.shape), rows.double()
    return ordered_scores(context, rows, padding, scale).float()


@given(seed=st.integers(0, 10**6), dim=st.integers(1, 900), m=st.integers(1, 9), step=st.integers(1, 40))
def test_pieces_give_the_same_bits(seed, dim, m, step):
    torch.manual_seed(seed)
    context, rows = torch.randn(m, dim), torch.randn(41, dim) * torch.logspace(-3, 3, 41)[:, None]
    whole = scores_of(context, rows)
    assert torch.equal(whole, torch.cat([scores_of(context, some) for some in rows.split(step)]))
    order = torch.randperm(41)
    assert torch.equal(whole[order], scores_of(context, rows[order]))


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    m=st.integers(1, 20),
    dim=st.integers(1, 200),
    scale=st.sampled_from([1e-3, 1.0, 20.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_product_gives_the_bits_of_sums_in_order(kind, seed, m, dim, scale, dtype):
    context, rows = (part.to(dtype) for part in vectors(kind, b=1, m=m, n=50, dim=dim, seed=seed))
    assert torch.equal(scores_of(context[0], rows, scale), in_order(context[0], rows, scale))


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_scores_near_the_middle_between_two_numbers_are_added_up_in_order(scale):
    torch.manual_seed(0)
    middle = 1 + 2.0**-24  # of 1 and the next float32
    y = torch.randn(2, 300, dtype=torch.float64)
    rows = torch.randn(500, 300, dtype=torch.float64)
    rows *= (middle / poly_score(y[None], rows, scale)[0])[:, None]
    wanted = in_order(y, rows, scale)
    assert torch.equal(scores_of(y, rows, scale), wanted)
    with mock.patch.object(exact, "ordered_scores", return_value=torch.zeros(())) as in_order_again:
        scores_of(y, rows, scale)
    assert in_order_again.called


@pytest.mark.parametrize("scale", [1.0, 768**-0.5])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e15])
def test_they_are_the_plain_scores(scale, size):
    torch.manual_seed(0)
    context, rows = torch.randn(16, 768) / size, torch.randn(50, 768) * size
    expected = poly_score(context[None].double(), rows.double(), scale)[0]
    torch.testing.assert_close(scores_of(context, rows, scale).double(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 384, 4096])
@pytest.mark.parametrize("threads", [1, 3])
def test_dots_are_right_to_float64_whatever_the_pieces_and_threads(dim, threads):
    torch.manual_seed(0)
    context, rows = torch.randn(1, dim), torch.randn(50, dim) * torch.logspace(-20, 15, 50)[:, None]
    expected = [math.fsum((row.double() * context[0].double()).tolist()) for row in rows]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for most in (PRODUCTS_AT_ONCE, dim, 3 * dim):
            with mock.patch.object(exact, "PRODUCTS_AT_ONCE", most):
                torch.testing.assert_close(scores_of(context, rows), torch.tensor(expected), rtol=1e-6, atol=0)
                assert torch.equal(scores_of(context, rows), scores_of(context.double(), rows.double()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("outlier", [1e4, 1e7, 1e10, 1e13])
def test_one_very_large_coordinate_hides_none_of_the_others(outlier):
    torch.manual_seed(0)
    context, rows = torch.randn(16, 768), torch.randn(200, 768) / 768**0.5
    context[:, 0], rows[:, 0] = 0, outlier
    expected = poly_score(context[None].double(), rows.double())[0]
    torch.testing.assert_close(scores_of(context, rows).double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 64, 40000])
def test_neither_other_rows_nor_zeros_at_the_end_change_a_sum(m):
    torch.manual_seed(0)
    terms = torch.randn(5, m, dtype=torch.float64)
    found = ordered_sum(terms)
    torch.testing.assert_close(found, terms.sum(dim=-1))
    assert torch.equal(found, torch.stack([ordered_sum(row) for row in terms]))
    assert torch.equal(found, ordered_sum(torch.nn.functional.pad(terms, (0, 13))))


def test_the_amount_of_padding_changes_nothing():
    context, rows = torch.full((14, 1), 1 + 2.0**-12), torch.full((3, 1), 1 + 2.0**-12)
    plain = scores_of(context, rows)
    for more in range(1, 20):
        padding = torch.arange(14 + more) >= 14
        padded = torch.cat([context, torch.zeros(more, 1)])
        assert torch.equal(scores_of(padded, rows, padding=padding), plain)


def test_zeros():
    assert not scores_of(torch.zeros(4, 6), torch.randn(3, 6)).any()
    assert not scores_of(torch.randn(4, 6), torch.zeros(3, 6)).any()
