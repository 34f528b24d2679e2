"""The error bounds: never exceeded, on purpose-made vectors too, and not much larger than they must be."""

import math

import pytest
import torch

from poly_encoders.modeling import poly_score
from poly_encoders.scoring.bounds import lipschitz
from poly_encoders.scoring.candidates import CandidateReader
from poly_encoders.scoring.passes import Pass, Piece, Workspace
from vectors import KINDS, vectors


def gradient_length(dots: torch.Tensor) -> torch.Tensor:
    """`sum_i |d score / d d_i|` of `(s, m)` dots."""
    weights = dots.softmax(dim=-1)
    return (weights * (1 + dots - (weights * dots).sum(dim=-1, keepdim=True)).abs()).sum(dim=-1)


@pytest.mark.parametrize(("m", "known"), [(1, 1.0), (16, 1.93), (64, 2.50), (360, 3.26)])
def test_lipschitz_constant_has_the_known_values(m, known):
    assert lipschitz(m) == pytest.approx(known, abs=0.005)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 64, 360])
def test_no_dots_move_the_score_faster_and_some_move_it_as_fast(m):
    torch.manual_seed(0)
    random = torch.randn(2000, m, dtype=torch.float64) * torch.logspace(-2, 2, 2000, dtype=torch.float64)[:, None]
    two_levels = torch.zeros(4000, m, dtype=torch.float64)
    two_levels[:, 0] = torch.linspace(-5, 15, 4000)
    fastest = max(gradient_length(random).max().item(), gradient_length(two_levels).max().item())
    assert fastest <= lipschitz(m) + 1e-9
    assert fastest >= lipschitz(m) - 1e-3


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
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_within_their_slack(kind, low, scale, dtype):
    context, candidates = vectors(kind, b=3, m=5, n=200, dim=64)
    context, candidates = context.to(dtype), candidates.to(dtype)
    reader = CandidateReader(candidates)
    sweep = Pass(context, None, scale, Workspace(), low=low)
    which, index, score, slack = sweep.survivors(Piece(reader, None, 0, 200), torch.full((3,), -torch.inf))
    assert len(which) == 600  # no threshold, so everyone survives
    true = poly_score(context.double(), candidates.double(), scale)[which, index]
    assert not ((score.double() - true).abs() > slack.double()).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [True, False])
def test_only_those_below_the_threshold_are_left_out(kind, low):
    context, candidates = vectors(kind, b=3, m=5, n=400, dim=64)
    true = poly_score(context.double(), candidates.double())
    sweep = Pass(context, None, 1.0, Workspace(), low=low)
    for place in (0, 3, 50):
        threshold = true.sort(dim=1, descending=True).values[:, place].float()
        found = sweep.survivors(Piece(CandidateReader(candidates), None, 0, 400), threshold)
        left_in = torch.zeros_like(true, dtype=torch.bool)
        if found is not None:
            left_in[found[0], found[1]] = True
        assert (true[~left_in] < threshold.double()[:, None].expand_as(true)[~left_in]).all()


@pytest.mark.parametrize("dim", [2, 64, 1024])
@pytest.mark.parametrize("rounded", ["candidate", "context"])
def test_the_bound_holds_where_every_rounding_goes_the_same_way(dim, rounded):
    """As far off as bfloat16 can be: it fails without the term for what rounding takes from that side."""
    tie = torch.full((dim,), 1 + 2.0**-8)  # both round to even, and so the other way than their sign
    tie[1::2] = -(1 + 3 * 2.0**-8)
    context, candidate = (torch.ones(dim), tie) if rounded == "candidate" else (tie, torch.ones(dim))
    sweep = Pass(context[None, None], None, 1.0, Workspace(), low=True)
    sweep.step = 0.0  # its products are handed over exactly: small whole multiples of 2^-7 or nearly 0
    piece = Piece(CandidateReader(candidate[None]), None, 0, 1)
    _, _, score, slack = sweep.survivors(piece, torch.full((1,), -torch.inf))
    off = (score.double() - context.double() @ candidate.double()).abs()
    assert 0.8 * slack < off <= slack


@pytest.mark.parametrize("threshold", [1.0, 1.5, 3.0, 100.0, 1 / 3, 2 / 3, 1e-30, 0.0, -1.0])
def test_with_no_error_the_filter_lets_in_all_that_output_rounding_may_have_lowered(threshold):
    """A true dot at the threshold may be handed over a rounding step lower, and must stay in."""
    sweep = Pass(torch.ones(1, 1, 1), None, 1.0, Workspace(), low=True)
    sweep.error = type(sweep.error)(*(torch.zeros_like(part) for part in sweep.error))
    true = torch.tensor([threshold, threshold + 1e-3 * abs(threshold)])
    lowered = (true * (1 - 2.0**-9)).to(torch.bfloat16).view(2, 1, 1)
    zeros = torch.zeros(2)
    assert sweep._high_enough(lowered, torch.tensor([threshold]), zeros, zeros).all()
    if threshold > 0:
        far_below = (true * 0.97).to(torch.bfloat16).view(2, 1, 1)
        assert not sweep._high_enough(far_below, torch.tensor([threshold]), zeros, zeros).any()


def test_the_bound_leaves_few():
    """What it is for: the bfloat16 pass excludes nearly all of ordinary vectors."""
    context, candidates = vectors("normal", b=1, m=16, n=20000, dim=256)
    threshold = poly_score(context, candidates).topk(10).values[:, -1]
    found = Pass(context, None, 1.0, Workspace(), low=True).survivors(
        Piece(CandidateReader(candidates), None, 0, 20000), threshold
    )
    assert 10 <= len(found[0]) < 200


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_float32_products_in_less_than_float32_are_allowed_for(setting):
    context, candidates = vectors("normal", b=2, m=5, n=300, dim=256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        found = Pass(context, None, 1.0, Workspace(), low=False).survivors(
            Piece(CandidateReader(candidates), None, 0, 300), torch.full((2,), -torch.inf)
        )
    finally:
        torch.set_float32_matmul_precision(before)
    true = poly_score(context.double(), candidates.double())[found[0], found[1]]
    assert ((found[2].double() - true).abs() <= found[3].double()).all()
    assert math.isfinite(found[3].max())
