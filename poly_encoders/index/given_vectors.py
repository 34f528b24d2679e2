"""Vectors that somebody has already, in whatever holds them, with their ids, texts and metadata."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from poly_encoders.index.lance_store import ID, TEXT, VECTOR, as_array
from poly_encoders.index.row_batches import BATCH, row_batches

AT_ONCE = 4 * BATCH  # rows of one commit


def given_batches(vectors: Any, ids: Any, texts: Any, metadata: Any) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Tables of `id`, `text` and metadata with their `(r, dim)` vectors.

    Raises:
        TypeError: what holds no vectors, or ids of mixed type.
        ValueError: another shape, other numbers of ids, texts or metadata, duplicate ids.
    """
    if hasattr(vectors, "to_batches") and VECTOR in getattr(vectors, "schema", pa.schema([])).names:
        table = vectors.to_table(columns=[ids or ID, *([texts] if texts else [])])
        ids, texts = table[ids or ID].to_pylist(), table[texts].to_pylist() if texts else None
        pieces = (as_array(batch[VECTOR]) for batch in vectors.to_batches(columns=[VECTOR], batch_size=AT_ONCE))
        number = len(table)
    else:
        held = _held(vectors)
        number = len(held)
        pieces = (np.asarray(held[start : start + AT_ONCE]) for start in range(0, number, AT_ONCE))
    columns: dict[str, Sequence[Any]] = {ID: range(number) if ids is None else [_plain(one) for one in ids]}
    if texts is not None:
        columns[TEXT] = texts
    rest = metadata.to_pydict() if isinstance(metadata, pa.Table) else metadata or {}
    for name, column in (columns | rest).items():
        if len(column) != number:
            raise ValueError(f"{number} vectors came with {len(column)} values of {name!r}; give one for each.")
    columns |= rest
    rows = ({name: column[place] for name, column in columns.items()} for place in range(number))
    waiting = np.empty((0, 0), dtype=np.float32)
    source = iter(pieces)
    for table in row_batches(rows, AT_ONCE, need_text=False):
        while len(waiting) < len(table):
            piece = next(source)
            waiting = np.concatenate([waiting, piece]) if len(waiting) else piece
        yield table, waiting[: len(table)]
        waiting = waiting[len(table) :]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value.as_py() if isinstance(value, pa.Scalar) else value


def _held(vectors: Any) -> Any:
    """An array `(n, dim)` of floating-point numbers that can be sliced."""
    if isinstance(vectors, pa.Array | pa.ChunkedArray):
        if not pa.types.is_fixed_size_list(vectors.type):
            raise TypeError(
                f"The Arrow column is of {vectors.type}; expected a fixed-size list of floating-point numbers."
            )
        vectors = as_array(vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors)
    elif hasattr(vectors, "reconstruct_n"):  # of FAISS
        vectors = vectors.reconstruct_n(0, vectors.ntotal)
    elif isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().cpu().float().numpy()
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f":
        what = getattr(vectors, "dtype", type(vectors).__name__)
        raise TypeError(f"Vectors are {what}; expected an array (n, dim) of floating-point numbers.")
    if vectors.ndim != 2 or 0 in vectors.shape[1:]:
        raise ValueError(f"Vectors have shape {vectors.shape}; expected (n, dim).")
    return vectors
