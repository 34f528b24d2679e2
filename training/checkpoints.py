"""Which checkpoints of a run are whole. A process can be killed at any moment, also while it saves one.

A checkpoint's last file is `trainer_state.json`. Where that one is whole, all others are, so a run resumes from the
newest folder whose state can be read, and puts the others out of the way.
"""

import json
import logging
import re
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_checkpoint(folder: str | Path, num_processes: int = 1) -> Path | None:
    """The newest whole checkpoint in the output folder of a run of so many processes; `None` where there is none."""
    whole = [path for path in _checkpoints(Path(folder)) if is_whole(path, num_processes)]
    return max(whole, key=_step, default=None)


def remove_broken_checkpoints(folder: str | Path, num_processes: int = 1) -> list[Path]:
    """Remove what a killed run left half written, and say which."""
    broken = [path for path in _checkpoints(Path(folder)) if not is_whole(path, num_processes)]
    for path in broken:
        logger.warning("%s is incomplete: a run was stopped while it saved. Removing it.", path)
        shutil.rmtree(path)
    return broken


def is_whole(checkpoint: Path, num_processes: int = 1) -> bool:
    """Whether everything of a checkpoint was written; of several processes each writes its own random state."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return False
    has_random_state = any(checkpoint.glob("rng_state*.pth"))  # which a checkpoint of the model alone lacks
    own = [checkpoint / f"rng_state_{process}.pth" for process in range(num_processes)]
    if num_processes > 1 and has_random_state and not all(file.is_file() and file.stat().st_size for file in own):
        return False
    return state.global_step == _step(checkpoint)


def is_finished(checkpoint: str | Path, max_steps: int, num_train_epochs: float) -> bool:
    """Whether a run of so many steps (epochs, where `max_steps` is not positive) is at its end in this checkpoint."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
    if max_steps > 0:
        return state.global_step >= max_steps
    return state.global_step >= state.max_steps and num_train_epochs <= state.num_train_epochs


def checked_checkpoint(checkpoint: str | Path) -> Path:
    """A checkpoint that a user names.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none, or not whole.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no checkpoint {checkpoint}. Leave the name out, and the newest one in output_dir is taken."
        )
    if not (_NAME.fullmatch(path.name) and is_whole(path)):
        raise ValueError(
            f"{checkpoint} is no whole checkpoint of a training run: its {STATE_FILE} is missing or incomplete. Leave "
            "the name out, and the newest whole one in output_dir is taken."
        )
    return path


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _NAME.fullmatch(path.name)]


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1
