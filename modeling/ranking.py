# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""From scores to a ranking.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

from typing import Any

from torch import Tensor


def checked_top_k(value: Any) -> int | None:
    """`value` itself, if it is a number of candidates to return.

    Raises:
        ValueError: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"top_k must be a whole number of at least 0, or None for all, got {value!r}.")
    return value


def refuse_nonfinite(numbers: Tensor) -> None:
    """Let no NaN and no infinity pass.

    Raises:
        ValueError: there is one.
    """
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            "The model gave numbers that are NaN or infinite: its weights are broken, or overflow in this "
            "precision. Load a good checkpoint, or use float32."
        )


def best_first(scores: Tensor, top_k: int | None = None) -> list[tuple[int, float]]:
    """The best of `(n,)` scores with their positions, best first, equal ones in the order given.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    refuse_nonfinite(scores)
    values, order = scores.sort(descending=True, stable=True)
    return list(zip(order.tolist(), values.tolist(), strict=True))[:top_k]
