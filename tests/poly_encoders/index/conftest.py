"""An index of sixty candidates."""

from unittest import mock

import pytest

from index_rows import rows_of
from poly_encoders.index import CandidateIndex, view


@pytest.fixture
def index(poly_encoder, tmp_path):
    return CandidateIndex.build(poly_encoder, rows_of(60), tmp_path / "index", show_progress_bar=False)


@pytest.fixture
def in_files():
    """All rows in derived files, however few."""
    with mock.patch.multiple(view, IN_MEMORY=0, FEW=0):
        yield
