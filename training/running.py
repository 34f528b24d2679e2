"""A run from its start, or from where it was stopped, to its end."""

import logging
import signal
from typing import Any

from torch import distributed

from poly_encoders.training.arguments import LAST
from poly_encoders.training.callbacks import StopOnSignal
from poly_encoders.training.checkpoints import checked_checkpoint, last_checkpoint, remove_broken_checkpoints

logger = logging.getLogger(__name__)

#: What a process that was asked to stop exits with, as a shell has it.
STOPPED = 128 + signal.SIGTERM


class Stopped(Exception):  # noqa: N818 - a run that was asked to stop is no error
    """A run ended early because it was told to."""


def train_to_end(trainer: Any, signals: StopOnSignal) -> None:
    """Train, from the checkpoint that the options name if they name one, and save the model.

    Args:
        trainer: A transformers `Trainer`.
        signals: One of its callbacks.

    Raises:
        Stopped: SIGTERM came; the run was saved and can be resumed.
        OSError: nothing can be written any more, as on a full disk; the last whole checkpoint is still there.
        FileNotFoundError, ValueError: the checkpoint that the options name is not there, or not whole.
    """
    folder = trainer.args.output_dir
    checkpoint = checkpoint_to_resume(trainer.args)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if signals.received is None:
            trainer.save_model()
    except OSError as error:
        kept = last_checkpoint(folder)
        state = "there is no checkpoint yet" if kept is None else f"{kept} is whole"
        raise OSError(
            f"Saving failed at step {trainer.state.global_step} ({error}); {state}. Make room, and go on with the same "
            "command and --resume_from_checkpoint."
        ) from error
    if signals.received is not None:
        raise Stopped(
            f"Stopped by a signal after step {trainer.state.global_step}, and saved. Go on with the same command and "
            "--resume_from_checkpoint."
        )


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
            remove_broken_checkpoints(args.output_dir)
    newest = last_checkpoint(args.output_dir)
    if newest is None:
        logger.info("There is no checkpoint in %s yet: starting from the beginning.", args.output_dir)
        return None
    logger.info("Going on from %s.", newest)
    return str(newest)
