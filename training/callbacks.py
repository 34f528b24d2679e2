"""What watches a run: its progress, its signals, its learning rate and its curve."""

import json
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from poly_encoders.training.schedules import WarmupReduceLROnPlateau

logger = logging.getLogger(__name__)

# Processes that train together must stop at one step, so they ask one another, but not at every step.
STEPS_BETWEEN_QUESTIONS = 10
CURVE = "evaluation"  # .json and .png


class TrainingProgress(ProgressCallback):
    """A progress bar with the loss and the examples a second."""

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self.start = (0.0, 0)  # time and step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", dynamic_ncols=True
            )
        self.current_step = state.global_step
        self.start = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            began, first = self.start
            examples = (state.global_step - first) * args.gradient_accumulation_steps
            examples *= args.train_batch_size * args.world_size
            rate = examples / max(time.monotonic() - began, 1e-9)
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", examples=f"{rate:.1f}/s")
        elif any(name.startswith("eval_") for name in logs):
            shown = ", ".join(
                f"{name.removeprefix('eval_')} {value:.4f}"
                for name, value in logs.items()
                if name.startswith("eval_") and isinstance(value, float) and "per_second" not in name
            )
            self.training_bar.write(f"Step {state.global_step:,}: {shown}")


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which SIGTERM came, so that a resumed run goes on exactly there.

    Attributes:
        stopped: Whether the last run was, by all its processes together.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self._received = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread, which alone may set handlers
            logger.warning("Training runs in a thread of its own, so SIGTERM will stop it without saving.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        # A signal arrives between any two instructions, where the logging module's locks may be held.
        os.write(2, b"\nSIGTERM: saving after this step, then stopping.\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._everyone_stops(state.global_step, args.device):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _everyone_stops(self, step: int, device: torch.device) -> bool:
        if not (distributed.is_initialized() and distributed.get_world_size() > 1):
            return self._received
        if step % STEPS_BETWEEN_QUESTIONS:
            return False
        flag = torch.tensor(int(self._received), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.stopped and "train_loss" in (logs or {}):
            # The end of training. Where only the best checkpoint is to be kept, upstream would now remove the one just
            # saved; the file in it still knows which is the best.
            state.best_model_checkpoint = None

    def restore(self) -> None:
        """Give the signal back to who had it before the run."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class WarmUp(TrainerCallback):
    """Warms the plateau schedule up; every other schedule does that by itself."""

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        if isinstance(lr_scheduler, WarmupReduceLROnPlateau):
            lr_scheduler.warm_up(state.global_step)


class EvaluationCurve(TrainerCallback):
    """Writes every evaluation so far to `evaluation.json`, and as a plot to `evaluation.png` where matplotlib is."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        history = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
        losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        if not history:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{CURVE}.json", (json.dumps(history, indent=1) + "\n").encode())
        try:
            import matplotlib.figure
        except ImportError:
            logger.info("The curve of the evaluations is in %s.json only; matplotlib would plot it.", CURVE)
            return
        figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
        _plot(figure, history, losses)
        beside = folder / f".{CURVE}.png.{os.getpid()}"
        figure.savefig(beside, format="png", dpi=120)
        beside.replace(folder / f"{CURVE}.png")
        if (card := getattr(kwargs.get("model"), "model_card_data", None)) is not None:
            card.curve = folder / f"{CURVE}.png"


def _plot(figure: Any, history: list[dict[str, Any]], losses: list[tuple[int, float]]) -> None:
    """Ranking quality above, losses below."""
    quality, loss = figure.subplots(2, 1, sharex=True)
    names = sorted({name for entry in history for name in entry if name.endswith(("_mrr", "_recall@1"))})
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        quality.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval_").replace("recall@", "R@"))
    if names:
        quality.legend()
    quality.set_ylabel("ranking quality")
    if losses:
        loss.plot(*zip(*losses, strict=True), label="training", alpha=0.7)
    if validation := [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]:
        loss.plot(*zip(*validation, strict=True), marker="o", label="validation")
    if losses or validation:
        loss.legend()
    loss.set_ylabel("loss")
    loss.set_xlabel("step")
    for axes in (quality, loss):
        axes.grid(alpha=0.3)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside itself, then put it in place: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
