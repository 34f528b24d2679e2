"""Requests of many clients encoded together: whatever waits while the model is busy becomes its next batch.

There is no waiting for a batch to fill: a lone request runs at once. A large request gets its share of each batch
only, so that small ones behind it do not wait for all of it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from poly_encoders.serving.request_errors import OverloadedError


class Item(NamedTuple):
    """One thing to encode: a text of a side, or a pair."""

    kind: Any  # hashable: items of one kind are encoded by one call
    content: Any
    cost: int  # tokens, an estimate


Keep = Callable[[Sequence[Item], Sequence[Any]], None]
Finish = Callable[[list[Any]], Any]


@dataclass(eq=False)
class Work:
    """The items of a request, and what has become of them."""

    items: Sequence[Item]
    done: asyncio.Future[None]
    keep: Keep
    finish: Finish
    results: list[Any] = field(default_factory=list)  # in the order of the items
    queued: float = field(default_factory=time.perf_counter)
    began: float | None = None
    outcome: Any = None  # what `finish` made of all results

    @property
    def remaining(self) -> int:
        return len(self.items) - len(self.results)


class Batcher:
    """A queue before the one thread that runs the model.

    Args:
        encode: Takes a kind and contents, gives as many results; called in that thread.
        max_batch_tokens: Of one batch, by the items' costs; an item that costs more is a batch of its own.
        max_waiting: Requests that may wait.
        max_waiting_tokens: What these may cost together. A single request may cost more when none waits.
        observe: Told of each batch: its number of requests, of items and its tokens.
        observe_queue: Told of the requests that wait and their tokens, whenever they change.
    """

    def __init__(
        self,
        encode: Callable[[Any, list[Any]], Sequence[Any]],
        max_batch_tokens: int,
        max_waiting: int,
        max_waiting_tokens: int,
        observe: Callable[[int, int, int], None] = lambda requests, items, tokens: None,
        observe_queue: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> None:
        self._encode, self._observe, self._observe_queue = encode, observe, observe_queue
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._waiting: deque[Work] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._wake = asyncio.Event()
        self._rate = 0.0  # tokens a second, of late
        self._runner: asyncio.Task[None] | None = None
        self.waiting_tokens = 0

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._runner is not None and not self._runner.done()

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._runner = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End what was begun, then the thread."""
        while self._waiting and self.is_alive:
            await asyncio.sleep(0.01)
        if self._runner is not None:
            self._runner.cancel()
        self._thread.shutdown()

    async def run(
        self,
        items: Sequence[Item],
        keep: Keep = lambda items, results: None,
        finish: Finish = lambda results: None,
    ) -> Work:
        """Have items encoded; the work, with their results in order.

        Args:
            items: What to encode.
            keep: Told of some items with their results as soon as these are there, also where nobody waits any more.
            finish: Makes the outcome of all results, in the model's thread: products in another one would have threads
                of their own, which wait for each other.

        Raises:
            OverloadedError: the queue is full.
        """
        cost = sum(item.cost for item in items)
        full = len(self._waiting) >= self._max_waiting
        if full or (self._waiting and self.waiting_tokens + cost > self._max_waiting_tokens):
            raise OverloadedError(len(self._waiting), max(1.0, self.waiting_tokens / self._rate if self._rate else 1.0))
        work = Work(items, asyncio.get_running_loop().create_future(), keep, finish)
        if not items:
            return work
        self._waiting.append(work)
        self.waiting_tokens += cost
        self._observe_queue(self.waiting, self.waiting_tokens)
        self._wake.set()
        try:
            await work.done
        finally:
            if work in self._waiting:  # the client went away, or its time is over
                self._waiting.remove(work)
            self.waiting_tokens -= cost
            self._observe_queue(self.waiting, self.waiting_tokens)
        return work

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if not batch:
                self._wake.clear()
                continue
            began, tokens = time.perf_counter(), 0
            for work, items in batch:
                work.began = work.began or began
                tokens += sum(item.cost for item in items)
            self._observe(len(batch), sum(len(items) for _, items in batch), tokens)
            tried = await loop.run_in_executor(self._thread, self._tried, batch)
            for (work, items), (found, outcome) in zip(batch, tried, strict=True):
                if isinstance(found, Exception):
                    self._end(work, found)
                    continue
                work.results += found
                work.outcome = outcome
                work.keep(items, found)
                if not work.remaining:
                    self._end(work)
            rate = tokens / max(time.perf_counter() - began, 1e-6)
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate

    def _end(self, work: Work, error: Exception | None = None) -> None:
        if work in self._waiting:
            self._waiting.remove(work)
        if work.done.done():
            return
        if error is None:
            work.done.set_result(None)
        else:
            work.done.set_exception(error)

    def _next_batch(self) -> list[tuple[Work, Sequence[Item]]]:
        """The next items within the budget: of each request its share, then of the first what room is left for."""
        budget, takes = self._max_batch_tokens, dict.fromkeys(self._waiting, 0)
        for share in (budget // max(1, len(takes)), budget):
            for work in takes:
                room, start = min(share, budget), len(work.results)
                for item in work.items[start + takes[work] :]:
                    if item.cost > room and any(takes.values()):
                        break
                    takes[work] += 1
                    room, budget = room - item.cost, budget - item.cost
        return [(work, work.items[(n := len(work.results)) : n + take]) for work, take in takes.items() if take]

    def _tried(self, batch: list[tuple[Work, Sequence[Item]]]) -> list[tuple[list[Any] | Exception, Any]]:
        """Each request's results, and its outcome if these are the last; where one fails, each alone."""
        try:
            tried: list[tuple[list[Any] | Exception, Any]] = []
            for (work, items), found in zip(batch, self._encoded(batch), strict=True):
                is_last = work.remaining == len(items)
                tried.append((found, work.finish([*work.results, *found]) if is_last else None))
            return tried
        except Exception as error:
            if len(batch) == 1:
                return [(error, None)]
            return [one for alone in batch for one in self._tried([alone])]

    def _encoded(self, batch: list[tuple[Work, Sequence[Item]]]) -> list[list[Any]]:
        """The results of each request's items, those of one kind by one call."""
        places: dict[Any, list[tuple[int, int]]] = {}
        for number, (_, items) in enumerate(batch):
            for position, item in enumerate(items):
                places.setdefault(item.kind, []).append((number, position))
        results: list[list[Any]] = [[None] * len(items) for _, items in batch]
        for kind, some in places.items():
            contents = [batch[number][1][position].content for number, position in some]
            for (number, position), result in zip(some, self._encode(kind, contents), strict=True):
                results[number][position] = result
        return results
