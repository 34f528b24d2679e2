"""poly_score against the paper's equations, written as loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders.modeling import poly_score


def by_the_paper(context, candidates, scale=1.0):
    """Section 4.4, one candidate and one context at a time; all-zero context vectors are no vectors."""
    rows = []
    for i, vectors in enumerate(context):
        own = candidates if candidates.dim() == 2 else candidates[i]
        real = [y for y in vectors if bool((y != 0).any())]
        row = []
        for x in own:
            dots = torch.stack([x @ y for y in real])
            weights = torch.softmax(dots * scale, dim=0)
            attended = sum(weight * y for weight, y in zip(weights, real, strict=True))
            row.append(x @ attended)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@given(
    b=st.integers(1, 4),
    m=st.integers(1, 9),
    n=st.integers(1, 6),
    dim=st.integers(1, 8),
    shared=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    padded=st.integers(0, 8),
)
def test_follows_the_paper(b, m, n, dim, shared, scale, padded):
    torch.manual_seed(b * 100 + m * 10 + n)
    context = torch.randn(b, m, dim, dtype=torch.float64)
    context[0, max(1, m - padded) :] = 0
    candidates = torch.randn((n, dim) if shared else (b, n, dim), dtype=torch.float64)
    torch.testing.assert_close(poly_score(context, candidates, scale), by_the_paper(context, candidates, scale))


def test_a_context_of_padding_alone_scores_zero():
    assert poly_score(torch.zeros(1, 3, 4), torch.randn(2, 4)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("size", [1e4, 1e-20])
def test_extreme_sizes_stay_finite(size):
    torch.manual_seed(0)
    assert poly_score(torch.randn(2, 3, 4) * size, torch.randn(5, 4) * size).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_float32_also_of_half_precision_and_under_autocast(dtype):
    torch.manual_seed(0)
    context, candidates = torch.randn(2, 3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    expected = poly_score(context.float(), candidates.float())
    assert torch.equal(poly_score(context, candidates), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(poly_score(context, candidates), expected)


def test_gradient_is_exact():
    torch.manual_seed(0)
    context = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(poly_score, (context, candidates))


@pytest.mark.parametrize(
    ("context", "candidates", "said"),
    [
        ((3, 8), (5, 8), "expected"),
        ((2, 3, 8), (8,), "expected"),
        ((2, 3, 8), (5, 7), "8 wide, candidate vectors 7"),
        ((2, 3, 8), (3, 5, 8), "2 contexts but 3 sets"),
    ],
)
def test_shapes_that_do_not_fit_are_named(context, candidates, said):
    with pytest.raises(ValueError, match=said):
        poly_score(torch.zeros(context), torch.zeros(candidates))
