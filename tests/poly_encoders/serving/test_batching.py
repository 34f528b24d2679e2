"""The queue: every request gets its own results in order, within the budget, whatever the others do."""

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poly_encoders.serving.batching import Batcher, Item
from poly_encoders.serving.request_errors import OverloadedError


def run(scenario, encode=lambda kind, contents: [(kind, content) for content in contents], **options):
    """What the coroutine function `scenario(batcher)` gives, and the batches that there were."""
    batches = []
    limits = {"max_batch_tokens": 10, "max_waiting": 100, "max_waiting_tokens": 10_000, **options}

    async def begin():
        batcher = Batcher(encode, observe=lambda *sizes: batches.append(sizes), **limits)
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(begin()), batches


costs = st.lists(st.integers(1, 14), max_size=8)


@given(st.lists(costs, min_size=1, max_size=8), st.booleans())
def test_each_gets_its_own_in_order(requests, together):
    works = [
        [Item("ab"[place % 2], (number, place), cost) for place, cost in enumerate(some)]
        for number, some in enumerate(requests)
    ]

    async def scenario(batcher):
        if together:
            return await asyncio.gather(*map(batcher.run, works))
        return [await batcher.run(work) for work in works]

    found, batches = run(scenario)
    assert [work.results for work in found] == [[(item.kind, item.content) for item in items] for items in works]
    assert sum(items for _, items, _ in batches) == sum(map(len, works))
    assert all(tokens <= 10 or items == 1 for _, items, tokens in batches)


def test_what_waits_is_encoded_together():
    async def scenario(batcher):
        return await asyncio.gather(*(batcher.run([Item("a", number, 1)]) for number in range(30)))

    _, batches = run(scenario)
    assert len(batches) <= 5  # the first may be alone, of the others each has ten


def test_a_small_request_does_not_wait_for_all_of_a_large_one():
    ended = []

    async def scenario(batcher):
        async def one(name, size):
            await batcher.run([Item("a", place, 1) for place in range(size)])
            ended.append(name)

        await asyncio.gather(one("large", 200), one("small", 3))

    run(scenario)
    assert ended == ["small", "large"]


def test_a_failure_is_of_one_request():
    def encode(kind, contents):
        if "bad" in contents:
            raise ValueError("bad")
        return contents

    async def scenario(batcher):
        works = (batcher.run([Item("a", text, 1)]) for text in ("good", "bad", "fine"))
        return await asyncio.gather(*works, return_exceptions=True)

    (good, bad, fine), _ = run(scenario, encode)
    assert (good.results, fine.results) == (["good"], ["fine"])
    assert isinstance(bad, ValueError)


@pytest.mark.parametrize("limits", [{"max_waiting": 2}, {"max_waiting_tokens": 20}])
def test_a_full_queue_says_when_to_come_again(limits):
    go = threading.Event()

    def encode(kind, contents):
        go.wait(10)
        return contents

    async def scenario(batcher):
        begun = [asyncio.ensure_future(batcher.run([Item("a", number, 10)])) for number in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError) as refused:
            await batcher.run([Item("a", 3, 10)])
        go.set()
        await asyncio.gather(*begun)
        await batcher.run([Item("a", 4, 10_000)])  # alone it may be as large as it is
        return refused.value, batcher.waiting, batcher.waiting_tokens

    (refused, waiting, tokens), _ = run(scenario, encode, **limits)
    assert refused.status == 429
    assert int(refused.headers()["Retry-After"]) >= 1
    assert (waiting, tokens) == (0, 0)


def test_who_goes_away_leaves_nothing_behind():
    begun = []

    def encode(kind, contents):
        begun.extend(contents)
        time.sleep(0.02)
        return contents

    async def scenario(batcher):
        gone = asyncio.ensure_future(batcher.run([Item("a", place, 10) for place in range(100)]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        after = await batcher.run([Item("a", "after", 1)])
        return after.results, batcher.waiting_tokens

    (results, tokens), _ = run(scenario, encode)
    assert results == ["after"]
    assert tokens == 0
    assert len(begun) < 20


def test_stopping_ends_what_was_begun():
    async def scenario(batcher):
        work = asyncio.ensure_future(batcher.run([Item("a", place, 10) for place in range(5)]))
        await asyncio.sleep(0)
        await batcher.stop()
        return await work

    work, _ = run(scenario)
    assert len(work.results) == 5


def test_the_queue_is_told_when_it_changes():
    told = []

    async def scenario(batcher):
        await asyncio.gather(*(batcher.run([Item("a", number, 2)]) for number in range(3)))

    run(scenario, observe_queue=lambda requests, tokens: told.append((requests, tokens)))
    assert told[:3] == [(1, 2), (2, 4), (3, 6)]
    assert told[-1] == (0, 0)
