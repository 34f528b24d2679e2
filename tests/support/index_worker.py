"""A process of its own that writes into an index, to be killed or to run beside another."""

import hashlib
from datetime import timedelta

import numpy as np

from poly_encoders.index import CandidateIndex
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


def write(path, start, stop, replace=True):
    """Add rows, a commit for every five."""
    index = CandidateIndex.load(path)
    options = {"total": None, "batch_size": 8, "show_progress_bar": False}
    encode_into(index.store, HashModel(), row_batches(rows(start, stop), BATCH), replace=replace, **options)


def work(path, number):
    """Add, delete and compact till somebody kills the process."""
    while True:
        write(path, number * 1000, number * 1000 + 40)
        index = CandidateIndex.load(path)
        index.delete(filter=f"batch >= {number * 200 + 4}")
        index.compact(timedelta(0))
