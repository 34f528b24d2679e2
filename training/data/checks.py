"""What is wrong with a data set, said with the place where it is: the line of a file, the row of a data set.

The first column of texts holds contexts, the second positives, any further ones negatives. A column `scores` holds what
a teacher gave each row's candidates; `label`, `labels` or `score` say whether the one candidate of a row is a positive.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from poly_encoders.modeling.text_poly_encoder import checked_text, context_text
from poly_encoders.tasks import json_objects

logger = logging.getLogger(__name__)

SCORES = "scores"
LABELS = ("label", "labels", "score")
NO_TEXTS = (*LABELS, SCORES, "dataset_name")  # the last is sentence-transformers' own
ROWS_AT_ONCE = 1000


def checked_examples(data: Any, what: str, keep_labels: bool = False, unread: Sequence[str] = ()) -> Any:
    """Data that a user gives, if one can train on them; rows labelled 0 are left out, and columns of labels.

    Args:
        data: A `Dataset` or a dict of them, whose format is applied and taken off; a transform stays, and the columns
            are those that it makes. An `IterableDataset`, whose columns alone are looked at. `None`.
        what: What errors call it: `"train_dataset"`, or the file it is from.
        keep_labels: Leave label columns as they are, for a loss that wants them.
        unread: Label columns that may hold anything, as they were chosen not to be read; 0 and 1 are honoured still.

    Raises:
        ValueError: no row, fewer than two columns of texts, a cell that is null, empty or no text, labels other than 0
            and 1 or beside several candidates, scores that do not fit.
    """
    if isinstance(data, dict):
        parts = {name: checked_examples(part, f"{what}[{name!r}]", keep_labels, unread) for name, part in data.items()}
        return type(data)(parts)
    if not isinstance(data, Dataset | IterableDataset) or data.column_names is None:
        return data
    if isinstance(data, Dataset) and not len(data):
        raise ValueError(f"{what} has no rows.")
    if isinstance(data, Dataset) and not is_transformed(data):
        data = data.select_columns(list(data[0])).with_format(None)
    if len(text_columns(data)) < 2:
        raise ValueError(
            f"{what} has the columns {row_columns(data)}; training needs a context and a candidate, and "
            f"columns named {', '.join(NO_TEXTS)} are neither."
        )
    if isinstance(data, Dataset):  # with all its rows still, so that they are named by their numbers
        check_cells(data, what)
        if SCORES in row_columns(data) and not keep_labels:
            check_scores(data, what)
    return data if keep_labels else _positives(data, what, unread)


def _positives(data: Any, what: str, unread: Sequence[str]) -> Any:
    """The rows that are not labelled 0, without the labels."""
    for name in (name for name in row_columns(data) if name in LABELS):
        values = [] if isinstance(data, IterableDataset) or is_transformed(data) else list(data[name])
        if len(text_columns(data)) == 2 and values and all(value in (0, 1) for value in values):
            kept = [row for row, value in enumerate(values) if value == 1]
            if not kept:
                raise ValueError(f"Every row of {what} has a 0 in the column {name!r}, so there is no positive.")
            if number := len(values) - len(kept):
                logger.warning("%s: leaving out %d rows of %d, whose %s is 0.", what, number, len(values), name)
                data = data.select(kept)
        elif name not in unread:
            raise ValueError(
                f"{what} has a column {name!r}. Labels are understood where they are 0 or 1 beside one candidate, in "
                "data neither streamed nor transformed; elsewhere every row must be a positive. Keep those that are: "
                f"data.filter(lambda row: row[{name!r}] == 1).remove_columns({name!r}), or read other --columns."
            )
        data = data.remove_columns(name)
    return data


def is_transformed(data: Any) -> bool:
    """Whether a function makes the rows of a data set whenever they are read (`Dataset.set_transform`)."""
    return isinstance(data, Dataset) and data.format["type"] == "custom"


def row_columns(data: Any) -> list[str]:
    """The columns of the rows as they come: a transform may make others than the data set has."""
    return list(next(iter(data), ()) if is_transformed(data) else data.column_names)


def text_columns(data: Any) -> list[str]:
    """The columns that hold texts: all but those of labels and of a teacher's scores."""
    return [name for name in row_columns(data) if name not in NO_TEXTS]


def cells(data: Dataset, column: str) -> Iterator[Any]:
    """A column of the rows as they come."""
    data = data if is_transformed(data) else data.select_columns(column)
    return (cell for batch in data.iter(ROWS_AT_ONCE) for cell in batch[column])


def settled(data: Dataset) -> Dataset:
    """The rows as they come, as a data set without a transform; a TypeError where it is no single one in memory."""
    if not isinstance(data, Dataset):
        raise TypeError(f"Give one Dataset, not a {type(data).__name__}: choose a split.")
    return Dataset.from_list(list(data)) if is_transformed(data) else data


def check_cells(data: Dataset, source: str) -> None:
    """See that every cell can be read; a ValueError names the first that cannot, in JSON Lines by its line."""
    names = text_columns(data)
    rows = (row for batch in data.iter(ROWS_AT_ONCE) for row in zip(*(batch[name] for name in names), strict=True))
    for number, row in enumerate(rows, start=1):
        for name, cell in zip(names, row, strict=True):
            if problem := _problem(cell, is_context=name == names[0]):
                raise ValueError(
                    f"{_place(source, number)} of {source}: the column {name!r} {problem}. Repair it or leave it out, "
                    f"or read other --columns than {names}."
                )


def _problem(cell: Any, is_context: bool) -> str | None:
    if cell is None:
        return "is null or missing"
    try:
        text = context_text(cell) if is_context else checked_text(cell, "It")
    except (TypeError, ValueError) as error:
        return f"cannot be read. {error}".rstrip(".")
    return None if text.strip() else "is empty"


def _place(source: str, row: int) -> str:
    path = Path(source)
    if path.suffix.lower() in (".jsonl", ".json") and path.is_file():
        with suppress(ValueError):  # it may be one JSON list
            return f"Line {next(islice(json_objects(path), row - 1, None))[0]}"
    return f"Row {row}"


def check_scores(data: Dataset, source: str) -> None:
    """See that every row has a teacher's scores: as many finite numbers as candidates; a ValueError names the first."""
    number = len(text_columns(data)) - 1
    for row, scores in enumerate(cells(data, SCORES), start=1):
        fits = isinstance(scores, list) and len(scores) == number
        if not fits or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
            raise ValueError(
                f"{_place(source, row)} of {source} has the scores {scores!r:.80}; expected {number} finite numbers, "
                "one for each candidate column. Score the data anew with training/distill.py."
            )
