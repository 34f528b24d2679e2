"""The learning rate of the paper: a warm-up, then times a factor when the validation loss stops improving."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


class WarmupReduceLROnPlateau(ReduceLROnPlateau):
    """`ReduceLROnPlateau` with a linear warm-up, during which it only notes the best value seen.

    transformers' Trainer gives the validation metric to any `ReduceLROnPlateau` after each evaluation, and knows no
    warm-up for it: call `warm_up` before each step.

    Args:
        optimizer: Its learning rates are those after the warm-up.
        warmup_steps: Steps until then; 0 for none.
        **kwargs: As for `ReduceLROnPlateau`: `factor`, `patience` and others.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, **kwargs: Any) -> None:
        super().__init__(optimizer, **kwargs)
        self.warmup_steps = warmup_steps
        self.full_rates = [group["lr"] for group in optimizer.param_groups]
        self.is_warm = warmup_steps == 0

    def warm_up(self, step: int) -> None:
        """Set the learning rates for the step of this number, counted from 0, while the warm-up lasts."""
        if self.is_warm:
            return
        share = min(1.0, (step + 1) / self.warmup_steps)
        for group, rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            group["lr"] = rate * share
        self.is_warm = share == 1.0

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # upstream's, one wider
        """Take in a validation metric, and lower the learning rates where it has not improved for long enough."""
        if not self.is_warm:
            self.num_bad_epochs = -1  # whatever comes next is no plateau
        super().step(metrics, epoch)
