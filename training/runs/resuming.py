"""Runs that stop and go on: killed at any moment, asked to stop, or out of disk.

A checkpoint's last file is `trainer_state.json`. Where that one is whole, all others are, so a run resumes from the
newest folder whose state can be read, and removes the others.
"""

import errno
import logging
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError
from torch import distributed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from poly_encoders.training.runs.arguments import LAST
from poly_encoders.training.runs.callbacks import StopOnSignal
from poly_encoders.training.runs.run_pushing import HubTrainer, push_if_asked

logger = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # what a process that was asked to stop exits with, as a shell has it
STATE_FILE = "trainer_state.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(SystemExit):
    """A run ended because it was asked to, and is saved. A script that lets this pass exits with its code."""


class DiskFullError(OSError):
    """A checkpoint or the model could not be saved for want of room."""


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
        with self._saving():
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._saving():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _saving(self) -> Iterator[None]:
        folder = self.args.output_dir
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, DiskFullError) or not lacks_room(error, folder):
                raise
            whole = last_checkpoint(folder, self.args.world_size)
            raise DiskFullError(
                f"Saving failed at step {self.state.global_step} ({error}); the last whole checkpoint is {whole}. Make "
                "room, and go on with the same command and --resume_from_checkpoint."
            ) from error


def lacks_room(error: BaseException | None, folder: str | Path) -> bool:
    """Whether saving in `folder` failed by a full disk, a used-up quota or a limit on the size of files."""
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        error = _error_of_writing(Path(folder)) or error  # torch.save's zip writer does not tell why it failed
    while error is not None:
        number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        if getattr(error, "errno", int(number[1]) if number else None) in _NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _error_of_writing(folder: Path) -> OSError | None:
    """What a file as large as the largest in the folder, and a little larger, cannot be written for."""
    size = max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    try:
        with TemporaryFile(dir=folder) as stream:
            stream.seek(size)
            stream.write(bytes(1 << 20))
            stream.flush()
    except OSError as error:
        return error
    return None


def train_to_end(trainer: Any) -> None:
    """Train a `RunTrainer`, from the checkpoint that the options name if they name one, and save the model.

    Raises:
        Stopped: SIGTERM came; the run was saved and can be resumed.
        DiskFullError: nothing can be saved any more; the last whole checkpoint is still there.
        FileNotFoundError: the checkpoint that the options name is not there, or not whole.
    """
    args, checkpoint = trainer.args, checkpoint_to_resume(trainer.args)
    state = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    epochs_done = state.global_step >= state.max_steps and args.num_train_epochs <= state.num_train_epochs
    if checkpoint is not None and (state.global_step >= args.max_steps if args.max_steps > 0 else epochs_done):
        # Killed between the last step and the last save; upstream would look at the number after one step more.
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        trainer.state = state
        trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not trainer.signals.stopped:
        trainer.save_model(args.output_dir, _internal_call=True)  # pushed with its last figures, after evaluation
    if trainer.signals.received:
        step = trainer.state.global_step
        logger.info("Stopped after step %d, and saved. Go on with the command and --resume_from_checkpoint.", step)
        end_processes()
        raise Stopped(STOPPED)


def conclude(trainer: Any) -> None:
    """End a run that has saved its model: push it where asked to, or exit with 1 where that fails."""
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


def checkpoint_to_resume(args: Any) -> Path | None:
    """The checkpoint to go on from; for the newest, what a killed run left half written is removed first."""
    named, folder = args.resume_from_checkpoint, args.output_dir
    if named is None:
        return None
    if named != LAST:
        if not is_whole(Path(named)):
            raise FileNotFoundError(f"{named} is no whole checkpoint. Leave the name out to take output_dir's newest.")
        return Path(named)
    with args.main_process_first(local=False, desc="removing broken checkpoints"):
        for path in _checkpoints(folder) if args.process_index == 0 else []:
            if not is_whole(path, args.world_size):
                logger.warning("%s is incomplete: a run was stopped while it saved. Removing it.", path)
                shutil.rmtree(path)
    newest = last_checkpoint(folder, args.world_size)
    logger.info("Going on from %s.", newest or "the beginning: there is no checkpoint yet")
    return newest


def last_checkpoint(folder: str | Path, num_processes: int = 1) -> Path | None:
    """The newest whole checkpoint in the output folder of a run of so many processes; `None` where there is none."""
    return max((path for path in _checkpoints(folder) if is_whole(path, num_processes)), key=_step, default=None)


def is_whole(checkpoint: Path, num_processes: int = 1) -> bool:
    """Whether everything of a checkpoint was written; of several processes each writes its own random state."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, TypeError, ValueError):
        return False
    written = {file.name for file in checkpoint.glob("rng_state*.pth") if file.stat().st_size}
    wanted = {f"rng_state_{process}.pth" for process in range(num_processes)} if num_processes > 1 else set()
    return state.global_step == _step(checkpoint) and (not written or wanted <= written)  # or of the model alone


def _checkpoints(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob("*") if path.is_dir() and _step(path) >= 0]


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
