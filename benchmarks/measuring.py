"""Times and memory of rivals, side by side in one process."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def interleaved(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call. One round calls each method once, so that all see the same weather."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            result = method()
            elapsed = 1000 * (time.perf_counter() - start)
            del result
            if number:  # the first warms up
                times[name].append(elapsed)
    return times


def peak_memory(method: Callable[[], Any]) -> float | None:
    """MiB that a call takes beyond what is held before it, at its highest, its result included; None but on Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # room freed but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the highest value back to the present one
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    result = method()
    highest = _resident("VmHWM")
    del result
    return max(0.0, (highest - before) / 1024)


def _resident(which: str) -> int:
    """KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1])


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles, rounded."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_ms": round(median, 3), "low_ms": round(low, 3), "high_ms": round(high, 3), "rounds": len(times)}


def machine() -> dict[str, Any]:
    """What the figures were taken on, as far as they depend on it."""
    capabilities = {name: value for name, value in torch.cpu.get_capabilities().items() if value is True}
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bfloat16": sorted({"avx512_bf16", "amx_bf16"} & set(capabilities)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
