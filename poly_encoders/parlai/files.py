"""Reading the four files of a ParlAI checkpoint: `model`, `model.opt`, `model.dict` and `model.dict.codecs`.

Nothing in them is trusted: weights are read as plain tensors (`weights_only=True`), options as JSON.
"""

import io
import json
import logging
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_CODES_VERSION = "#version: 0.2"


@dataclass(frozen=True)
class ParlAIFiles:
    """What a ParlAI checkpoint holds, as it was written."""

    options: dict[str, Any]  # model.opt
    weights: dict[str, Tensor]  # the state dict in `model`, of any floating-point dtype
    dictionary: list[str]  # the tokens of model.dict, in the order of its lines
    merges: list[tuple[str, str]]  # the byte-pair merges of model.dict.codecs, best first


def read_files(model_file: str | os.PathLike[str]) -> ParlAIFiles:
    """Read the file `model`, or the one in this folder, and the three beside it.

    Raises:
        FileNotFoundError: one of the four is not there.
        ValueError: one of them is damaged, in an unknown format, or asks to run code.
    """
    path = Path(model_file)
    if path.is_dir():
        path = path / "model"
    for suffix in (".dict.codecs", ".dict.opt", ".dict", ".opt"):
        if path.name.endswith(suffix):
            raise ValueError(f"{path} belongs to a checkpoint; name its model file, {path.name.removesuffix(suffix)}.")
    files = [path.with_name(path.name + suffix) for suffix in ("", ".opt", ".dict", ".dict.codecs")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path.parent} has no {', '.join(missing)}. A ParlAI checkpoint is four files in one folder, "
            f"{', '.join(file.name for file in files)}: unpack all of the download and name its model file."
        )
    _, options, dictionary, merges = files
    return ParlAIFiles(read_options(options), read_weights(path), read_dictionary(dictionary), read_merges(merges))


def read_options(path: Path) -> dict[str, Any]:
    """The options in `model.opt`, or a ValueError if it is no JSON object; very old versions pickled it."""
    try:
        options = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}). If it is damaged, download it again. Very old versions of ParlAI pickled "
            "their options, and a pickle can run code, so none is opened here: where you trust it, load and save the "
            "model once with a later ParlAI."
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold an object of options, but holds a {type(options).__name__}.")
    return options


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in `model`; the optimizer beside it is left in the file where the format allows.

    Raises:
        ValueError: the file is damaged, or a pickle of more than tensors and plain values.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL \S+|Unsupported \w+[^\n]*", str(error))
        raise ValueError(
            f"{path} is refused: it is no file of plain tensors. It is damaged, or a pickle that asks to run code "
            f"when it is opened, which is never done here ({wanted[0] if wanted else type(error).__name__})."
        ) from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        # All that torch and its unpickler stumble over in a damaged file.
        raise ValueError(f"{path} is truncated or corrupted ({error or 'it is empty'}). Download it again.") from error
    weights = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(weights, dict):
        found = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} holds no state dict under 'model', only {found}. Name a file that ParlAI saved.")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} should hold named tensors, but {name!r} is a {type(value).__name__}.")
    return weights


def read_dictionary(path: Path) -> list[str]:
    r"""The tokens of `model.dict`, `token<TAB>count` lines with `\n`, `\t`, `\r` written out; a ValueError if none."""
    content = path.read_bytes()
    text = content.decode(errors="ignore")
    if len(text.encode()) != len(content):
        logger.warning("%s is not all UTF-8 text. As in ParlAI, the bytes that are none are left out.", path)
    lines = io.StringIO(text, newline=None)  # ends lines as an open text file does
    tokens = [line.strip().split("\t")[0] for line in lines]
    if not tokens:
        raise ValueError(f"{path} holds no token. Download it again.")
    return [token.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r") for token in tokens]


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of `model.dict.codecs`, in subword-nmt's format, each pair at its first rank.

    Raises:
        ValueError: another version of the format, a line that is no pair, or a pair before the one that makes a part of
            it, which learning never writes, and which subword-nmt and `tokenizers` would merge differently.
    """
    try:
        version, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Download it again.") from error
    if version.strip() != _CODES_VERSION:
        raise ValueError(
            f"{path} begins with {version[:40]!r}; expected {_CODES_VERSION!r}. Older codes end words otherwise: "
            "save the dictionary anew with a later ParlAI."
        )
    merges: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines, start=2):
        pair = tuple(line.strip("\r\n ").split(" "))
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"Line {number} of {path} is {line[:60]!r}, which is no pair of symbols. Download it again."
            )
        merges.setdefault(pair)
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    for rank, pair in enumerate(merges):
        if late := [part for part in pair if first.get(part, rank) > rank]:
            raise ValueError(
                f"{path} merges {' '.join(pair)!r} before it makes {late[0]!r}: its lines are not in the order in "
                "which they were learnt. Download it again."
            )
    return list(merges)
