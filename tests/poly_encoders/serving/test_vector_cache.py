"""The cache against an obvious one, and its bound."""

from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders.serving.vector_cache import ENTRY_BYTES, Read, VectorCache

DIM = 3
EACH = 4 * DIM + ENTRY_BYTES


def vector(key):
    return np.full(DIM, ord(key), dtype=np.float32)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4, unique=True), max_size=30))
def test_it_keeps_what_was_used_last(calls):
    room = 3
    cache, twin = VectorCache(DIM, room * (EACH + 4)), OrderedDict()
    for keys in calls:
        vectors, found = cache.get(keys)
        assert sorted(found) == [place for place, key in enumerate(keys) if key in twin]
        for place, read in found.items():
            assert (vectors[place] == vector(keys[place])).all()
            assert read == twin[keys[place]]
            twin.move_to_end(keys[place])
        missing = [key for key in keys if key not in twin]
        for key in missing:
            read = Read(ord(key), False)
            cache.put(key, vector(key), read)
            if len(twin) == room:
                twin.popitem(last=False)
            twin[key] = read
        assert len(cache) == len(twin) <= room


def test_what_is_larger_than_all_of_it_is_not_kept():
    cache = VectorCache(DIM, EACH + 40)
    cache.put("a", vector("a"), Read(1, False))
    cache.put("b" * 1000, vector("b"), Read(1, False))
    assert [*cache.get(["a", "b" * 1000])[1]] == [0]
    cache.put("c", vector("c"), Read(1, False))
    assert [*cache.get(["a", "c"])[1]] == [1]
    assert (cache.get(["c"])[0] == vector("c")).all()


def test_without_room_nothing_is_kept():
    cache = VectorCache(DIM, 0)
    cache.put("a", vector("a"), Read(1, False))
    assert len(cache) == 0
    assert cache.get(["a"])[1] == {}
