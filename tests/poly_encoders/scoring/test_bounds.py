"""The error bounds: never exceeded, on purpose-made vectors too, and not much larger than they must be."""

import math

import pytest
import torch

from poly_encoders.modeling import poly_score
from poly_encoders.scoring import prepare
from poly_encoders.scoring.bounds import DotError, lipschitz
from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.passes import Pass, Piece
from vectors import KINDS, vectors


def swept(context, candidates, threshold=-torch.inf, precision="exact", scale=1.0):
    """What a pass over all candidates lets through; `"axes"` is an exact one of those that are prepared on axes."""
    held, axes = candidates, None
    if precision == "axes":
        held, precision = prepare(candidates, form="axes"), "exact"
        axes = held.axes
    sweep = Pass(context, None, scale, precision, {}, axes)
    piece = Piece(CandidateReader(held), 0, len(candidates))
    return sweep.survivors(piece, torch.as_tensor(threshold).expand(len(context)), 1)


def gradient_length(dots):
    """`sum_i |d score / d d_i|` of `(s, m)` dots."""
    weights = dots.softmax(dim=-1)
    return (weights * (1 + dots - (weights * dots).sum(dim=-1, keepdim=True)).abs()).sum(dim=-1)


@pytest.mark.parametrize(("m", "known"), [(1, 1.0), (2, None), (3, None), (16, 1.93), (64, 2.50), (360, 3.26)])
def test_no_dots_move_the_score_faster_and_some_move_it_as_fast(m, known):
    assert known is None or lipschitz(m) == pytest.approx(known, abs=0.005)
    torch.manual_seed(0)
    random = torch.randn(2000, m, dtype=torch.float64) * torch.logspace(-2, 2, 2000, dtype=torch.float64)[:, None]
    two_levels = torch.zeros(4000, m, dtype=torch.float64)
    two_levels[:, 0] = torch.linspace(-5, 15, 4000)
    fastest = max(gradient_length(random).max().item(), gradient_length(two_levels).max().item())
    assert lipschitz(m) - 1e-3 <= fastest <= lipschitz(m) + 1e-9


def test_ascent_finds_no_faster_dots():
    torch.manual_seed(0)
    dots = torch.randn(32, 16, dtype=torch.float64, requires_grad=True)
    climb = torch.optim.Adam([dots], lr=0.05, maximize=True)
    for _ in range(400):
        climb.zero_grad()
        gradient_length(dots).sum().backward()
        climb.step()
    assert lipschitz(16) - 0.01 < gradient_length(dots).max() <= lipschitz(16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["exact", "axes", "float32"])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, torch.float32), (0.2, torch.float32), (0.2, torch.float64), (1.0, torch.bfloat16)]
)
def test_scores_are_within_their_slack_and_only_those_below_the_threshold_are_left_out(kind, precision, scale, dtype):
    context, candidates = (part.to(dtype) for part in vectors(kind, b=3, m=5, n=200, dim=64))
    found = swept(context, candidates, precision=precision, scale=scale)
    assert len(found.which) == 600  # no threshold, so everyone survives
    true = poly_score(context.double(), candidates.double(), scale)
    its_own = true[found.which, found.candidate]
    assert not (found.least.double() > its_own).any()
    assert not (found.most.double() < its_own).any()
    for place in (0, 3, 50):
        threshold = true.sort(dim=1, descending=True).values[:, place].float()
        found = swept(context, candidates, threshold, precision, scale)
        left_out = torch.ones_like(true, dtype=torch.bool)
        if found is not None:
            left_out[found.which, found.candidate] = False
        assert (true[left_out] < threshold.double()[:, None].expand_as(true)[left_out]).all()


@pytest.mark.parametrize("dim", [2, 64, 1024])
@pytest.mark.parametrize("rounded", ["candidate", "context"])
def test_the_bound_holds_where_every_rounding_goes_the_same_way(dim, rounded):
    """As far off as bfloat16 can be: it fails without the term for what rounding takes from that side."""
    tie = torch.full((dim,), 1 + 2.0**-8)  # both round to even, and so the other way than their sign
    tie[1::2] = -(1 + 3 * 2.0**-8)
    context, candidate = (torch.ones(dim), tie) if rounded == "candidate" else (tie, torch.ones(dim))
    sweep = Pass(context[None, None], None, 1.0, "exact", {})
    sweep.step = 0.0  # its products are handed over exactly: small whole multiples of 2^-7 or nearly 0
    found = sweep.survivors(Piece(CandidateReader(candidate[None]), 0, 1), torch.full((1,), -torch.inf), 1)
    off = (found.score.double() - context.double() @ candidate.double()).abs()
    slack = found.score - found.least
    assert 0.8 * slack < off <= slack


@pytest.mark.parametrize("threshold", [1.0, 1.5, 100.0, 1 / 3, 2 / 3, 1e-30, 0.0, -1.0])
def test_with_no_error_the_filter_lets_in_all_that_output_rounding_may_have_lowered(threshold):
    """A true dot at the threshold may be handed over a rounding step lower, and must stay in."""
    sweep = Pass(torch.ones(1, 1, 1), None, 1.0, "exact", {})
    sweep.error = lambda norms, *others: norms * 0
    true = torch.tensor([threshold, threshold + 1e-3 * abs(threshold)])
    lowered = (true * (1 - 2.0**-9)).to(torch.bfloat16).view(2, 1, 1)
    zeros = torch.zeros(2)
    assert sweep._high_enough(sweep._largest(lowered), torch.tensor([threshold]), zeros, zeros).all()
    if threshold > 0:
        far_below = (true * 0.97).to(torch.bfloat16).view(2, 1, 1)
        assert not sweep._high_enough(sweep._largest(far_below), torch.tensor([threshold]), zeros, zeros).any()


def test_the_bound_leaves_few():
    """What it is for: the bfloat16 pass excludes nearly all of ordinary vectors."""
    context, candidates = vectors("normal", b=1, m=16, n=20000, dim=256)
    threshold = poly_score(context, candidates).topk(10).values[:, -1]
    assert 10 <= len(swept(context, candidates, threshold).which) < 200


def test_the_bound_on_axes_leaves_few():
    context, candidates = vectors("one subspace", b=1, m=4, n=20000, dim=64)
    threshold = poly_score(context, candidates).topk(10).values[:, -1]
    assert 10 <= len(swept(context, candidates, threshold, precision="axes").which) < 200


@pytest.mark.parametrize("dim", [64, 1024])
def test_the_bound_on_axes_needs_its_part_for_rounding(dim):
    """Where nothing lies beside the axes, float32 products are off by more than the part for that."""
    context, candidates = vectors("one subspace", b=8, m=1, n=2000, dim=dim)
    held = prepare(candidates, form="axes")
    sweep = Pass(context, None, 1.0, "exact", {}, held.axes)
    nothing = torch.full((8,), -torch.inf)
    found = sweep.survivors(Piece(CandidateReader(held), 0, 2000), nothing, 1)
    true = poly_score(context.double(), candidates.double())[found.which, found.candidate]
    off = (found.score.double() - true).abs()
    assert (off <= (found.score - found.least).double()).all()
    beside = DotError(context, sweep.kept, True, held.axes).rest[found.which] * held.residuals[found.candidate]
    assert (off > beside).any()


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_float32_products_in_less_than_float32_are_allowed_for(setting):
    context, candidates = vectors("normal", b=2, m=5, n=300, dim=256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        found = swept(context, candidates, precision="float32")
    finally:
        torch.set_float32_matmul_precision(before)
    true = poly_score(context.double(), candidates.double())[found.which, found.candidate]
    assert (found.least.double() <= true).all()
    assert (true <= found.most.double()).all()
    assert math.isfinite((found.most - found.least).max())
