"""Candidates on disk: a Lance table of ids, texts, metadata and vectors.

Versions, atomic commits, deletes, filters, compaction and object stores are Lance's own. A table's schema carries how
its vectors were made, so that the two cannot part.
"""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from poly_encoders.index.extras import needs
from poly_encoders.saving import replace_file

FORMAT = 1  # of what this package writes; it reads this one and older ones
TABLE, LOCK, MODEL = "candidates.lance", ".writing.lock", ".model"  # in an index's folder
SETTINGS = b"poly_encoders"  # their key in the schema
ID, TEXT, VECTOR, ROW_HASH, VECTOR_CHECK = "id", "text", "vector", "row_hash", "vector_check"
OUR_COLUMNS = (ID, TEXT, VECTOR, ROW_HASH, VECTOR_CHECK)
ROWS_AT_ONCE = 16384  # read at a time
ROWS_IN_A_FILE = 2**20


@dataclass(frozen=True)
class IndexSettings:
    """How an index was made.

    Attributes:
        dim: Width of the vectors.
        dtype: What they are stored in, `"float16"` or `"float32"`.
        probes: What the model that encoded the candidates made of `poly_encoders.index.encoding.PROBES`, `(p, dim)`:
            who makes the same encodes the same. `None` for vectors that came without a model.
        model: Its id on the Hub, if it has one.
        name: Of this table, different from that of any other: files made of one are not taken for another's.
        format: Version of the layout.
    """

    dim: int
    dtype: str
    probes: list[list[float]] | None = None
    model: str | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    format: int = FORMAT


class LanceStore:
    """The table of one index, as of one version: what is committed later is not seen."""

    def __init__(self, path: str | os.PathLike[str], dataset: Any) -> None:
        self.path, self.dataset = Path(path), dataset
        settings = (dataset.schema.metadata or {}).get(SETTINGS)
        if settings is None or not {ID, TEXT, VECTOR} <= set(dataset.schema.names):
            raise ValueError(f"{path} holds a Lance table, but no index of candidates.")
        known = json.loads(settings)
        if known.get("format", 0) > FORMAT:
            raise ValueError(
                f"{path} is of format {known['format']}; this package reads up to {FORMAT}. Upgrade poly-encoders."
            )
        self.settings = IndexSettings(**known)

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], columns: pa.Schema, settings: IndexSettings, folder: str | None = None
    ) -> "LanceStore":
        """A new table without rows; `columns` are the metadata's, and `folder` the model's, which is never pushed."""
        lance = needs("lance")
        vector = pa.list_(pa.float16() if settings.dtype == "float16" else pa.float32(), settings.dim)
        own = [columns.field(ID), pa.field(TEXT, pa.string()), pa.field(VECTOR, vector)]
        own += [pa.field(ROW_HASH, pa.int64()), pa.field(VECTOR_CHECK, pa.uint32())]
        rest = [column for column in columns if column.name not in OUR_COLUMNS]
        schema = pa.schema([*own, *rest], metadata={SETTINGS: json.dumps(asdict(settings)).encode()})
        Path(path).mkdir(parents=True, exist_ok=True)
        if folder is not None:
            replace_file(Path(path, MODEL), folder)
        return cls(path, lance.write_dataset(schema.empty_table(), str(Path(path, TABLE)), mode="create"))

    @classmethod
    def open(cls, path: str | os.PathLike[str], version: int | None = None) -> "LanceStore":
        """
        Raises:
            FileNotFoundError: no index is there.
            ValueError: there is something else, or another version than there are.
        """
        lance = needs("lance")
        if not cls.is_there(path):
            what = "is no folder of an index" if Path(path).exists() else "does not exist"
            raise FileNotFoundError(
                f"{path} {what}. Make one with CandidateIndex.build(model, candidates, {str(path)!r})."
            )
        try:
            return cls(path, lance.dataset(str(Path(path, TABLE)), version=version))
        except (ValueError, OSError) as error:
            if version is not None and "version" in str(error):
                raise ValueError(f"{path} has no version {version}: {first_line(error)}") from error
            if str(path) in str(error):
                raise
            raise ValueError(
                f"The index {path} cannot be read; a file is missing or damaged: {first_line(error)}"
            ) from error

    @staticmethod
    def is_there(path: str | os.PathLike[str]) -> bool:
        """Whether an index was begun there: a table of which a version is committed."""
        versions = Path(path, TABLE, "_versions")
        return versions.is_dir() and any(versions.iterdir())

    def latest(self) -> "LanceStore":
        """The same table as it is now."""
        return LanceStore.open(self.path)

    @property
    def version(self) -> int:
        return int(self.dataset.version)

    @property
    def model(self) -> str | None:
        """Where to load the model from that encoded the candidates, as far as it is known here."""
        here = self.path / MODEL
        return here.read_text(encoding="utf-8") if here.is_file() else self.settings.model

    @property
    def metadata_columns(self) -> list[str]:
        return [name for name in self.dataset.schema.names if name not in OUR_COLUMNS]

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    # --- writing: each is one commit -------------------------------------------------------------------------------

    def upsert(self, rows: pa.Table, replace: bool = True) -> "LanceStore":
        """Put rows in, in place of those of the same ids, or leaving these as they are."""
        with self._alone() as dataset:
            merge = dataset.merge_insert(ID).when_not_matched_insert_all()
            (merge.when_matched_update_all() if replace else merge).execute(rows.cast(dataset.schema))
        return self.latest()

    def delete(self, condition: str) -> "LanceStore":
        with self._alone() as dataset:
            dataset.delete(condition)
        return self.latest()

    def compact(self, keep: timedelta) -> "LanceStore":
        """Few large files, without what was deleted; versions older than `keep` go."""
        with self._alone() as dataset:
            dataset.optimize.compact_files(target_rows_per_fragment=ROWS_IN_A_FILE)
            self.latest().dataset.cleanup_old_versions(older_than=keep)
        return self.latest()

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """The newest dataset, while no other process writes: of two that insert one id at once, Lance would keep both.

        Raises:
            OSError: nothing of the write is in the index, as of a full disk.
        """
        try:
            with FileLock(self.path / LOCK):
                yield self.latest().dataset
        except OSError as error:
            raise OSError(f"{self.path} is as it was before: this write failed ({first_line(error)}).") from error

    # --- reading ---------------------------------------------------------------------------------------------------

    def row_ids(self, condition: str | None = None) -> np.ndarray:
        """Lance's own ids of the rows that meet a condition, `(r,)` uint64, in the order of the table.

        A row keeps its id till it is replaced or compacted; those of later fragments are higher.
        """
        scan = self.dataset.scanner(columns=[], filter=condition, with_row_id=True)
        return scan.to_table()["_rowid"].to_numpy()

    def refuse_unreadable(self, condition: str) -> None:
        """
        Raises:
            ValueError: a condition of wrong syntax or on a missing column.
        """
        self.dataset.scanner(columns=[], filter=condition, with_row_id=True).explain_plan()

    def hashes(self) -> dict[Any, int]:
        """What identifies the rows' content, by id."""
        table = self.dataset.to_table(columns=[ID, ROW_HASH])
        return dict(zip(table[ID].to_pylist(), table[ROW_HASH].to_pylist(), strict=True))

    def rows(self, row_ids: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Row ids, and `id`, `text`, metadata and hash, of those rows or of all, in the table's order, in pieces."""
        yield from self._scan([ID, TEXT, *self.metadata_columns, ROW_HASH], row_ids)

    def vectors(self, row_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row ids and vectors `(r, dim)` of those rows, in the order of the table, piece by piece.

        Raises:
            ValueError: a vector is not as it was written.
        """
        for found, batch in self._scan([ID, VECTOR, VECTOR_CHECK], row_ids):
            yield found, self._checked_vectors(batch)

    def whole(self, row_ids: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """As `rows`, with their vectors.

        Raises:
            ValueError: a row or a vector is not as it was written.
        """
        columns = [ID, TEXT, *self.metadata_columns, ROW_HASH]
        for _, batch in self._scan([*columns, VECTOR, VECTOR_CHECK], row_ids):
            rows = batch.select(columns)
            self.checked(rows.to_pylist())
            yield rows, self._checked_vectors(batch)

    def _checked_vectors(self, batch: pa.RecordBatch) -> np.ndarray:
        vectors = as_array(batch[VECTOR])
        good = vector_checks(vectors) == batch[VECTOR_CHECK].to_numpy()
        if not good.all():
            raise ValueError(self.damaged(f"the vector of {batch[ID][int(good.argmin())].as_py()!r}"))
        return vectors

    def _scan(self, columns: list[str], row_ids: np.ndarray | None) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Only the files that hold some of the rows are read."""
        fragments = self.dataset.get_fragments()
        if row_ids is not None:
            wanted = set(np.unique(row_ids >> np.uint64(32)).tolist())
            fragments = [some for some in fragments if some.fragment_id in wanted]
        scan = self.dataset.scanner(columns=columns, with_row_id=True, fragments=fragments, batch_size=ROWS_AT_ONCE)
        for batch in scan.to_batches() if fragments else []:
            found = batch["_rowid"].to_numpy()
            batch = batch.select(columns)
            if row_ids is not None:
                mine = np.isin(found, row_ids, assume_unique=True)
                if not mine.all():
                    found, batch = found[mine], batch.filter(pa.array(mine))
            yield found, batch

    def checked(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of `rows`, without their hashes.

        Raises:
            ValueError: one is not as it was written.
        """
        for row in rows:
            if row.pop(ROW_HASH) != row_hash(row):
                raise ValueError(self.damaged(f"row {row[ID]!r}"))
        return rows

    def damaged(self, what: str) -> str:
        return (
            f"In {self.path}, {what} is not what was written: a file is damaged. Restore it, or build the index again."
        )


def row_hash(row: dict[str, Any]) -> int:
    """Of a row's text and metadata, without its id and vector: 63 bits."""
    content = {name: value for name, value in row.items() if name not in (ID, VECTOR, ROW_HASH, VECTOR_CHECK)}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def vector_checks(vectors: np.ndarray) -> np.ndarray:
    """A checksum of each of `(n, dim)` stored vectors, `(n,)` uint32."""
    return np.fromiter((zlib.crc32(row) for row in np.ascontiguousarray(vectors)), np.uint32, len(vectors))


def as_array(column: pa.Array) -> np.ndarray:
    """`(n, dim)` of a fixed-size-list column."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def as_column(vectors: np.ndarray) -> pa.Array:
    """The other way."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def first_line(error: Exception) -> str:
    """What went wrong, without where in Lance's source."""
    return str(error).split(", /")[0].splitlines()[0]
