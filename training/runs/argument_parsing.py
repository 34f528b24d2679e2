"""Arguments from YAML files and the command line, into dataclasses."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def arguments_of_files(argv: Sequence[str] | None) -> dict[str, Any]:
    """What the YAML files after `--config` say; a later file comes before an earlier one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no mapping.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[], type=Path)
    found: dict[str, Any] = {}
    for path in parser.parse_known_args(argv)[0].config:
        if not path.is_file():
            raise FileNotFoundError(f"There is no config file {path}.")
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(options, dict):
            raise ValueError(f"{path} must hold `option: value` lines, but holds a {type(options).__name__}.")
        found |= options
    return found


def parse_dataclasses(kinds: Sequence[Any], argv: Sequence[str] | None, mapping: dict[str, Any], about: str) -> Any:
    """An instance of each of the dataclasses: from a mapping, then from the command line. `about` is for `--help`.

    Raises:
        ValueError: the mapping has an option that does not exist.
    """
    parser = HfArgumentParser(tuple(kinds), description=about, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", help="YAML files of options; a later one overrides an earlier one.")
    if unknown := sorted(mapping.keys() - {name for kind in kinds for name in kind.__dataclass_fields__}):
        raise ValueError(f"The config file has options that do not exist here: {unknown}. See --help.")
    parser.set_defaults(**mapping)
    return parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))[:-1]
