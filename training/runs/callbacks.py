"""What watches a run: its progress, its signals, its learning rate and its curve."""

import io
import json
import logging
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed, nn
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from poly_encoders.saving import replace_file
from poly_encoders.training.data.collators import PairCollator
from poly_encoders.training.data.sampling import LengthSortedBatchSampler
from poly_encoders.training.methods.frozen_candidates import FrozenCandidatesLoss
from poly_encoders.training.methods.losses import InBatchNegativesLoss
from poly_encoders.training.runs.schedules import WarmupReduceLROnPlateau

logger = logging.getLogger(__name__)

# Processes that train together must stop at one step, so they ask one another, but not at every step.
STEPS_BETWEEN_QUESTIONS = 10
CURVE = "evaluation"  # .json and .png


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, became NaN or infinite. `path` is the file that has the batch."""

    def __init__(self, step: int, loss: float | str, path: Path) -> None:
        super().__init__(
            f"The loss of step {step} is {loss}, so training stopped before that step. Its batch is in {path}. Look at "
            "the texts; if they are fine, lower learning_rate or give --bf16 false, and --resume_from_checkpoint."
        )
        self.path = path


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
        figures = {
            name.removeprefix("eval_"): value for name, value in (logs or {}).items() if name.startswith("eval_")
        }
        if self.training_bar is None:
            return
        if figures:
            shown = (f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
            self.training_bar.write(f"Step {state.global_step:,}: {', '.join(shown)}")
        elif logs and "loss" in logs:
            began, first = self.start
            batches = (state.global_step - first) * args.gradient_accumulation_steps
            rate = batches * args.train_batch_size * args.world_size / max(time.monotonic() - began, 1e-9)
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", examples=f"{rate:.1f}/s")


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which SIGTERM came, so that a resumed run goes on exactly there.

    Attributes:
        received: Whether SIGTERM came to any of the processes.
        stopped: Whether that ended training before its last step.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received = self.stopped = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread, which alone may set handlers
            logger.warning("Training runs in a thread of its own, so SIGTERM will stop it without saving.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        # A signal arrives between any two instructions, where the logging module's locks may be held.
        os.write(2, b"\nSIGTERM: saving after this step, then stopping.\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = STEPS_BETWEEN_QUESTIONS if args.world_size > 1 else 1
        if state.global_step < state.max_steps and state.global_step % every == 0:
            self.stopped = self._ask_everyone(args.device)
            control.should_save |= self.stopped
            control.should_training_stop |= self.stopped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask_everyone(args.device)

    def _ask_everyone(self, device: torch.device) -> bool:
        if distributed.is_initialized():
            flag = torch.tensor(int(self.received), device=device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            self.received = bool(flag)
        return self.received

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


class BatchWatch(TrainerCallback):
    """Tells sampler and collator which epoch begins; stops a run whose gradients alone are NaN or infinite."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        trainer, epoch = self.trainer, int(state.epoch or 0)
        trainer.batch_sampler = sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None and not isinstance(sampler, LengthSortedBatchSampler):
            sampler = getattr(sampler, "batch_sampler", None)  # out of what distributed training wraps it in
        trainer.length_sorted_sampler = sampler
        if sampler is not None:
            sampler.set_epoch(epoch)
        for drawing in (trainer.data_collator, trainer.loss):
            if isinstance(drawing, PairCollator | FrozenCandidatesLoss):
                drawing.epoch = epoch
        if has_length(train_dataloader):  # a resumed run is somewhere in the epoch
            updates = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            trainer.batches_seen = state.global_step % updates * args.gradient_accumulation_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainer = self.trainer
        if args.world_size > 1 and isinstance(trainer.loss, InBatchNegativesLoss):
            for parameter in trainer.loss.scoring_parameters():  # which distributed training does not see
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = trainer.accelerator.reduce(gradient, "mean")
        if trainer.accelerator.scaler is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return  # float16's scaler skips such steps by itself; shards have no gradients of their own to look at
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not bool(nn.utils.get_total_norm(gradients).isfinite()):
            raise NonFiniteLossError(state.global_step + 1, "finite, but its gradients are not", trainer.write_batch())


class WarmUp(TrainerCallback):
    """Warms the plateau schedule up; every other schedule does that by itself."""

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        if isinstance(lr_scheduler, WarmupReduceLROnPlateau):
            lr_scheduler.warm_up(state.global_step)


class EvaluationCurve(TrainerCallback):
    """Writes every evaluation so far to `evaluation.json`, and as a plot to `evaluation.png` where matplotlib is."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        history = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
        if not state.is_world_process_zero or not history:
            return
        folder = Path(args.output_dir)
        replace_file(folder / f"{CURVE}.json", json.dumps(history, indent=1) + "\n")
        try:
            import matplotlib.figure
        except ImportError:
            logger.info("The curve of the evaluations is in %s.json only; matplotlib would plot it.", CURVE)
            return
        figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
        _plot(figure, state.log_history)
        figure.savefig(image := io.BytesIO(), format="png", dpi=120)
        replace_file(folder / f"{CURVE}.png", image.getvalue())
        if (card := getattr(kwargs.get("model"), "model_card_data", None)) is not None:
            card.curve = folder / f"{CURVE}.png"


def _plot(figure: Any, log: list[dict[str, Any]]) -> None:
    """Ranking quality above, losses below."""
    quality, loss = figure.subplots(2, 1, sharex=True)
    found = {name for entry in log for name in entry if name.endswith(("loss", "_mrr", "_recall@1"))}
    for name in sorted(found - {"train_loss"}):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        label = {"loss": "training", "eval_loss": "validation"}.get(name, name.removeprefix("eval_"))
        axes, marker = (loss if name.endswith("loss") else quality), ("" if name == "loss" else "o")
        axes.plot(*zip(*points, strict=True), marker=marker, label=label.replace("recall@", "R@"))
    for axes, label in ((quality, "ranking quality"), (loss, "loss")):
        if axes.lines:
            axes.legend()
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    loss.set_xlabel("step")
