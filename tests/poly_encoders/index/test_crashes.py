"""Writers that are killed, and several at once: the last good version opens, no row lost or doubled."""

import multiprocessing
import random
import time

import numpy as np
import pytest

from index_worker import BATCH, DIM, HashModel, rows, work, write
from poly_encoders.index import CandidateIndex

pytest.importorskip("lance")


@pytest.fixture
def path(tmp_path):
    """An index of twenty rows."""
    first = rows(0, 20)
    vectors = HashModel().candidates([row["text"] for row in first])
    CandidateIndex.from_vectors(
        vectors,
        [row["id"] for row in first],
        [row["text"] for row in first],
        tmp_path / "index",
        metadata={"batch": [row["batch"] for row in first]},
        dtype="float32",
        show_progress_bar=False,
    )
    return tmp_path / "index"


def start(target, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["index_worker"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def content(path):
    """All rows by id, each of which is as it must be."""
    index = CandidateIndex.load(path)
    index.verify()
    found = [row for _, batch in index.store.rows() for row in index.store.checked(batch.to_pylist())]
    assert len({row["id"] for row in found}) == len(found) == len(index)
    for row in found:
        [expected] = rows(int(row["id"][1:]), int(row["id"][1:]) + 1)
        assert row == expected
    ids = np.sort(index.store.row_ids())
    stored = {
        id_: vector for some, vectors in index.store.vectors(ids) for id_, vector in zip(some, vectors, strict=True)
    }
    assert len(stored) == len(found)
    assert all(vector.shape == (DIM,) for vector in stored.values())
    return {row["id"]: row for row in found}


def killed_again_and_again(path, times):
    random.seed(0)
    for number in range(1, times + 1):
        process = start(work, path, number)
        time.sleep(0.15 + random.random() * 0.6)
        process.kill()
        process.join()
        found = content(path)
        assert {row["id"] for row in rows(0, 20)} <= found.keys()  # nobody touched these
        for size in np.bincount([row["batch"] for row in found.values()]):
            assert size in (0, BATCH)  # whole commits
    write(path, 0, 40)
    assert {row["id"] for row in rows(0, 40)} <= content(path).keys()


def test_writers_that_are_killed(path):
    killed_again_and_again(path, 6)


@pytest.mark.slow
def test_fifty_writers_that_are_killed(path):
    killed_again_and_again(path, 50)


def test_two_writers_at_once_both_land(path):
    writers = [start(write, path, number, number + 50) for number in (100, 200)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert content(path).keys() == {row["id"] for row in [*rows(0, 20), *rows(100, 150), *rows(200, 250)]}


def test_two_writers_of_the_same_rows_double_none(path):
    writers = [start(write, path, 100, 150) for _ in range(2)]
    for writer in writers:
        writer.join()
    assert 0 in [writer.exitcode for writer in writers]
    assert content(path).keys() == {row["id"] for row in [*rows(0, 20), *rows(100, 150)]}
