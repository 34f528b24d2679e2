"""What is wrong with a data set, said with the place where it is: the line of a file, the row of a data set.

Whole columns are looked at as Arrow arrays, which is quick; the lines of a file are read one by one only after that, or
the loading, found something.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, List, Value

from poly_encoders.conversations import checked_text, context_text


class BadCell(NamedTuple):
    row: int  # from 0
    column: str
    problem: str  # such as "is empty"


def check_cells(data: Dataset, source: str) -> None:
    """See that every cell can be read: the first column a context, the others texts.

    Raises:
        ValueError: a cell is null or empty, or a column holds something else; named by its line in a JSON Lines file,
            by its row elsewhere.
    """
    is_lines = is_json_lines(source)
    mixed = any(isinstance(feature, Json) for feature in data.features.values())
    bad = None if mixed and is_lines else _first_bad_cell(data)
    if bad is None and not mixed:
        return
    if is_lines:
        check_json_lines(Path(source), data.column_names)
    if bad is not None:
        raise ValueError(
            f"Row {bad.row + 1} of {source}: the column {bad.column!r} {bad.problem}. Repair it or leave it out, or "
            f"name the columns to read with --columns; there are {data.column_names}."
        )


def check_scores(column: pa.ChunkedArray, number: int, source: str) -> None:
    """See that a teacher's scores are there for every row: as many finite numbers as it has candidates.

    Raises:
        ValueError: they are not; the first such row is named.
    """
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not lists or not pa.types.is_floating(column.type.value_type):
        raise ValueError(f"The column scores of {source} is {column.type}; expected a list of {number} numbers a row.")
    for row, scores in enumerate(column.to_pylist()):
        if scores is None or len(scores) != number or not all(s is not None and math.isfinite(s) for s in scores):
            raise ValueError(
                f"Row {row + 1} of {source} has the scores {scores!r:.80}; expected {number} finite numbers, one for "
                "each candidate column. Score the data anew with training/distill.py."
            )


def is_json_lines(source: str) -> bool:
    """Whether this is a file with a JSON object a line, as opposed to one JSON list."""
    path = Path(source)
    if path.suffix.lower() not in (".jsonl", ".json") or not path.is_file():
        return False
    with path.open("rb") as stream:
        return not stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") or path.suffix.lower() == ".jsonl"


def check_json_lines(path: Path, columns: Sequence[str] | None = None) -> None:
    """Read a JSON Lines file line by line.

    Args:
        path: The file.
        columns: The columns to read, the context's first; those of the whole file in order of appearance when left out.

    Raises:
        ValueError: the first line that is wrong, with its number.
    """
    names = list(columns) if columns else list(dict.fromkeys(name for _, row in _objects(path) for name in row))
    for number, row in _objects(path):
        for position, name in enumerate(names):
            if name not in row:
                raise _at(path, number, f"lacks the column {name!r}, which other lines have; it has {sorted(row)}")
            try:
                text = context_text(row[name]) if position == 0 else checked_text(row[name], "It")
            except (TypeError, ValueError) as error:
                raise _at(path, number, f"has a column {name!r} that cannot be read. {error}") from error
            if not text.strip():
                raise _at(path, number, f"has an empty column {name!r}")


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise _at(path, number, f"is no JSON ({error}): {line.strip()[:80]!r}") from error
                if not isinstance(row, dict):
                    raise _at(
                        path, number, f'is no JSON object such as {{"context": ..., "response": ...}}: {line[:80]!r}'
                    )
                yield number, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}). Unpack it first if it is an archive.") from error


def _at(path: Path, number: int, problem: str) -> ValueError:
    return ValueError(f"Line {number} of {path} {problem.rstrip('.')}. Repair the line or leave it out.")


def _first_bad_cell(data: Dataset) -> BadCell | None:
    found = [
        bad
        for position, name in enumerate(data.column_names)
        if (bad := _bad_in_column(data, name, is_context=position == 0)) is not None
    ]
    return min(found, default=None, key=lambda bad: bad.row)


def _bad_in_column(data: Dataset, name: str, is_context: bool) -> BadCell | None:
    feature, cells = data.features[name], data.data.column(name)
    if cells.null_count:
        return BadCell(_first(pc.is_null(cells)), name, "is null or missing")
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        empty = pc.equal(pc.utf8_trim_whitespace(cells), "")
        return BadCell(_first(empty), name, "is empty") if pc.any(empty).as_py() else None
    if not is_context or not isinstance(feature, List):
        expected = "a text, a list of turns or a list of chat messages" if is_context else "a text"
        return BadCell(0, name, f"is {_described(feature)}, where {expected} was expected")
    empty = pc.equal(pc.list_value_length(cells), 0)
    if pc.any(empty).as_py():
        return BadCell(_first(empty), name, "is a conversation without a turn")
    nulls = pc.is_null(pc.list_flatten(cells))
    if pc.any(nulls).as_py():
        return BadCell(pc.list_parent_indices(cells)[_first(nulls)].as_py(), name, "has a turn that is null")
    if isinstance(feature.feature, Value) and feature.feature.dtype not in ("string", "large_string"):
        return BadCell(0, name, f"is a list of {feature.feature.dtype}, where turns are texts")
    if isinstance(feature.feature, Value):
        blank = pc.equal(pc.utf8_trim_whitespace(pc.list_flatten(cells)), "")
        if not pc.any(blank).as_py():
            return None
    return _first_bad_conversation(data, name)


def _first_bad_conversation(data: Dataset, name: str) -> BadCell | None:
    """Row by row, for what only reading a conversation shows: messages without content, nothing but blank turns."""
    for row, conversation in enumerate(data[name]):
        if (problem := _problem_of(conversation)) is not None:
            return BadCell(row, name, problem)
    return None


def _problem_of(conversation: Any) -> str | None:
    try:
        return None if context_text(conversation).strip() else "is empty"
    except (TypeError, ValueError) as error:
        return f"cannot be read. {error}"


def _described(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _first(mask: pa.ChunkedArray) -> int:
    """Position of the first true value."""
    return pc.index(mask, value=True).as_py()
