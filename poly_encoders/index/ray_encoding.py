"""Encoding on a Ray cluster: its machines encode, whoever builds the index commits, as if it had encoded by itself.

Tasks rather than actors: those of a lost node go to others, where an actor would wait for room of its own.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from poly_encoders.index.encoding import IndexModel
from poly_encoders.index.extras import needs
from poly_encoders.index.index_writer import Encoded, Unencoded
from poly_encoders.index.lance_store import TEXT

CPUS = 4  # of a task, where there are no GPUs
IN_FLIGHT = 2  # batches for each task that can run: one waits meanwhile

_models: dict[Any, IndexModel] = {}  # in a process of Ray's: the one that it encodes with


def encode_in_ray(model: IndexModel, batches: Iterator[Unencoded], batch_size: int) -> Iterator[Encoded]:
    """As `poly_encoders.index.index_writer.encode_here`, in the same order, a batch a task and a task a GPU.

    It takes the cluster that `ray.init` was called for, or that `ray.init()` finds, or else starts one here.
    """
    ray = needs("ray")
    if not ray.is_initialized():
        ray.init()
    held = [ray.put(model)]  # in a list it is passed as it is, and fetched once by each process
    given = _resources(ray)
    task = ray.remote(**given, max_retries=-1, max_calls=0)(_vectors)
    waiting: deque[tuple[Unencoded, Any]] = deque()
    for batch in batches:
        texts = batch.changed[TEXT].to_pylist()
        waiting.append((batch, task.remote(held, texts, batch_size) if texts else None))
        while len(waiting) >= IN_FLIGHT * _tasks(ray, given):
            yield _next(ray, waiting)
    while waiting:
        yield _next(ray, waiting)


def _next(ray: Any, waiting: deque[tuple[Unencoded, Any]]) -> Encoded:
    batch, task = waiting.popleft()
    return Encoded(*batch, None if task is None else ray.get(task))


def _resources(ray: Any) -> dict[str, float]:
    """What a task takes: a GPU, or some CPUs that any node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"num_gpus": 1}
    return {"num_cpus": min(CPUS, *(node["CPU"] for node in nodes if node.get("CPU")))}


def _tasks(ray: Any, given: dict[str, float]) -> int:
    """How many can run at once, on the nodes that there are now."""
    there = ray.cluster_resources()
    return max(1, int(there.get("GPU", 0) if "num_gpus" in given else there.get("CPU", 0) // given["num_cpus"]))


def _vectors(held: list[Any], texts: list[str], batch_size: int) -> np.ndarray:
    [name] = held
    if name not in _models:
        _models.clear()
        _models[name] = needs("ray").get(name)
        _models[name].model.to("cuda" if torch.cuda.is_available() else "cpu")
    return _models[name].candidates(texts, batch_size=batch_size, show_progress_bar=False)
