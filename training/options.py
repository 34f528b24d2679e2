"""Options from YAML files and the command line, into dataclasses."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def options_of_files(argv: Sequence[str] | None) -> dict[str, Any]:
    """What the files after `--config` say; a later file comes before an earlier one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no mapping.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    known, _ = parser.parse_known_args(argv)
    options: dict[str, Any] = {}
    for file in known.config:
        options |= _read(Path(file))
    return options


def parse_dataclasses(
    kinds: Sequence[Any], argv: Sequence[str] | None, from_files: dict[str, Any], what: str, description: str | None
) -> list[Any]:
    """An instance of each dataclass: the options of files, then those of the command line.

    Args:
        kinds: The dataclasses.
        argv: The command line; the process's own when left out.
        from_files: As `options_of_files` gives them.
        what: What the options are for, in the error.
        description: For `--help`.

    Raises:
        ValueError: an option in a file that does not exist.
    """
    parser = HfArgumentParser(tuple(kinds), description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", nargs="+", help="YAML files of options: a later one overrides an earlier, the command line all."
    )
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    if unknown := sorted(from_files.keys() - names):
        raise ValueError(f"The config file has options that do not exist for the {what}: {unknown}. See --help.")
    parser.set_defaults(**from_files)
    *parsed, _config = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    return parsed


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold `option: value` lines, but holds a {type(options).__name__}.")
    return options
