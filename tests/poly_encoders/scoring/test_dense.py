"""The training form against the plain one: values, gradients, what it keeps, autocast and torch.compile."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from poly_encoders.modeling import poly_score
from poly_encoders.scoring import score
from poly_encoders.scoring.dense import DOTS_AT_ONCE

SIZES = [(1, 1, 1, 1), (1, 4, 7, 3), (3, 1, 2, 5), (3, 16, 1, 4), (2, 3, 5, 1), (5, 4, 9, 6)]


def value_and_gradients(function, context, candidates, scale=1.0, **options):
    context, candidates = context.detach().requires_grad_(), candidates.detach().requires_grad_()
    scores = function(context, candidates, scale, **options)
    outer = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).view_as(scores)
    return scores.detach(), *torch.autograd.grad(scores, (context, candidates), outer)


def assert_same(found, expected):
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("scale", "budget"), [(1.0, 1), (0.3, 7), (0.3, DOTS_AT_ONCE)])
def test_values_and_gradients_are_the_plain_form_s(own, scale, budget):
    torch.manual_seed(0)
    for b, m, n, dim in SIZES:
        context, candidates = torch.randn(b, m, dim), torch.randn((b, n, dim) if own else (n, dim))
        found = value_and_gradients(score, context, candidates, scale, dots_at_once=budget)
        assert_same(found, value_and_gradients(poly_score, context, candidates, scale))


@given(b=st.integers(1, 5), m=st.integers(1, 5), n=st.integers(1, 9), budget=st.integers(1, 60), own=st.booleans())
def test_pieces_change_nothing(b, m, n, budget, own):
    torch.manual_seed(b + 10 * m + 100 * n)
    context, candidates = torch.randn(b, m, 6), torch.randn((b, n, 6) if own else (n, 6))
    found = value_and_gradients(score, context, candidates, 0.5, dots_at_once=budget)
    assert_same(found, value_and_gradients(poly_score, context, candidates, 0.5))


@pytest.mark.parametrize(("own", "scale"), [(False, 1.0), (False, 0.4), (True, 0.4)])
def test_gradient_is_right_in_double_precision(own, scale):
    torch.manual_seed(0)
    context = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn((2, 5, 4) if own else (5, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, x: score(y, x, scale, dots_at_once=8), (context, candidates))


@pytest.mark.parametrize("own", [False, True])
def test_padding_takes_no_part_and_gets_no_gradient(own):
    torch.manual_seed(0)
    context, candidates = torch.randn(3, 4, 6), torch.randn((3, 5, 6) if own else (5, 6))
    context[0, 2:] = 0
    context[1, :1] = 0
    context[2] = 0  # nothing but padding
    found = value_and_gradients(score, context, candidates)
    assert_same(found, value_and_gradients(poly_score, context, candidates))
    assert not found[1][0, 2:].any()
    torch.testing.assert_close(found[0][0], score(context[:1, :2], candidates[:1] if own else candidates)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32_and_its_gradients_return_in_its_dtype(dtype):
    torch.manual_seed(0)
    context, candidates = torch.randn(3, 4, 6).to(dtype), torch.randn(5, 6).to(dtype)
    found = value_and_gradients(score, context, candidates)
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype]
    assert_same(found, value_and_gradients(poly_score, context, candidates))


@pytest.mark.parametrize("own", [False, True])
def test_autocast_changes_nothing(own):
    torch.manual_seed(0)
    context, candidates = torch.randn(3, 4, 32), torch.randn((3, 5, 32) if own else (5, 32))
    outside = value_and_gradients(score, context, candidates)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(score, context, candidates)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    compiled = torch.compile(lambda y, x, s: score(y * 2, x, s), backend="aot_eager", fullgraph=True)
    for shape in ((5, 6), (3, 9, 6)):  # the second with candidates of their own, of another number
        context, candidates = torch.randn(3, 4, 6), torch.randn(shape)
        found = value_and_gradients(compiled, context, candidates, 0.5)
        assert_same(found, value_and_gradients(lambda y, x, s: poly_score(y * 2, x, s), context, candidates, 0.5))


@pytest.mark.parametrize("own", [False, True])
def test_is_a_well_formed_operator(own):
    context = torch.randn(3, 4, 6, requires_grad=True)
    candidates = torch.randn((3, 5, 6) if own else (5, 6), requires_grad=True)
    torch.library.opcheck(torch.ops.poly_encoders.score.default, (context, candidates, 0.5, 16))


def test_keeps_the_inputs_and_the_scores_alone_and_holds_no_dots_of_all_with_all():
    kept = []
    context, candidates = torch.randn(32, 8, 6, requires_grad=True), torch.randn(64, 6, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
    ):
        score(context, candidates, dots_at_once=1024).backward(torch.ones(32, 64))
    assert sorted(kept) == sorted([context.shape, candidates.shape, (32, 64)])
    sizes = [math.prod(shape) for event in profiler.events() for shape in event.input_shapes if shape]
    assert max(sizes) == 32 * 64  # the scores; the dots are eight times as many


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_any_memory_layout(own, layout):
    """A transposed context failed in the backward pass."""
    context, candidates = torch.randn(4, 3, 8), torch.randn((4, 5, 8) if own else (5, 8))
    if layout == "transposed":
        context, candidates = context.transpose(0, 1).contiguous().transpose(0, 1), candidates.mT.contiguous().mT
    elif layout == "expanded":
        context, candidates = context[:1].expand(4, 3, 8), candidates[..., :1, :].expand_as(candidates)
    else:
        context, candidates = context.repeat(1, 1, 2)[..., ::2], candidates.repeat_interleave(2, dim=-2)[..., ::2, :]

    found = value_and_gradients(score, context, candidates, 0.5)
    assert_same(found, value_and_gradients(poly_score, context, candidates, 0.5))


def test_derivatives_that_it_has_not():
    """Forward mode and a learnt scale take the plain form; both lost their derivative without a word."""
    context, candidates, scale = torch.randn(2, 3, 4), torch.randn(5, 4), torch.tensor(0.5, requires_grad=True)
    _, found = torch.func.jvp(lambda y: score(y, candidates), (context,), (torch.ones_like(context),))
    _, expected = torch.func.jvp(lambda y: poly_score(y, candidates), (context,), (torch.ones_like(context),))
    torch.testing.assert_close(found, expected)
    score(context, candidates, scale).sum().backward()
    assert scale.grad.abs() > 0
    context.requires_grad_()
    (gradient,) = torch.autograd.grad(score(context, candidates).sum(), context, create_graph=True)
    with pytest.raises(RuntimeError, match="score_backward"):
        gradient.sum().backward()


def test_no_contexts_and_no_candidates():
    assert score(torch.empty(0, 3, 4), torch.randn(5, 4)).shape == (0, 5)
    assert score(torch.randn(2, 3, 4), torch.empty(0, 4)).shape == (2, 0)
    context = torch.randn(2, 3, 4, requires_grad=True)
    score(context, torch.empty(0, 4)).sum().backward()
    assert not context.grad.any()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(own, side):
    sides = [torch.randn(2, 3, 4), torch.randn((2, 5, 4) if own else (5, 4))]
    expected = value_and_gradients(poly_score, *sides)[1 + side]
    sides[side].requires_grad_()
    scores = score(*sides)
    scores.backward(torch.linspace(-1, 2, scores.numel()).view_as(scores))
    torch.testing.assert_close(sides[side].grad, expected)
    assert sides[1 - side].grad is None


def test_what_does_not_fit_together_is_named():
    with pytest.raises(ValueError, match=r"on cpu, candidate vectors on meta"):
        score(torch.randn(2, 3, 4), torch.empty(5, 4, device="meta"))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(5,\)"):
        score(torch.randn(2, 3, 4), torch.randn(5))
