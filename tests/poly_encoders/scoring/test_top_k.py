"""`top_k` against scoring everything: the same answer to the last bit in any precision, pieces and containers."""

import dataclasses
import itertools
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders import PolyEncoder, poly_score
from poly_encoders.scoring import TopK, passes, prepare, search, shortlist, top_k
from poly_encoders.scoring.exact import ordered_scores
from vectors import KINDS, vectors


def score_everything(context, candidates, k, scale=1.0):
    """The slow, obvious twin: all scores in float64, rounded, sorted; equal ones stay in the order of their indices."""
    rows, order = [], []
    for y in context:
        padding = (y == 0).all(dim=-1)
        real = y if padding.all() else y[~padding]
        repeated = real.double().expand(len(candidates), *real.shape)
        found = ordered_scores(repeated, candidates.double(), None, scale).float().sort(descending=True, stable=True)
        rows.append(found.values[:k])
        order.append(found.indices[:k])
    return TopK(torch.stack(rows), torch.stack(order))


def assert_equal(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


def assert_exact(context, candidates, k, held=None, precisions=("exact", "float32"), scale=1.0):
    """`top_k`, of candidates as they are held, is as scoring everything."""
    expected = score_everything(context, candidates, k, scale)
    for precision in precisions:
        for most_of_few in (search.PAIRS, 0):
            with mock.patch.object(search, "PAIRS", most_of_few):
                found = top_k(context, candidates if held is None else held, k, precision=precision, scale=scale)
            assert_equal(found, expected)


@contextmanager
def small_pieces(rows=7, growth=2):
    """Pieces and shortlists so small that a few hundred candidates pass through everything."""
    with (
        mock.patch.multiple(passes, FEWEST_ROWS=2, MOST_ROWS=rows, ROWS_TO_ROUND=rows, CLEAR=3),
        mock.patch.multiple(search, GROWTH=growth, WAITING=40, CONTEXT_VECTORS_AT_ONCE=12, PAIRS=0),
        mock.patch.multiple(shortlist, AT_ONCE=100, LONG=5),
        mock.patch("poly_encoders.scoring.candidates.ROWS_AT_ONCE", 4),
    ):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "k"), [(None, 10), ("bfloat16", 1), ("axes", 1), ("axes", 10)])
def test_hard_vectors_are_ranked_exactly(kind, form, k):
    context, candidates = vectors(kind, b=3, m=5, n=90, dim=48)
    held = prepare(candidates, form=form) if form else candidates
    assert_exact(context, candidates, k, held)
    with small_pieces():
        assert_exact(context, candidates, k, held)


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
    form=st.sampled_from([None, "bfloat16", "axes"]),
)
def test_any_size_in_any_pieces(kind, seed, b, m, n, k, rows, growth, precision, scale, padded, form):
    context, candidates = vectors(kind, b, m, n, dim=16, seed=seed)
    if padded:
        context[torch.rand(b, m) < 0.5] = 0
    with small_pieces(rows, growth):
        held = prepare(candidates, form=form) if form else None
        assert_exact(context, candidates, k, held, [precision], scale)


@pytest.mark.parametrize("precision", [None, "exact", "float32"])
@pytest.mark.parametrize("m", [1, 16])  # the first is the search of a Bi-encoder
def test_these_are_the_best_by_the_plain_form(precision, m):
    context, candidates = vectors("normal", b=4, m=m, n=3000, dim=128)
    expected = poly_score(context, candidates).topk(10)
    found = top_k(context, candidates, 10, precision=precision)
    torch.testing.assert_close(found, TopK(expected.values, expected.indices))


def test_more_contexts_than_one_group_takes():
    context, candidates = vectors("normal", b=70, m=64, n=300, dim=8)
    assert_exact(context, candidates, 5, prepare(candidates))


@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
def test_equal_scores_come_in_the_order_of_their_indices(precision):
    context, candidates = vectors("normal", b=2, m=4, n=1, dim=8)
    found = top_k(context, candidates.expand(9000, 8), 20, precision=precision)
    assert found.indices.tolist() == [list(range(20))] * 2
    assert (found.scores == found.scores[:, :1]).all()


def test_many_duplicates_beyond_one_shortlist():
    context, candidates = vectors("duplicates", b=1, m=4, n=10000, dim=8)
    candidates[4000:] = candidates[:10].repeat(600, 1)
    assert_exact(context, candidates, 30)


@pytest.mark.parametrize("rising", [False, True])
def test_candidates_in_the_order_of_their_scores(rising):
    context, candidates = vectors("normal", b=1, m=4, n=2000, dim=16)
    with small_pieces(rows=100):
        order = poly_score(context, candidates)[0].argsort(descending=not rising)
        assert_exact(context, candidates[order], 10, precisions=["exact"])


def test_where_bfloat16_excludes_too_little_float32_takes_over():
    """Close to one direction, all scores agree to more digits than bfloat16 has."""
    context, candidates = vectors("near ties", b=2, m=4, n=500, dim=32)
    used = []
    plain = passes.Pass.survivors

    def watched(self, *args):
        used.append("bfloat16" if self.low else "float32")
        return plain(self, *args)

    with small_pieces(rows=64), mock.patch.object(passes.Pass, "survivors", watched):
        assert_exact(context, candidates, 3, precisions=["exact"])
    assert used[:2] == ["bfloat16", "bfloat16"]  # of the first piece nobody knows yet
    assert used[-1] == "float32"


def test_all_pieces_are_looked_at_on_the_axes_where_they_exclude_most():
    context, candidates = vectors("one subspace", b=2, m=4, n=500, dim=32)
    used = []
    plain = passes.Pass.survivors

    def watched(self, *args):
        used.append(self.axes is not None)
        return plain(self, *args)

    with small_pieces(rows=64), mock.patch.object(passes.Pass, "survivors", watched):
        assert_exact(context, candidates, 3, prepare(candidates, form="axes"), precisions=["exact"])
    assert len(used) >= 8
    assert all(used)


def test_few_candidates_take_one_step_and_near_ties_among_them_the_long_way():
    context, candidates = vectors("normal", b=2, m=4, n=3000, dim=32)
    with mock.patch.object(search, "_best_of_many", side_effect=AssertionError):
        assert_equal(top_k(context, candidates, 5), score_everything(context, candidates, 5))
    alike = candidates[:1].expand(3000, -1)
    with mock.patch.object(search, "_best_of_many", wraps=search._best_of_many) as long_way:
        assert_equal(top_k(context, alike, 5), score_everything(context, alike, 5))
    assert long_way.called


def test_padding_takes_no_part_where_the_scaled_dots_overflow():
    context, candidates = vectors("normal", b=1, m=2, n=300, dim=16)
    context, candidates = context.abs() * 10, -candidates.abs()
    context[0, 1] = 0
    context = torch.cat([context, torch.randn(1, 2, 16)])  # so that the padding stays
    for few in (search.PAIRS, 0):
        with mock.patch.object(search, "PAIRS", few):
            found = top_k(context, candidates, 5, scale=1e37)
        expected = poly_score(context[:1, :1].double(), candidates.double()).topk(5)
        assert torch.equal(found.indices[:1], expected.indices)


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
        assert_exact(context, candidates, 7, precisions=["exact"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_read_only_arrays_of_any_dtype_on_either_side(tmp_path, dtype):
    context, candidates = (part.numpy().astype(dtype) for part in vectors("normal", b=2, m=4, n=1500, dim=32))
    native = [torch.from_numpy(part.astype(np.dtype(dtype).newbyteorder("="))) for part in (context, candidates)]
    expected = score_everything(*native, 10)
    candidates.tofile(tmp_path / "candidates.bin")
    mapped = np.memmap(tmp_path / "candidates.bin", dtype, "r", shape=candidates.shape)
    context.flags.writeable = False
    for given_them, precision in ((mapped, "exact"), (prepare(mapped), "exact"), (mapped, "float32")):
        assert_equal(top_k(context, given_them, 10, precision=precision), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_contexts_of_another_dtype_than_the_candidates(dtype):
    context, candidates = vectors("normal", b=2, m=4, n=300, dim=32)
    assert_exact(context.to(dtype).requires_grad_(), candidates, 5)


@contextmanager
def changed(get, change, value):
    """A setting of the process is another for a while."""
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


SETTINGS = {
    "1 thread": lambda: changed(torch.get_num_threads, torch.set_num_threads, 1),
    "3 threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 3),
    "lower float32 products": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_settings_of_the_process_change_nothing(setting, precision):
    for kind, m in (("normal", 4), ("one subspace", 1)):
        context, candidates = vectors(kind, b=2, m=m, n=4000, dim=64)
        expected = score_everything(context, candidates, 10)
        with SETTINGS[setting]():
            forms = [candidates, prepare(candidates), prepare(candidates, form="axes")]
            for held in forms:
                assert_equal(top_k(context, held, 10, precision=precision), expected)
        for held, few in itertools.product(forms, (search.PAIRS, 0)):  # prepared there, and asked elsewhere
            with mock.patch.object(search, "PAIRS", few):
                assert_equal(top_k(context, held, 10, precision=precision), expected)
    with SETTINGS[setting]():
        assert top_k(context, candidates, 0, precision=precision).scores.dtype == torch.float32


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


def test_more_wanted_than_there_are_and_nothing_but_padding():
    found = top_k(torch.randn(2, 3, 4), torch.randn(5, 4), 100)
    assert sorted(found.indices[0].tolist()) == [0, 1, 2, 3, 4]
    found = top_k(torch.zeros(1, 3, 4), torch.randn(50, 4), 4)
    assert found.scores.tolist() == [[0.0] * 4]
    assert found.indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
def test_numbers_that_are_not_finite_or_overflow_are_refused(precision):
    context, candidates = vectors("normal", b=1, m=3, n=3000, dim=8)
    with pytest.raises(ValueError, match="overflow float32"):
        top_k(context * 1e25, candidates * 1e25, 5, precision=precision)
    for bad in (float("nan"), float("inf"), -float("inf")):
        candidates[2345, 3] = bad
        with pytest.raises(ValueError, match="Candidate 2345 holds NaN or infinity"):
            top_k(context, candidates, 5, precision=precision)


@pytest.mark.parametrize("scale", [1.0, 1e36])
def test_bfloat16_ranks_what_overflows_in_it(scale):
    """Rough scores of NaN came first: the worst candidate was chosen, and refused."""
    context, candidates = vectors("normal", b=1, m=3, n=2000, dim=8)
    context, candidates = context.abs() + 0.5, candidates.abs()
    candidates[100] = -1e38
    # Nor does one that is too long for the bound hide others.
    assert_exact(context, candidates, 5, precisions=["bfloat16", "exact"], scale=scale)


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


def test_candidates_that_changed_in_number_since_they_were_prepared(capsys):
    prepared = prepare(torch.randn(6, 4))
    with mock.patch.object(search, "PAIRS", 0):
        top_k(torch.randn(2, 3, 4), prepared, 2, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    with pytest.raises(ValueError, match="6 candidates were prepared, but there are 7"):
        top_k(torch.randn(2, 3, 4), dataclasses.replace(prepared, vectors=torch.randn(7, 4)), 2)


@pytest.mark.parametrize("form", ["bfloat16", "axes"])
def test_candidates_that_are_others_than_those_prepared(form):
    vectors = torch.nn.functional.normalize(torch.randn(500, 24), dim=1)
    prepared, context = prepare(vectors, form=form), torch.randn(1, 3, 24)
    top_k(context, prepared, 2)
    for change, message in (
        ({"vectors": vectors[:, :20]}, "24 wide were prepared, but they are 20"),
        ({"vectors": vectors.flip(0)}, "Candidate 0 is another vector"),
        ({"vectors": vectors.double() * 1.5}, "Candidate 0 is another vector"),
    ):
        with pytest.raises(ValueError, match=message):
            top_k(context, dataclasses.replace(prepared, **change), 2)
    vectors.copy_(torch.nn.functional.normalize(torch.randn(500, 24), dim=1))
    with pytest.raises(ValueError, match="is another vector than when it was prepared: prepare them again"):
        top_k(context, prepared, 2)
