"""What was prepared, kept in files."""

import numpy as np
import pytest
import torch

from poly_encoders.scoring import load_prepared, prepare, top_k
from vectors import vectors


@pytest.mark.parametrize("form", ["axes", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_files_hold_what_memory_does(tmp_path, form, dtype):
    context, candidates = vectors("one subspace", b=2, m=3, n=500, dim=24)
    np.save(tmp_path / "vectors.npy", candidates.numpy().astype(dtype))
    held = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    inside, made = prepare(held, form=form), prepare(held, form=form, folder=tmp_path / "prepared")
    loaded = load_prepared(held, tmp_path / "prepared")
    for one in (made, loaded):
        assert all(
            torch.equal(getattr(one, name), getattr(inside, name)) for name in ("low", "norms", "residuals", "sample")
        )
        assert one.low.dtype == inside.low.dtype
        found, expected = top_k(context, one, 5), top_k(context, inside, 5)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.scores, expected.scores)


def test_files_of_other_candidates_or_cut_off_are_refused(tmp_path):
    candidates = torch.randn(100, 8)
    prepare(candidates, form="axes", folder=tmp_path)
    with pytest.raises(ValueError, match="of other candidates"):
        load_prepared(torch.randn(100, 8), tmp_path)
    with pytest.raises(ValueError, match="prepare again"):
        load_prepared(candidates[:99], tmp_path)
    (tmp_path / "low.bin").write_bytes((tmp_path / "low.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"low\.bin has"):
        load_prepared(candidates, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_prepared(candidates, tmp_path / "nowhere")
