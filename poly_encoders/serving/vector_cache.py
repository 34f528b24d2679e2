"""Vectors of candidates that were encoded before, within a bound of memory."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

ENTRY_BYTES = 300  # of a key and its place, about, beside the vector and the text


class Read(NamedTuple):
    """What is known of a text beside its vector."""

    tokens: int  # that were read
    is_cut: bool  # it had more


class VectorCache:
    """Vectors by text, the least recently used given up first. For one thread.

    Args:
        dim: Width of the vectors, float32.
        max_bytes: Of vectors, texts and what finds them, about. That of vectors is taken at once, so that it is not
            missing later.
    """

    def __init__(self, dim: int, max_bytes: int) -> None:
        self._most = max_bytes // (4 * dim + ENTRY_BYTES)
        self._max_bytes, self._bytes, self._each = max_bytes, 0, 4 * dim + ENTRY_BYTES
        self._vectors = np.full((self._most, dim), 0, dtype=np.float32)
        self._places: OrderedDict[Hashable, tuple[int, Read]] = OrderedDict()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def get(self, keys: Sequence[Hashable]) -> tuple[np.ndarray, dict[int, Read]]:
        """Vectors `(n, dim)` for n keys, rows of the missing ones undefined; and which are there, by position."""
        found, places = {}, np.zeros(len(keys), dtype=np.int64)
        for position, key in enumerate(keys):
            if (entry := self._places.get(key)) is not None:
                places[position], found[position] = entry
                self._places.move_to_end(key)
        if not found:
            return np.empty((len(keys), self._vectors.shape[1]), dtype=np.float32), found
        return self._vectors[places], found

    def put(self, key: Hashable, vector: np.ndarray, read: Read) -> None:
        """Keep the `(dim,)` vector of a text."""
        size = self._each + _length(key)
        if key in self._places or not self._most or size > self._max_bytes:
            return
        while self._bytes + size > self._max_bytes or len(self._places) == self._most:
            old, (place, _) = self._places.popitem(last=False)
            self._free.append(place)
            self._bytes -= self._each + _length(old)
        place = self._free.pop() if self._free else len(self._places)
        self._vectors[place] = vector
        self._places[key] = place, read
        self._bytes += size


def _length(key: Hashable) -> int:
    parts = key if isinstance(key, tuple) else (key,)
    return sum(4 * len(part) for part in parts if isinstance(part, str))  # at most; Python's texts have 1, 2 or 4
