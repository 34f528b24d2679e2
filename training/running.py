"""A run from its start, or from where it was stopped, to its end."""

import logging
import signal
import sys
from typing import Any

from safetensors import SafetensorError
from torch import distributed

from poly_encoders.training.arguments import LAST
from poly_encoders.training.callbacks import StopOnSignal
from poly_encoders.training.checkpoints import (
    checked_checkpoint,
    is_finished,
    last_checkpoint,
    remove_broken_checkpoints,
)
from poly_encoders.training.hub import HubTrainer, push_if_asked

logger = logging.getLogger(__name__)

#: What a process that was asked to stop exits with, as a shell has it.
STOPPED = 128 + signal.SIGTERM


class Stopped(Exception):  # noqa: N818 - a run that was asked to stop is no error
    """A run ended early because it was told to."""


class RunTrainer(HubTrainer):
    """What a Trainer needs so that its runs can be stopped, gone on with and pushed; mixed in before it."""

    accelerator: Any
    signals: StopOnSignal

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's; however it ends, signals then do what they did before."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.signals.restore()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream's; every process goes on when the model is in its place.

        Otherwise another one would put its random state into the folder of a checkpoint before that is moved there.
        """
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()


def train_to_end(trainer: Any) -> None:
    """Train, from the checkpoint that the options name if they name one, and save the model.

    Args:
        trainer: A Trainer that is a `RunTrainer`.

    Raises:
        Stopped: SIGTERM came; the run was saved and can be resumed.
        OSError: nothing can be written any more, as on a full disk; the last whole checkpoint is still there.
        FileNotFoundError, ValueError: the checkpoint that the options name is not there, or not whole.
    """
    args = trainer.args
    checkpoint = checkpoint_to_resume(args)
    try:
        if checkpoint is not None and is_finished(checkpoint, args.max_steps, args.num_train_epochs):
            # Killed between the last step and the last save; upstream would look at the number after one step more.
            trainer._load_from_checkpoint(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        if not trainer.signals.stopped:
            trainer.save_model(args.output_dir, _internal_call=True)  # pushed with its last figures, after evaluation
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_of_writing(error):
            raise
        kept = last_checkpoint(args.output_dir, args.world_size)
        state = "there is no checkpoint yet" if kept is None else f"{kept} is whole"
        raise OSError(
            f"Saving failed at step {trainer.state.global_step} ({error}); {state}. Make room, and go on with the same "
            "command and --resume_from_checkpoint."
        ) from error
    if trainer.signals.stopped:
        raise Stopped(
            f"Stopped by a signal after step {trainer.state.global_step}, and saved. Go on with the same command and "
            "--resume_from_checkpoint."
        )


def _is_of_writing(error: Exception) -> bool:
    """Whether a file could not be written: torch.save says so by RuntimeErrors of its zip writer."""
    if isinstance(error, RuntimeError):
        return any(name in str(error) for name in ("inline_container", "PytorchStreamWriter", "iostream"))
    return True


def conclude(trainer: Any) -> None:
    """End a run that has saved its model: say where, push it where asked to, and let the processes go.

    Exits with 1 where the push failed; the model is saved all the same.
    """
    logger.info("Saved to %s", trainer.args.output_dir)
    pushed = push_if_asked(trainer)
    end_processes()
    if not pushed:
        sys.exit(1)


def end_processes() -> None:
    """Leave the processes that ran together. Without it, gloo's threads may abort a process that is done."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def checkpoint_to_resume(args: Any) -> str | None:
    """The checkpoint that the options ask to go on from, after what a killed run left half written is removed.

    Raises:
        FileNotFoundError, ValueError: the one that is named is not there, or not whole.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != LAST:
        return str(checked_checkpoint(args.resume_from_checkpoint))
    with args.main_process_first(local=False, desc="removing broken checkpoints"):
        if args.process_index == 0:
            remove_broken_checkpoints(args.output_dir, args.world_size)
    newest = last_checkpoint(args.output_dir, args.world_size)
    if newest is None:
        logger.info("There is no checkpoint in %s yet: starting from the beginning.", args.output_dir)
        return None
    logger.info("Going on from %s.", newest)
    return str(newest)
