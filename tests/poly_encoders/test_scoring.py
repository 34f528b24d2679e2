"""Chunked scoring equals the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poly_encoders.modeling import poly_score
from poly_encoders.scoring import score


@settings(max_examples=60, deadline=None)
@given(b=st.integers(1, 5), m=st.integers(1, 5), n=st.integers(1, 9), budget=st.integers(1, 60), own=st.booleans())
def test_chunks_change_nothing(b, m, n, budget, own):
    torch.manual_seed(b + 10 * m + 100 * n)
    context, candidates = torch.randn(b, m, 6), torch.randn((b, n, 6) if own else (n, 6))
    torch.testing.assert_close(
        score(context, candidates, 0.5, dots_at_once=budget), poly_score(context, candidates, 0.5)
    )


def test_no_contexts_and_no_candidates():
    assert score(torch.empty(0, 3, 4), torch.randn(5, 4)).shape == (0, 5)
    assert score(torch.randn(2, 3, 4), torch.empty(0, 4)).shape == (2, 0)


def test_gradients_flow():
    context = torch.randn(2, 3, 4, requires_grad=True)
    score(context, torch.randn(5, 4), dots_at_once=1).sum().backward()
    assert context.grad.abs().sum() > 0


def test_devices_that_differ_are_named():
    with pytest.raises(ValueError, match=r"on cpu, candidate vectors on meta"):
        score(torch.randn(2, 3, 4), torch.empty(5, 4, device="meta"))
