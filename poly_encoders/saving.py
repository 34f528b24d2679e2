"""Saving so that a failure loses nothing: files are written beside their place and moved in when all are there."""

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_OUR_HEADER = "# Copyright 2026 The poly-encoders authors."
_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside itself, then put it in place: a reader never sees half of it. Folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def is_our_code(text: str) -> bool:
    """Whether a file of code is one that we put beside models, and not a user's own of the same name."""
    return text.lstrip("\ufeff").startswith(_OUR_HEADER)


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """A new folder to write a checkpoint into; its files move to `path` when the block ends well.

    Other files in `path` stay, among them code of the user's that has the name of ours, except weights that the new
    ones replace under other names (another number of shards). An error, in the block or while the files move, leaves
    `path` as it was.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    target = Path(path)
    if target.is_file():
        raise NotADirectoryError(f"A checkpoint is a folder, but {path} is a file. Choose another path.")
    is_new = not target.exists()
    # A new checkpoint appears in one rename. One that is there may be a mount point, so its staging folder is inside.
    home = target.parent if is_new else target
    home.mkdir(parents=True, exist_ok=True)
    staging = home / f".{target.name}.{uuid.uuid4().hex[:8]}.saving"  # not mkdtemp, which would hide it from others
    staging.mkdir()
    try:
        yield str(staging)
        if is_new:
            staging.rename(target)
        else:
            _replace_files(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_files(source: Path, target: Path) -> None:
    """Move every file of `source` to `target`, all or none; weights of the old checkpoint that are not replaced go."""
    names = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    names = [name for name in names if not _is_users_code(target / name)]
    stale: list[Path] = []
    if any(_WEIGHT_FILES.fullmatch(str(name)) for name in names):
        found = [Path(file.name) for file in target.iterdir() if _WEIGHT_FILES.fullmatch(file.name)]
        stale = [name for name in found if name not in names]
    kept = source / f"{uuid.uuid4().hex}.old"  # the old files, until all the new ones are in place
    put_away: list[Path] = []
    put_in: list[Path] = []
    try:
        for name in [*names, *stale]:
            if (target / name).exists():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).replace(kept / name)
                put_away.append(name)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).replace(target / name)
            put_in.append(name)
    except BaseException:
        for name in put_in:
            (target / name).unlink(missing_ok=True)
        for name in put_away:
            (kept / name).replace(target / name)
        raise


def _is_users_code(file: Path) -> bool:
    if file.suffix != ".py" or not file.is_file():
        return False
    if is_our_code(file.read_text(encoding="utf-8", errors="replace")):
        return False
    logger.warning("%s is not a file of poly-encoders', so it stays as it is.", file)
    return True
