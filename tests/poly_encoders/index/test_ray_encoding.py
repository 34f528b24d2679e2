"""An index that is built on a Ray cluster is the one that a local build makes, also when a node is lost."""

import threading
import time
from unittest import mock

import numpy as np
import pytest

from index_rows import CONTEXTS, rows_of
from poly_encoders.index import CandidateIndex, row_batches
from poly_encoders.index.lance_store import LanceStore

pytest.importorskip("lance")
ray = pytest.importorskip("ray")

ROWS, BATCH = 3000, 50
pytestmark = pytest.mark.slow


@pytest.fixture
def small_batches():
    with mock.patch.object(row_batches.row_batches, "__defaults__", (BATCH, True)):
        yield


@pytest.fixture
def cluster():
    """Three nodes on this machine, one task each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    others = [made.add_node(num_cpus=4) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False)
    yield made, others
    ray.shutdown()
    made.shutdown()


def content(index):
    """Vectors by id, in the table's order."""
    table = index.store.dataset.to_table(columns=["id", "vector"])
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float16)


def test_a_node_that_is_lost_costs_nothing(poly_encoder, tmp_path, cluster, small_batches):
    made, others = cluster
    rows, options = rows_of(ROWS), {"show_progress_bar": False}
    local = CandidateIndex.build(poly_encoder, rows, tmp_path / "local", **options)
    lost = threading.Event()

    def lose_one():
        while not LanceStore.is_there(tmp_path / "index") or len(CandidateIndex.load(tmp_path / "index")) < 5 * BATCH:
            time.sleep(0.02)
        before = len(CandidateIndex.load(tmp_path / "index"))
        made.remove_node(others[0], allow_graceful=False)
        if before < ROWS:
            lost.set()

    killer = threading.Thread(target=lose_one)
    killer.start()
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", ray=True, **options)
    killer.join()
    assert lost.is_set()
    ids, vectors = content(index)
    assert ids == [row["id"] for row in rows] == content(local)[0]  # nothing lost, nothing twice, in order
    np.testing.assert_array_equal(vectors, content(local)[1])
    index.verify()
    assert index.search(CONTEXTS) == local.search(CONTEXTS)
    rows[7] = {**rows[7], "text": "something else"}
    version = index.store.version
    again = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", ray=True, **options)
    assert (again.store.version, len(again)) == (version + 1, ROWS)  # one commit: of what has changed
