"""`top_k` against scoring everything: the same answer to the last bit in any precision, pieces and containers."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poly_encoders import PolyEncoder, poly_score
from poly_encoders.scoring import PreparedCandidates, TopK, passes, prepare, ranking, shortlist, top_k
from poly_encoders.scoring.exact import Slices, exact_scores
from vectors import KINDS, vectors


def score_everything(context, candidates, k, scale=1.0):
    """The slow, obvious twin: all scores in float64, rounded, sorted; equal ones stay in the order of their indices."""
    rows, order = [], []
    for y in context:
        padding = (y == 0).all(dim=-1)
        real = y if padding.all() else y[~padding]
        found = exact_scores(Slices(real), Slices(candidates), None, scale).sort(descending=True, stable=True)
        rows.append(found.values[:k])
        order.append(found.indices[:k])
    return TopK(torch.stack(rows), torch.stack(order))


def assert_equal(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


@contextmanager
def small_pieces(rows=7, growth=2):
    """Pieces and shortlists so small that a few hundred candidates pass through everything."""
    with (
        mock.patch.multiple(passes, FIRST_ROWS=3, FEWEST_ROWS=2, MOST_ROWS=rows, ROWS_TO_ROUND=rows, GROWTH=growth),
        mock.patch.multiple(ranking, GROWTH=growth, WAITING=40, CONTEXT_VECTORS_AT_ONCE=12),
        mock.patch.multiple(shortlist, AT_ONCE=100, LONG=5),
        mock.patch("poly_encoders.scoring.candidates.ROWS_AT_ONCE", 4),
    ):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["exact", "float32"])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("k", [1, 10])
def test_hard_vectors_are_ranked_exactly(kind, precision, prepared, k):
    context, candidates = vectors(kind, b=3, m=5, n=500, dim=48)
    expected = score_everything(context, candidates, k)
    given_them = prepare(candidates) if prepared else candidates
    assert_equal(top_k(context, given_them, k, precision=precision), expected)
    with small_pieces():
        assert_equal(top_k(context, given_them, k, precision=precision), expected)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    b=st.integers(1, 5),
    m=st.integers(1, 6),
    n=st.integers(1, 60),
    k=st.integers(1, 70),
    rows=st.integers(1, 30),
    growth=st.integers(2, 5),
    precision=st.sampled_from(["exact", "float32"]),
    scale=st.sampled_from([1.0, 0.2, 3.0]),
    padded=st.booleans(),
    prepared=st.booleans(),
)
def test_any_size_in_any_pieces(kind, seed, b, m, n, k, rows, growth, precision, scale, padded, prepared):
    context, candidates = vectors(kind, b, m, n, dim=16, seed=seed)
    if padded:
        context[torch.rand(b, m) < 0.5] = 0
    expected = score_everything(context, candidates, k, scale)
    with small_pieces(rows, growth):
        found = top_k(context, prepare(candidates) if prepared else candidates, k, precision=precision, scale=scale)
    assert_equal(found, expected)
    assert found.scores.shape == found.indices.shape == (b, min(k, n))


@pytest.mark.parametrize("precision", [None, "exact", "float32", "bfloat16"])
def test_these_are_the_best_by_the_plain_form(precision):
    context, candidates = vectors("normal", b=4, m=16, n=5000, dim=128)
    expected = poly_score(context, candidates).topk(10)
    found = top_k(context, candidates, 10, precision=precision)
    torch.testing.assert_close(found.scores, expected.values)
    assert torch.equal(found.indices, expected.indices)
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64


def test_more_contexts_than_one_group_takes():
    context, candidates = vectors("normal", b=70, m=64, n=300, dim=8)
    assert_equal(top_k(context, prepare(candidates), 5, precision="exact"), score_everything(context, candidates, 5))


def test_one_context_vector_is_the_search_of_a_bi_encoder():
    context, candidates = vectors("normal", b=3, m=1, n=2000, dim=64)
    found = top_k(context, candidates, 10, precision="exact")
    expected = (context[:, 0].double() @ candidates.double().T).topk(10)
    assert torch.equal(found.indices, expected.indices)


def test_equal_scores_come_in_the_order_of_their_indices():
    context, candidates = vectors("normal", b=2, m=4, n=1, dim=8)
    for precision in ("exact", "float32", "bfloat16"):
        found = top_k(context, candidates.expand(9000, 8), 20, precision=precision)
        assert found.indices.tolist() == [list(range(20))] * 2
        assert (found.scores == found.scores[:, :1]).all()


def test_many_duplicates_beyond_one_shortlist():
    context, candidates = vectors("duplicates", b=1, m=4, n=20000, dim=8)
    candidates[5000:] = candidates[:10].repeat(1500, 1)
    for precision in ("exact", "float32"):
        assert_equal(top_k(context, candidates, 30, precision=precision), score_everything(context, candidates, 30))


@pytest.mark.parametrize("rising", [False, True])
def test_candidates_in_the_order_of_their_scores(rising):
    context, candidates = vectors("normal", b=1, m=4, n=6000, dim=16)
    candidates = candidates[poly_score(context, candidates)[0].argsort(descending=not rising)]
    with small_pieces(rows=100):
        found = top_k(context, candidates, 10, precision="exact")
    assert_equal(found, score_everything(context, candidates, 10))


def test_where_bfloat16_excludes_too_little_float32_takes_over():
    """Close to one direction, all scores agree to more digits than bfloat16 has."""
    context, candidates = vectors("near ties", b=2, m=4, n=4000, dim=32)
    used = []
    plain = passes.Pass.survivors

    def watched(self, piece, threshold):
        used.append("bfloat16" if self.low else "float32")
        return plain(self, piece, threshold)

    with small_pieces(rows=64), mock.patch.object(passes.Pass, "survivors", watched):
        found = top_k(context, candidates, 3, precision="exact")
    assert "bfloat16" in used
    assert used[-1] == "float32"
    assert_equal(found, score_everything(context, candidates, 3))


def test_bfloat16_is_close_and_its_scores_are_exact():
    context, candidates = vectors("normal", b=3, m=8, n=4000, dim=64)
    found = top_k(context, candidates, 50, precision="bfloat16")
    expected = score_everything(context, candidates, 50)
    everything = score_everything(context, candidates, 4000)
    for row in range(3):
        scores = dict(zip(everything.indices[row].tolist(), everything.scores[row].tolist(), strict=True))
        assert [scores[index] for index in found.indices[row].tolist()] == found.scores[row].tolist()
        assert len(set(found.indices[row].tolist()) & set(expected.indices[row].tolist())) >= 45
    assert (found.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("in_float32", [False, True])
def test_products_that_come_back_in_float32(in_float32):
    """What devices other than the CPU do: bfloat16 products with float32 results, or none at all."""
    context, candidates = vectors("normal", b=2, m=4, n=5000, dim=32)
    plain, product = passes.Pass.__init__, torch.mm

    def elsewhere(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.low_out, self.step = False, 0.0

    def with_out_dtype(one, other, out_dtype=None, **options):
        return product(one.float(), other.float()) if out_dtype else product(one, other, **options)

    with (
        mock.patch.object(passes.Pass, "__init__", elsewhere),
        mock.patch.object(passes, "adds_bf16_in_float32", return_value=in_float32),
        mock.patch.object(torch, "mm", with_out_dtype),
    ):
        assert_equal(top_k(context, candidates, 7, precision="exact"), score_everything(context, candidates, 7))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_a_read_only_memory_map(tmp_path, dtype):
    context, candidates = vectors("normal", b=2, m=4, n=3000, dim=32)
    array = candidates.numpy().astype(dtype)
    array.tofile(tmp_path / "candidates.bin")
    mapped = np.memmap(tmp_path / "candidates.bin", dtype, "r", shape=array.shape)
    expected = score_everything(context, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), 10)
    assert_equal(top_k(context, mapped, 10, precision="exact"), expected)
    assert_equal(top_k(context, prepare(mapped), 10, precision="exact"), expected)
    assert_equal(top_k(context, mapped, 10, precision="float32"), expected)


@pytest.mark.filterwarnings("error")
def test_contexts_may_be_arrays_and_of_other_dtypes():
    context, candidates = vectors("normal", b=2, m=4, n=300, dim=32)
    frozen = context.numpy().copy()
    frozen.flags.writeable = False
    expected = score_everything(context, candidates, 5)
    assert_equal(top_k(frozen.astype(">f4"), candidates, 5, precision="exact"), expected)
    assert_equal(top_k(frozen, candidates, 5, precision="exact"), expected)
    assert_equal(top_k(context.double().requires_grad_(), candidates.numpy(), 5, precision="exact"), expected)
    low = context.bfloat16()
    assert_equal(top_k(low, candidates, 5, precision="exact"), score_everything(low.float(), candidates, 5))


def test_results_are_the_same_with_other_threads():
    context, candidates = vectors("normal", b=2, m=16, n=20000, dim=96)
    expected = top_k(context, candidates, 10, precision="exact")
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert_equal(top_k(context, candidates, 10, precision="exact"), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_lower_setting_for_float32_products_changes_nothing():
    context, candidates = vectors("normal", b=2, m=4, n=3000, dim=64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = top_k(context, candidates, 10, precision="float32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert_equal(found, score_everything(context, candidates, 10))


def test_autocast_and_inference_mode_change_nothing():
    context, candidates = vectors("normal", b=2, m=4, n=3000, dim=64)
    expected = score_everything(context, candidates, 10)
    for precision in ("exact", "float32"):
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(top_k(context, candidates, 10, precision=precision), expected)
        with torch.inference_mode():
            assert_equal(top_k(context, prepare(candidates), 10, precision=precision), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    context, candidates = vectors("normal", b=2, m=4, n=3000, dim=64)
    expected = score_everything(context, candidates, 10)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for precision in ("exact", "float32"):
            assert_equal(top_k(context, candidates, 10, precision=precision), expected)
        assert top_k(context, candidates, 0).scores.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("outlier", [1e5, 1e10])
def test_a_coordinate_that_is_large_in_all_candidates_changes_no_order(outlier):
    context, candidates = vectors("normal", b=1, m=16, n=2000, dim=768)
    context[..., 0], candidates[:, 0] = 0, outlier
    expected = poly_score(context.double(), candidates.double()).topk(10)
    for precision in ("exact", "float32"):
        assert torch.equal(top_k(context, candidates, 10, precision=precision).indices, expected.indices)


def test_padding_anywhere_changes_nothing():
    context, candidates = vectors("normal", b=3, m=6, n=2000, dim=32)
    expected = top_k(context, candidates, 10, precision="exact")
    for places in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 2, 4, 6, 8, 9]):
        padded = torch.zeros(3, 10, 32)
        padded[:, places] = context
        assert_equal(top_k(padded, candidates, 10, precision="exact"), expected)


def test_ranks_as_the_model_does(poly_encoder: PolyEncoder):
    texts = [f"reply number {number}" for number in range(30)]
    contexts, candidates = poly_encoder.encode_query(["Hello!", "How?"]), poly_encoder.encode_document(texts)
    found = top_k(contexts, prepare(candidates), 5, scale=poly_encoder.final_scale)
    assert found.indices[0].tolist() == [entry["corpus_id"] for entry in poly_encoder.rank("Hello!", texts, top_k=5)]
    torch.testing.assert_close(found.scores, poly_encoder.similarity(contexts, candidates).topk(5).values)


# --- sizes of nothing, and bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "exact", "float32", "bfloat16"])
def test_nothing_to_rank(precision):
    context = torch.randn(2, 3, 4)
    for candidates, k in ((torch.randn(5, 4), 0), (torch.empty(0, 4), 3), (np.empty((0, 4), np.float32), 3)):
        found = top_k(context, candidates, k, precision=precision)
        assert found.scores.shape == found.indices.shape == (2, 0)
    assert top_k(context, prepare(torch.empty(0, 4)), 3, precision=precision).indices.shape == (2, 0)
    assert top_k(context[:0], torch.randn(5, 4), 3, precision=precision).indices.shape == (0, 3)


def test_more_wanted_than_there_are():
    found = top_k(torch.randn(2, 3, 4), torch.randn(5, 4), 100)
    assert sorted(found.indices[0].tolist()) == [0, 1, 2, 3, 4]


def test_nothing_but_padding_scores_0():
    found = top_k(torch.zeros(1, 3, 4), torch.randn(50, 4), 4)
    assert found.scores.tolist() == [[0.0] * 4]
    assert found.indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
def test_candidates_that_are_not_finite_are_named(bad, precision):
    candidates = torch.randn(3000, 8)
    candidates[2345, 3] = bad
    with pytest.raises(ValueError, match="Candidate 2345 holds NaN or infinity"):
        top_k(torch.randn(2, 3, 8), candidates, 5, precision=precision)


@pytest.mark.parametrize("scale", [1.0, 1e36])
def test_bfloat16_ranks_what_overflows_in_it(scale):
    """Rough scores of NaN came first: the worst candidate was chosen, and refused."""
    context, candidates = vectors("normal", b=1, m=3, n=2000, dim=8)
    context, candidates = context.abs() + 0.5, candidates.abs()
    candidates[100] = -1e38
    expected = score_everything(context, candidates, 5, scale)
    assert_equal(top_k(context, candidates, 5, precision="bfloat16", scale=scale), expected)


@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
def test_scores_beyond_float32_are_refused(precision):
    context, candidates = vectors("normal", b=1, m=3, n=50, dim=8)
    with pytest.raises(ValueError, match="overflow float32"):
        top_k(context * 1e25, candidates * 1e25, 5, precision=precision)


def test_a_candidate_too_long_for_the_bound_hides_no_other():
    context, candidates = vectors("normal", b=1, m=3, n=50, dim=8)
    candidates[7] = -context[0].sum(dim=0).sign() * 1e30
    expected = score_everything(context, candidates, 5)
    assert_equal(top_k(context, candidates, 5, precision="exact"), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": torch.randn(3, 4)}, ValueError, r"\(3, 4\).*context\[None\]"),
        ({"context": torch.empty(2, 0, 4)}, ValueError, r"\(2, 0, 4\)"),
        ({"context": torch.full((2, 3, 4), torch.nan)}, ValueError, "context vectors hold NaN"),
        ({"context": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "torch.int64"),
        ({"context": "Hello!"}, TypeError, "a str"),
        ({"context": np.array([["Hello!"]])}, TypeError, "<U6"),
        ({"context": torch.empty(2, 3, 0), "candidates": torch.empty(6, 0)}, ValueError, r"\(2, 3, 0\)"),
        ({"context": torch.randn(2, 3, 5)}, ValueError, "5 wide, candidate vectors 4"),
        ({"candidates": torch.empty(6, 4, device="meta")}, ValueError, "on cpu, candidate vectors on meta"),
        ({"candidates": torch.ones(6, 4, dtype=torch.int8)}, TypeError, "torch.int8"),
        ({"candidates": torch.eye(6, 4).to_sparse()}, TypeError, "to_dense"),
        ({"candidates": np.ma.masked_less(np.ones((6, 4)), 0)}, TypeError, "MaskedArray"),
        ({"candidates": torch.randn(2, 6, 4)}, ValueError, r"\(2, 6, 4\)"),
        ({"k": -1}, ValueError, "at least 0, got -1"),
        ({"k": 2.0}, TypeError, "whole number, got 2.0"),
        ({"k": True}, TypeError, "whole number, got True"),
        ({"scale": "1"}, ValueError, "positive number, got '1'"),
        ({"scale": 0.0}, ValueError, "positive number, got 0.0"),
        ({"scale": float("nan")}, ValueError, "positive number, got nan"),
        ({"precision": "int8"}, ValueError, "exact, float32, bfloat16, not 'int8'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    options = {"context": torch.randn(2, 3, 4), "candidates": torch.randn(6, 4), "k": 2, **change}
    with pytest.raises(error, match=message):
        top_k(options.pop("context"), options.pop("candidates"), options.pop("k"), **options)


def test_candidates_that_changed_in_number_since_they_were_prepared():
    prepared = prepare(torch.randn(6, 4))
    changed = PreparedCandidates(torch.randn(7, 4), prepared.low, prepared.norms, prepared.residuals)
    with pytest.raises(ValueError, match="6 candidates were prepared, but there are 7"):
        top_k(torch.randn(2, 3, 4), changed, 2)


def test_a_progress_bar_counts_candidates(capsys):
    top_k(torch.randn(1, 2, 4), torch.randn(50, 4), 3, show_progress_bar=True)
    assert "50/50" in capsys.readouterr().err
