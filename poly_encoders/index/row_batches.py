"""Candidates in whatever holds them, as checked Arrow tables of some thousand rows, read one after the other."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from poly_encoders.index.lance_store import ID, OUR_COLUMNS, TEXT
from poly_encoders.modeling.text_poly_encoder import candidate_texts

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
RESERVED = {"score", *OUR_COLUMNS} - {ID, TEXT}
BATCH = 4096  # rows of one commit: what a kill may lose


def row_batches(candidates: Any, size: int = BATCH, need_text: bool = True) -> Iterator[pa.Table]:
    """Tables of `id`, `text` and metadata, of so many rows at most.

    Args:
        candidates: Texts; mappings with a `text`, an `id` and any metadata; a `datasets.Dataset` or iterable one; the
            path of a `.jsonl`, `.json`, `.csv`, `.parquet`, `.arrow` or `.txt` file, or a list of paths; or a Hub data
            set's id. Rows without an `id` get their position.
        size: Rows of a table.
        need_text: Refuse empty texts.

    Raises:
        TypeError: what is no candidate, ids or metadata of mixed type.
        ValueError: duplicate or missing ids, empty texts, a metadata column with a name of ours.
        FileNotFoundError: a file that is not there.
    """
    rows = enumerate(_rows(candidates))
    seen: set[int] = set()  # hashes: of a hundred million ids themselves would take too much room
    schema = None
    while batch := [*islice(rows, size)]:
        complete = [_complete(number, row, need_text) for number, row in batch]
        for (number, _), row in zip(batch, complete, strict=True):
            if (mark := hash(row[ID])) in seen:
                raise ValueError(
                    f"Candidate {number} has the id {row[ID]!r}, which another has already. Ids must differ."
                )
            seen.add(mark)
        try:
            table = pa.Table.from_pylist(complete, schema) if schema else _first_table(complete)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            what = f"candidates {batch[0][0]} to {batch[-1][0]}"
            raise TypeError(
                f"A column has values of mixed types in {what}: {error}. Give each column one type."
            ) from error
        if need_text:
            candidate_texts(table[TEXT].to_pylist())
        schema = table.schema
        yield table


def _rows(candidates: Any) -> Iterator[Any]:
    import datasets  # here, because it takes a while

    if isinstance(candidates, str | os.PathLike):
        candidates = _read(candidates)
    elif isinstance(candidates, Mapping) or not isinstance(candidates, Iterable):
        raise TypeError(f"Candidates are a {type(candidates).__name__}; expected texts, rows, a data set or files.")
    elif isinstance(candidates, datasets.Dataset | datasets.IterableDataset):
        candidates = iter(candidates)
    else:
        candidates = iter(candidates)
        first = [*islice(candidates, 1)]
        if first and isinstance(first[0], os.PathLike):
            return chain.from_iterable(_read(path) for path in chain(first, candidates))
        candidates = chain(first, candidates)
    return iter(candidates)


def _read(source: str | os.PathLike[str]) -> Iterator[Any]:
    """Rows of a file or of a Hub data set, which is streamed."""
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} to read candidates from.")
        found = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    elif path.exists() or str(source).count("/") > 1:
        raise ValueError(
            f"{path} is no file of candidates: expected one of {', '.join(BUILDERS)}, or a Hub data set's id."
        )
    else:
        found = load_dataset(str(source), split="train", streaming=True)
    return iter(found)


def _complete(number: int, row: Any, need_text: bool) -> dict[str, Any]:
    """A row with an id and a text."""
    if isinstance(row, str):
        row = {TEXT: row}
    if not isinstance(row, Mapping):
        raise TypeError(f"Candidate {number} is a {type(row).__name__}; expected a text or a mapping with `text`.")
    if clash := sorted(RESERVED & row.keys()):
        raise ValueError(f"Candidate {number} has a column {clash[0]!r}, a name that the index itself uses. Rename it.")
    found = {ID: row.get(ID, number), **{name: value for name, value in row.items() if name != ID}}
    if found[ID] is None or isinstance(found[ID], bool | float) or not isinstance(found[ID], str | int):
        raise TypeError(f"Candidate {number} has the id {found[ID]!r}; ids are texts or whole numbers.")
    text = found.get(TEXT)
    if need_text and (not isinstance(text, str) or not text.strip()):
        raise ValueError(f"Candidate {number} (id {found[ID]!r}) has the text {text!r}; give it one, or leave it out.")
    found.setdefault(TEXT, None)
    return found


def _first_table(rows: list[dict[str, Any]]) -> pa.Table:
    """With all columns that any of the rows has."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    fields = [pa.field(f.name, pa.string()) if f.name == TEXT or pa.types.is_null(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields))
