"""An index of sixty candidates."""

import logging
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


@pytest.fixture(scope="session")
def milvus(tmp_path_factory):
    """The file name of a Milvus in this process, shared: every index has a collection of its own there."""
    pytest.importorskip("pymilvus")
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs every error that it raises
    return str(tmp_path_factory.mktemp("milvus") / "candidates.db")


@pytest.fixture(params=["exact", "ann", "milvus"])
def engine(request, in_files):
    """Options of a search: each engine in turn, the graph for few rows as well, looking at all of them."""
    options = {"engine": request.param, "neighbours": 1000}
    return options | ({"milvus": request.getfixturevalue("milvus")} if request.param == "milvus" else {})
