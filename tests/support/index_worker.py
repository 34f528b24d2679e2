"""A process of its own that writes into an index, to be killed or to run beside another."""

import hashlib
import os
import signal
from datetime import timedelta
from unittest import mock

import numpy as np

from poly_encoders.index import CandidateIndex, derived_files, view
from poly_encoders.index.index_writer import encode_into
from poly_encoders.index.row_batches import row_batches

DIM, BATCH = 8, 5


class HashModel:
    """Stands for an `IndexModel`: vectors of length 1 that a text determines, in no time."""

    def candidates(self, texts, **options):
        seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in texts]
        vectors = np.stack([np.random.default_rng(seed).standard_normal(DIM) for seed in seeds]).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows(start, stop):
    return [{"id": f"r{n}", "text": f"text {n}", "batch": n // BATCH} for n in range(start, stop)]


def write(path, start, stop, replace=True, size=BATCH):
    """Add rows, a commit for every five, or for so many."""
    index = CandidateIndex.load(path)
    options = {"total": None, "batch_size": 8, "show_progress_bar": False}
    encode_into(index.store, HashModel(), row_batches(rows(start, stop), size), replace=replace, **options)


def run(ready, target, *arguments):
    """Say that the process is there, and go."""
    ready.set()
    target(*arguments)


def work(path, number):
    """Add, delete and compact till somebody kills the process."""
    while True:
        write(path, number * 1000, number * 1000 + 40)
        index = CandidateIndex.load(path)
        index.delete(filter=f"batch >= {number * 200 + 4}")
        index.compact(timedelta(0))


CONTEXTS = np.random.default_rng(0).standard_normal((2, 3, DIM)).astype(np.float32)


def search(path, engine, k=5):
    """What an index finds with all of its rows in derived files, made if they are stale."""
    with mock.patch.multiple(view, IN_MEMORY=0, FEW=0):
        index = CandidateIndex.load(path)
        return index.search_vectors(CONTEXTS, k, scale=1.0, engine=engine, neighbours=1000)


def derive_again_and_again(path):
    """Change rows, compact and search, each of which makes derived files, till somebody kills the process."""
    with mock.patch.multiple(view, IN_MEMORY=0, FEW=0):
        while True:
            write(path, 1000, 2000, size=1000)
            search(path, "ann")
            CandidateIndex.load(path).delete(filter="batch % 2 = 1")
            CandidateIndex.load(path).compact(timedelta(0))


def die_in(path, function):
    """Search for the first time, and be killed where derived files come to this."""
    kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    with mock.patch.object(derived_files, function, kill):
        search(path, "ann")
