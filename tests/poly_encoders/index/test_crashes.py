"""Writers that are killed, and several at once: the last good version opens, no row lost or doubled."""

import multiprocessing
import os
import random
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch

from index_worker import (
    BATCH,
    CONTEXTS,
    DIM,
    HashModel,
    derive_again_and_again,
    die_in,
    rows,
    run,
    search,
    work,
    write,
)
from poly_encoders.index import CandidateIndex
from poly_encoders.index.derived_files import ABANDONED
from poly_encoders.modeling import poly_score

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
    """A process that is about to run it: its imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["index_worker"])
    ready = context.Event()
    process = context.Process(target=run, args=(ready, target, *arguments))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # a preload's own path, till Python 3.13
        process.start()
    assert ready.wait(60)
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
        time.sleep(random.random() * 0.6)
        process.kill()
        process.join()
        found = content(path)
        assert {row["id"] for row in rows(0, 20)} <= found.keys()  # nobody touched these
        for size in np.bincount([row["batch"] for row in found.values()]):
            assert size in (0, BATCH)  # whole commits
    assert CandidateIndex.load(path).store.version > 5 * times  # they had begun
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


def searches_right(path):
    """Every engine finds the best of what is in the table."""
    found = [*content(path).values()]
    vectors = torch.from_numpy(HashModel().candidates([row["text"] for row in found]))
    best = poly_score(torch.from_numpy(CONTEXTS), vectors, 1.0).topk(5)
    for engine in ("exact", "ann"):
        for hits, places, scores in zip(search(path, engine), best.indices, best.values, strict=True):
            assert [hit["id"] for hit in hits] == [found[place]["id"] for place in places]
            assert [hit["score"] for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5)


def left_behind(path):
    return [*(path / "derived").glob(".*")]


@pytest.mark.parametrize("function", ["_write_vectors", "build_graph", "prepare", "_checksum", "_open"])
def test_killed_while_files_are_made(path, function):
    process = start(die_in, path, function)
    process.join()
    assert process.exitcode == -9
    left = left_behind(path)
    assert len(left) == (function != "_open")  # by then they are in their place
    searches_right(path)
    assert left_behind(path) == left  # it may be at work
    for folder in left:
        os.utime(folder, (time.time() - 2 * ABANDONED,) * 2)
    write(path, 40, 80)
    searches_right(path)
    assert left_behind(path) == []


def killed_while_deriving(path, times):
    random.seed(1)
    for _ in range(times):
        process = start(derive_again_and_again, path)
        time.sleep(random.random() * 0.6)
        process.kill()
        process.join()
        searches_right(path)
    return len(left_behind(path))


def test_files_whose_makers_are_killed(path):
    killed_while_deriving(path, 4)


@pytest.mark.slow
def test_fifty_makers_of_files_that_are_killed(path):
    assert killed_while_deriving(path, 50) >= 5  # kills that came in the middle of it
