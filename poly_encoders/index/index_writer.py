"""From batches of rows to commits: columns and types of the index, vectors, checksums; only what is new or changed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from poly_encoders.index.encoding import IndexModel
from poly_encoders.index.lance_store import (
    ID,
    ROW_HASH,
    TEXT,
    VECTOR,
    VECTOR_CHECK,
    LanceStore,
    as_column,
    row_hash,
    vector_checks,
)


class Unencoded(NamedTuple):
    """What is new or changed of a batch of rows, and how many rows were read for it."""

    changed: pa.Table
    read: int


class Encoded(NamedTuple):
    """The same with `(r, dim)` vectors; `None` for no rows."""

    changed: pa.Table
    read: int
    vectors: np.ndarray | None


Encode = Callable[[IndexModel, Iterator[Unencoded], int], Iterator[Encoded]]


def encode_here(model: IndexModel, batches: Iterator[Unencoded], batch_size: int) -> Iterator[Encoded]:
    """Batches with their vectors."""
    for batch in batches:
        texts = batch.changed[TEXT].to_pylist()
        vectors = model.candidates(texts, batch_size=batch_size, show_progress_bar=False) if texts else None
        yield Encoded(*batch, vectors)


def encode_into(
    store: LanceStore,
    model: IndexModel,
    batches: Any,
    *,
    total: int | None,
    batch_size: int,
    show_progress_bar: bool,
    replace: bool = True,
    encode: Encode = encode_here,
) -> tuple[LanceStore, int]:
    """Encode and commit what is not in the store, batch by batch; the store after it, and how many rows.

    Raises:
        ValueError: without `replace`, a row is there with another text or metadata.
    """
    store, written = store.latest(), 0
    with tqdm(total=total, desc="Encoding", unit="candidate", disable=not show_progress_bar) as bar:
        for changed, read, vectors in encode(model, _changed_rows(store, batches, replace), batch_size):
            if vectors is not None:
                store = store.upsert(stored_rows(store, changed, vectors), replace)
                written += len(changed)
            bar.update(read)
    return store, written


def _changed_rows(store: LanceStore, batches: Any, replace: bool) -> Iterator[Unencoded]:
    known = store.hashes()
    for batch in batches:
        rows = conforming(store, batch)
        ids, hashes = rows[ID].to_pylist(), rows[ROW_HASH].to_pylist()
        new = [known.get(id_) != mark for id_, mark in zip(ids, hashes, strict=True)]
        clashes = [id_ for id_, differs in zip(ids, new, strict=True) if differs and id_ in known]
        if clashes and not replace:
            raise ValueError(f"{clashes[0]!r} is in the index with another text or metadata; upsert replaces it.")
        yield Unencoded(rows.filter(pa.array(new)), len(rows))


def conforming(store: LanceStore, table: pa.Table) -> pa.Table:
    """Rows of the index's columns and types, with their hashes.

    Raises:
        ValueError: a column that the index lacks.
        TypeError: a column of another type.
    """
    schema = store.dataset.schema
    if unknown := [name for name in table.column_names if name not in schema.names]:
        columns = ", ".join(store.metadata_columns) or "none"
        raise ValueError(f"The index has no column {unknown[0]!r}; its metadata columns are: {columns}.")
    if table[ID].type != schema.field(ID).type:
        kind = schema.field(ID).type
        raise TypeError(
            f"In an index ids have one type: here {kind}, but {table[ID].type} in these rows. Convert them."
        )
    found: dict[str, Any] = {}
    for name in (ID, TEXT, *store.metadata_columns):
        kind = schema.field(name).type
        try:
            found[name] = table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind)
        except pa.ArrowException as error:
            raise TypeError(
                f"Column {name!r} of the index is {kind}, of these rows {table[name].type}: {error}."
            ) from error
    rows = pa.table(found)
    return rows.append_column(ROW_HASH, pa.array([row_hash(row) for row in rows.to_pylist()], pa.int64()))


def stored_rows(store: LanceStore, table: pa.Table, vectors: np.ndarray) -> pa.Table:
    """Conforming rows with their `(r, dim)` vectors, as they are stored.

    Raises:
        ValueError: a vector that is not finite, or not in the type that vectors are stored in.
    """
    with np.errstate(over="ignore"):
        stored = vectors.astype(store.settings.dtype)
    if len(bad := np.flatnonzero(~np.isfinite(stored).all(axis=1))):
        fits = np.isfinite(vectors[bad[0]]).all()
        came = "does not fit float16; use dtype='float32'" if fits else "holds NaN or infinity"
        raise ValueError(f"The vector of {table[ID][int(bad[0])].as_py()!r} {came}. Nothing of its batch is added.")
    table = table.append_column(VECTOR, as_column(stored))
    table = table.append_column(VECTOR_CHECK, pa.array(vector_checks(stored)))
    return table.select(store.dataset.schema.names)
