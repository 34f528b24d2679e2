"""Preparing candidates, and reading them from whatever holds them."""

from unittest import mock

import numpy as np
import pytest
import torch

from poly_encoders.scoring import prepare
from poly_encoders.scoring.candidates import CandidateReader
from vectors import KINDS, vectors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["bfloat16", "axes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_lengths_are_upper_bounds(kind, form, dtype):
    candidates = vectors(kind, b=1, m=1, n=64, dim=96)[1].to(dtype)
    candidates = candidates[candidates.isfinite().all(dim=1)]  # float16 cannot hold the huge ones
    prepared = prepare(candidates, form=form)
    exact, low = candidates.double(), prepared.low.double()
    if form == "axes" and len(candidates):
        assert prepared.low.dtype == torch.float32
        assert prepared.low.shape[1] <= 48
        low = low @ prepared.axes.double().T
    else:
        assert prepared.low.dtype == torch.bfloat16
    lacking = (exact - low).norm(dim=1)
    assert prepared.norms.dtype == prepared.residuals.dtype == torch.float32
    assert not (prepared.norms.double() < exact.norm(dim=1)).any()
    assert not (prepared.residuals.double() < lacking).any()
    if kind == "normal":
        torch.testing.assert_close(prepared.norms.double(), exact.norm(dim=1), rtol=1e-4, atol=0)
        torch.testing.assert_close(prepared.residuals.double(), lacking, rtol=1e-3, atol=1e-9)


def test_axes_are_made_where_few_hold_most_and_products_of_bfloat16_are_slow():
    few, normal = vectors("few directions", 1, 1, 5000, 96)[1], vectors("normal", 1, 1, 5000, 96)[1]
    with mock.patch("poly_encoders.scoring.candidates.has_fast_bf16", return_value=False):
        axes = prepare(few).axes
        assert axes.shape[0] == 96
        assert axes.shape[1] == 32
        torch.testing.assert_close(axes.T @ axes, torch.eye(32), rtol=0, atol=1e-5)
        assert prepare(normal).axes is None
        assert prepare(few[:1000]).axes is None  # so few take no time
        assert prepare(torch.zeros(5000, 96)).axes is None
    with mock.patch("poly_encoders.scoring.candidates.has_fast_bf16", return_value=True):
        assert prepare(few).axes is None
    with pytest.raises(ValueError, match="'bfloat16' or 'axes', not 'int8'"):
        prepare(few, form="int8")


def test_what_is_prepared_refers_to_the_vectors():
    low = torch.randn(5, 8).bfloat16()
    assert prepare(low).low.data_ptr() == low.data_ptr()
    assert not prepare(low).residuals.any()
    candidates = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    prepared = prepare(candidates, show_progress_bar=True)
    assert prepared.vectors is prepare(prepared).vectors is candidates
    assert len(prepared) == 3000
    assert torch.equal(prepared.low, torch.from_numpy(candidates).bfloat16())
    assert len(prepare(torch.empty(0, 8))) == 0


NOT_FINITE = torch.zeros(3000, 8).index_fill_(0, torch.tensor(2345), float("nan"))


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "a list"),
        (torch.ones(3, 2).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
        (np.ones((3, 2), dtype=np.longdouble), TypeError, "float128; expected float16"),
        (torch.ones(3, 2, dtype=torch.int8), TypeError, r"torch.int8.*precision='float32'"),
        (np.ones((3, 2), dtype=np.uint8), TypeError, r"uint8.*precision='float32'"),
        (np.ones((3, 2), dtype=bool), TypeError, "bool"),
        (np.ones((3, 2), dtype=np.complex64), TypeError, "complex64"),
        (NOT_FINITE, ValueError, "Candidate 2345 holds NaN or infinity"),
        (torch.ones(3), ValueError, r"\(3,\)"),
        (np.ones((3, 2, 2)), ValueError, r"\(3, 2, 2\)"),
    ],
)
def test_what_is_no_set_of_vectors_is_refused(candidates, error, message):
    with pytest.raises(error, match=message):
        prepare(candidates)


def held_in_many_ways(vectors, folder):
    """The same vectors in all that can hold them."""
    array = vectors.numpy()
    yield "tensor", vectors
    yield "tensor that wants gradients", vectors.clone().requires_grad_()
    yield "transposed tensor", vectors.T.contiguous().T
    yield "every other row", vectors.repeat_interleave(2, dim=0)[::2]
    yield "array", array
    yield "fortran order", np.asfortranarray(array)
    yield "backwards", array[::-1].copy()[::-1]
    yield "every other column", np.repeat(array, 2, axis=1)[:, ::2]
    yield "big endian", array.astype(">f4")
    records = np.zeros(len(array), dtype=[("vector", "f4", array.shape[1]), ("flag", "i1")])
    records["vector"] = array
    yield "field of records", records["vector"]
    frozen = array.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    array.tofile(folder / "vectors.bin")
    for mode in ("r", "r+", "c"):
        yield f"memory map {mode}", np.memmap(folder / "vectors.bin", np.float32, mode, shape=array.shape)


@pytest.mark.filterwarnings("error")
def test_every_container_reads_the_same(tmp_path):
    vectors = torch.randn(20, 6)
    index = torch.tensor([3, 3, 19, 0])
    for name, held in held_in_many_ways(vectors, tmp_path):
        reader = CandidateReader(held)
        assert (len(reader), reader.dim) == (20, 6), name
        assert torch.equal(reader.take(slice(2, 9)), vectors[2:9]), name
        assert torch.equal(reader.take(index), vectors[index]), name
        assert torch.equal(prepare(held).low, vectors.bfloat16()), name
