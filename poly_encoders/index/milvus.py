"""A mirror of an index in Milvus, embedded or a cluster: it finds candidates, which are scored exactly here.

The table stays the source: a mirror is one collection, renewed by what differs from it, and holds whole rows, so that
an answer comes from one place. It has one version, the newest that anybody has searched there: who opened an older one
gets the rows of that. Processes that share an index's folder renew it in turns; a search meanwhile sees a part of what
is new.

Ids go into filters as literals of ours: pymilvus's own `get`, `delete(ids=...)` and `query_iterator` escape none.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from poly_encoders.index.extras import needs
from poly_encoders.index.filters import clear_filter_errors, milvus_filter, milvus_literal
from poly_encoders.index.graph import neighbours_of
from poly_encoders.index.lance_store import ID, ROW_HASH, TEXT, VECTOR, LanceStore
from poly_encoders.index.view import Hits
from poly_encoders.scoring import top_k

LOCK = ".milvus.lock"  # in an index's folder
VERSION = "poly_encoders.version"  # of the table, a property of the collection
AT_ONCE = 512  # rows of a request: its limit is 64 MiB
MOST = 16384  # rows that an answer may have
LONGEST = 65535  # bytes of a text
LINKS, WIDTH = 32, 200  # of the graph (HNSW)
UNREACHABLE, UNREADABLE = 2, (6, 1100)  # codes: of filters milvus-lite's and Milvus's
FIELDS = {"int64": "INT64", "double": "DOUBLE", "bool": "BOOL", "string": "VARCHAR"}
STRONG = {"consistency_level": "Strong"}  # what was written is seen


class MilvusMirror:
    """The collection of one index.

    Args:
        store: The index.
        milvus: A server's address, a file name that ends in `.db` for the embedded milvus-lite, or a
            `pymilvus.MilvusClient`.

    Raises:
        ImportError: pymilvus is missing.
        ConnectionError: no server answers.
        ValueError: another address.
    """

    def __init__(self, store: LanceStore, milvus: Any) -> None:
        self.name = f"poly_encoders_{store.settings.name}"
        self.where = os.fspath(milvus) if isinstance(milvus, str | os.PathLike) else "the given client"
        self._version = -1  # that it is known to have
        with self._clear_errors():
            is_client = self.where == "the given client"
            self._client = milvus if is_client else needs("pymilvus").MilvusClient(self.where)

    # --- renewing it -----------------------------------------------------------------------------------------------

    def renew(self, store: LanceStore, show_progress_bar: bool = False) -> None:
        """Have the rows of the store's version, unless it has these or newer ones.

        Raises:
            TypeError: a metadata column of a type that Milvus lacks.
            ValueError: a text that is too long for it.
            OSError: it failed; a next call goes on.
        """
        if self._version >= store.version:
            return
        with FileLock(store.path / LOCK), self._clear_errors():
            if not self._client.has_collection(self.name):
                self._create(store)
            self._client.load_collection(self.name)
            known = self._client.describe_collection(self.name).get("properties", {})
            self._version = int(known.get(VERSION, -1))
            if self._version >= store.version:
                return
            there = self._hashes()
            rows = store.dataset.to_table(columns=[ID, ROW_HASH], with_row_id=True)
            ids, hashes = rows[ID].to_pylist(), rows[ROW_HASH].to_pylist()
            changed = [there.pop(id_, None) != mark for id_, mark in zip(ids, hashes, strict=True)]
            self._upsert(store, rows["_rowid"].to_numpy()[np.array(changed, dtype=bool)], show_progress_bar)
            if changed.count(True) >= MOST:
                self._client.flush(self.name)  # milvus-lite has no graph of what is not in files
            gone = [*there]
            for start in range(0, len(gone), AT_ONCE):
                self._client.delete(self.name, filter=_among(gone[start : start + AT_ONCE]))
            self._client.alter_collection_properties(self.name, properties={VERSION: str(store.version)})
            self._version = store.version

    def _create(self, store: LanceStore) -> None:
        types, schema = needs("pymilvus").DataType, self._client.create_schema(auto_id=False)
        for column in store.dataset.schema:
            if column.name in (ID, TEXT, ROW_HASH, *store.metadata_columns):
                kind, key = types[_field(column)], column.name == ID
                length = {"max_length": LONGEST} if kind == types.VARCHAR else {}
                schema.add_field(column.name, kind, is_primary=key, nullable=not key, **length)
        schema.add_field(VECTOR, types.FLOAT_VECTOR, dim=store.settings.dim)  # the one type that milvus-lite has
        graph = self._client.prepare_index_params()
        options = {"M": LINKS, "efConstruction": WIDTH}
        graph.add_index(VECTOR, index_type="HNSW", metric_type="IP", params=options)
        self._client.create_collection(self.name, schema=schema, index_params=graph, **STRONG)

    def _hashes(self) -> dict[Any, int]:
        """What identifies the rows' content, by id."""
        found: dict[Any, int] = {}
        after = ""
        # Of an iterator's request the answer is in the order of the ids.
        while rows := self._query(after, [ID, ROW_HASH], MOST, iterator="True", reduce_stop_for_best="True"):
            found |= {row[ID]: row[ROW_HASH] for row in rows}
            after = f"{ID} > {milvus_literal(rows[-1][ID])}"
        return found

    def _upsert(self, store: LanceStore, row_ids: np.ndarray, show_progress_bar: bool) -> None:
        kinds = {name: store.dataset.schema.field(name).type for name in store.metadata_columns}
        with tqdm(total=len(row_ids), desc="To Milvus", unit="candidate", disable=not show_progress_bar) as bar:
            for batch, vectors in store.whole(row_ids):
                columns = {ID: batch[ID], TEXT: batch[TEXT], ROW_HASH: batch[ROW_HASH]}
                columns |= {
                    name: batch[name].cast(pa.string()) if _as_text(kinds[name]) else batch[name] for name in kinds
                }
                rows = pa.table(columns).to_pylist()
                for row, vector in zip(rows, vectors.astype(np.float32), strict=True):
                    _refuse_long(row)
                    row[VECTOR] = vector
                for start in range(0, len(rows), AT_ONCE):
                    some = rows[start : start + AT_ONCE]
                    self._client.upsert(self.name, some)
                    bar.update(len(some))

    # --- searching it ----------------------------------------------------------------------------------------------

    def search(
        self,
        store: LanceStore,
        contexts: Tensor,
        k: int,
        *,
        scale: float,
        condition: str | None,
        neighbours: int | None,
    ) -> list[Hits]:
        """The k best of what each of a context's vectors finds, for `(b, m, dim)` contexts.

        Raises:
            ValueError: a k beyond what Milvus gives, a filter that cannot be read.
            OSError: it failed.
        """
        if k > MOST:
            raise ValueError(f"top_k is {k}; Milvus gives up to {MOST}. Take engine='exact' for more.")
        where = ""
        if condition is not None:
            with clear_filter_errors(store):
                store.refuse_unreadable(condition)
            where = milvus_filter(condition)
        with self._clear_errors(condition):
            return [self._hits(store, context, k, scale, where, neighbours) for context in contexts.float().cpu()]

    def _hits(
        self, store: LanceStore, context: Tensor, k: int, scale: float, where: str, neighbours: int | None
    ) -> Hits:
        found, all_of_them = self._near(context, k, where, neighbours)
        ids = sorted(found)
        vectors = np.array([found[id_] for id_ in ids], dtype=store.settings.dtype)
        best = top_k(context[None], torch.from_numpy(vectors.reshape(-1, context.shape[1])), k, scale=scale)
        scores = dict(zip([ids[place] for place in best.indices[0].tolist()], best.scores[0].tolist(), strict=True))
        names = [ID, TEXT, *store.metadata_columns]
        rows = {row[ID]: row for row in self._query(_among([*scores]), names, MOST)} if scores else {}
        read = [{ID: id_, "score": scores[id_]} | _as_stored(store, rows[id_]) for id_ in scores if id_ in rows]
        share = 1.0 if all_of_them else min(1.0, len(found) / max(1, len(store)))
        return Hits(read, all_of_them, share)

    def _near(self, context: Tensor, k: int, where: str, neighbours: int | None) -> tuple[dict[Any, Any], bool]:
        """Vectors by id that are near one of an `(m, dim)` context's, and whether no others meet the condition."""
        used = context[(context != 0).any(dim=1)].numpy()
        limit = min(MOST, neighbours_of(len(used), k, neighbours))
        lists = self._client.search(
            self.name,
            data=[*used],
            anns_field=VECTOR,
            limit=limit,
            filter=where,
            search_params={"metric_type": "IP", "params": {"ef": 2 * limit}},
            output_fields=[VECTOR],
            **STRONG,
        )
        found = {hit[ID]: hit["entity"][VECTOR] for hits in lists for hit in hits}
        if len(found) >= limit:
            return found, False
        number = self._client.query(self.name, filter=where, output_fields=["count(*)"], **STRONG)[0]["count(*)"]
        if len(found) < min(k, number):  # a filter has cut the links to others
            found = {row[ID]: row[VECTOR] for row in self._query(where, [ID, VECTOR], MOST)}
        return found, len(found) == number

    def _query(self, where: str, fields: Sequence[str], limit: int, **options: Any) -> list[dict[str, Any]]:
        found = self._client.query(self.name, filter=where, output_fields=[*fields], limit=limit, **STRONG, **options)
        return [*found]

    @contextmanager
    def _clear_errors(self, condition: str | None = None) -> Iterator[None]:
        exceptions = needs("pymilvus").exceptions
        try:
            yield
        except exceptions.MilvusException as error:
            said = error.message.splitlines()[0]
            addresses = (
                "a server's address (http://localhost:19530) or a file name in .db, open in one process at a time"
            )
            if isinstance(error, exceptions.ConnectionConfigException):
                raise ValueError(f"No Milvus opens as {self.where!r} ({said}). Give {addresses}.") from error
            if error.code == UNREACHABLE:
                raise ConnectionError(
                    f"No Milvus answers at {self.where} ({said}). Start it, or give {addresses}."
                ) from error
            if condition is not None and error.code in UNREADABLE:
                raise ValueError(
                    f"Milvus cannot read the filter {condition!r}: {said}. It knows comparisons, AND, OR, NOT, IN, "
                    "LIKE and IS NULL; engine='exact' knows all of SQL."
                ) from error
            raise OSError(f"Milvus at {self.where} failed: {said}") from error


def _field(column: pa.Field) -> str:
    """Milvus's type for a column.

    Raises:
        TypeError: it has none.
    """
    if name := FIELDS.get(str(column.type)):
        return name
    if _as_text(column.type):
        return FIELDS["string"]
    if pa.types.is_nested(column.type):
        return "JSON"
    raise TypeError(
        f"Column {column.name!r} is {column.type}, which Milvus cannot hold. Make it a text or a number, or take "
        "engine='exact' or 'ann'."
    )


def _as_text(kind: pa.DataType) -> bool:
    """Whether values go in as texts: in the order of time, and read again without loss."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _as_stored(store: LanceStore, row: dict[str, Any]) -> dict[str, Any]:
    """Milvus's row as the table has it."""
    found = {}
    for name in (ID, TEXT, *store.metadata_columns):
        value, kind = row[name], store.dataset.schema.field(name).type
        found[name] = pa.array([value], pa.string()).cast(kind)[0].as_py() if _as_text(kind) else value
    return found


def _refuse_long(row: dict[str, Any]) -> None:
    for name, value in row.items():
        if isinstance(value, str) and len(value) > LONGEST // 4 and (size := len(value.encode())) > LONGEST:
            raise ValueError(
                f"{name!r} of the candidate {row[ID]!r} has {size:,} bytes; Milvus holds up to {LONGEST:,}. "
                "Shorten it, or take engine='exact' or 'ann'."
            )


def _among(ids: Sequence[str | int]) -> str:
    """A filter in Milvus's words."""
    return f"{ID} in [{', '.join(map(milvus_literal, ids))}]"
