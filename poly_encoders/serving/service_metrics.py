"""What a service counts, for Prometheus."""

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
POWERS = tuple(2**power for power in range(0, 17, 2))


class ServiceMetrics:
    """Counters of one process; `text` adds up those of all worker processes."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("poly_encoders_requests", "Requests answered", ["path", "status"], registry=own)
        self._duration = Histogram(
            "poly_encoders_request_seconds",
            "Till the answer",
            ["path"],
            buckets=SECONDS,
            registry=own,
        )
        self._queue = Histogram("poly_encoders_queue_seconds", "Waiting for the model", buckets=SECONDS, registry=own)
        self._batch_requests = Histogram(
            "poly_encoders_batch_requests", "Requests in a batch", buckets=POWERS, registry=own
        )
        self._batch_items = Histogram("poly_encoders_batch_items", "Texts in a batch", buckets=POWERS, registry=own)
        self._batch_tokens = Histogram(
            "poly_encoders_batch_tokens", "Tokens in a batch, estimated", buckets=POWERS, registry=own
        )
        self._tokens = Counter("poly_encoders_tokens", "Tokens of answered requests, cached ones too", registry=own)
        self._hits = Counter("poly_encoders_cache_hits", "Candidates whose vectors were there", registry=own)
        self._misses = Counter("poly_encoders_cache_misses", "Candidates that were encoded", registry=own)
        options: dict[str, Any] = {"multiprocess_mode": "livesum", "registry": own}
        self._waiting = Gauge("poly_encoders_queue_requests", "Requests not answered yet", **options)
        self._waiting_tokens = Gauge("poly_encoders_queue_tokens", "Tokens of these, estimated", **options)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._duration.labels(path).observe(seconds)

    def observe_batch(self, requests: int, items: int, tokens: int) -> None:
        self._batch_requests.observe(requests)
        self._batch_items.observe(items)
        self._batch_tokens.observe(tokens)

    def observe_queue(self, requests: int, tokens: int) -> None:
        self._waiting.set(requests)
        self._waiting_tokens.set(tokens)

    def observe_cache(self, hits: int, misses: int) -> None:
        self._hits.inc(hits)
        self._misses.inc(misses)

    def observe_cost(self, tokens: int, queued: float) -> None:
        self._tokens.inc(tokens)
        self._queue.observe(queued)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)
        return generate_latest(together)
