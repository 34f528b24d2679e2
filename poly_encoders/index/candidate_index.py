"""An index of candidates: built once, searched from disk, changed while it is read."""

import os
import shutil
import threading
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from poly_encoders.index.derived_files import FOLDER, damaged_files, newest_derived
from poly_encoders.index.encoding import IndexModel
from poly_encoders.index.extras import needs
from poly_encoders.index.filters import clear_filter_errors, sql_literal
from poly_encoders.index.given_vectors import given_batches
from poly_encoders.index.index_hub import download, push
from poly_encoders.index.index_writer import conforming, encode_here, encode_into, stored_rows
from poly_encoders.index.lance_store import ID, TABLE, IndexSettings, LanceStore, first_line
from poly_encoders.index.milvus import MilvusMirror
from poly_encoders.index.ray_encoding import encode_in_ray
from poly_encoders.index.row_batches import row_batches
from poly_encoders.index.view import Hits, View
from poly_encoders.modeling.text_poly_encoder import checked_count
from poly_encoders.two_sided import TwoSidedEncoder, is_single_context, refuse_other_lengths

Engine = Literal["exact", "ann", "milvus"]
EXACT_UP_TO = 300_000  # rows that the exact engine searches unless told


class CandidateIndex:
    """Candidates with ids, texts, metadata and vectors in a folder, searched with a model.

    An index object sees the version that it opened, and its own changes; `refresh` opens the newest. Others may read
    and write the same folder meanwhile.

    Example:
        >>> index = CandidateIndex.build(model, ["Fine, thanks.", "Forty-two."], "replies")  # doctest: +SKIP
        >>> index.search(["Hi!", "How are you?"], top_k=1)[0]["text"]  # doctest: +SKIP
    """

    def __init__(self, store: LanceStore, model: TwoSidedEncoder | None = None) -> None:
        self.store = store
        self._model = None if model is None else IndexModel(model)
        self._view: View | None = None
        self._mirrors: dict[Any, MilvusMirror] = {}
        self._preparing = threading.Lock()  # of threads that search first, one makes what all of them read
        if self._model is not None:
            self._model.refuse_other(store.settings.probes, store.settings.dim, store.path)

    # --- making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: TwoSidedEncoder,
        candidates: Any,
        path: str | os.PathLike[str],
        *,
        dtype: Literal["float16", "float32"] = "float16",
        batch_size: int = 32,
        show_progress_bar: bool = True,
        ray: bool = False,
    ) -> "CandidateIndex":
        """Encode candidates into a new index, or into one that is there: only what is new or has changed.

        Rows are committed some thousand at a time, so that whoever runs it again after a kill goes on from there.

        Args:
            model: A PolyEncoder or BiEncoder.
            candidates: Texts, rows, a data set or files; see `poly_encoders.index.row_batches`. They are streamed.
            path: The index's folder.
            dtype: What vectors are stored in.
            batch_size: As in `encode`.
            show_progress_bar: Show one, with the rate.
            ray: Encode on a Ray cluster: that of `ray.init`, if it was called.

        Raises:
            TypeError, ValueError: what is no candidate, duplicate ids, empty texts, another model's index.
            OSError: a folder that cannot be written, a full disk; what was committed before stays.
        """
        encoder = IndexModel(model)
        if ray:
            needs("ray")  # before anything is made
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is 'float16' or 'float32', not {dtype!r}.")
        batches = row_batches(candidates)
        if LanceStore.is_there(path):
            index = cls.load(path, model)
        else:
            first = next(batches, None)
            if first is None:
                raise ValueError("There are no candidates to build an index of.")
            settings = IndexSettings(encoder.dim, dtype, encoder.probes(), encoder.hub_id)
            index = cls(LanceStore.create(path, first.schema, settings, encoder.folder))
            index._model = encoder
            batches = chain([first], batches)
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        index._write(batches, candidates, encode=encode_in_ray if ray else encode_here, **options)
        return index

    @classmethod
    def from_vectors(
        cls,
        vectors: Any,
        ids: Any = None,
        texts: Any = None,
        path: str | os.PathLike[str] = "index",
        *,
        metadata: Any = None,
        model: TwoSidedEncoder | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        show_progress_bar: bool = True,
    ) -> "CandidateIndex":
        """An index of vectors that are there.

        Args:
            vectors: `(n, dim)`: numpy or a memory map, a tensor, an Arrow fixed-size-list column, a FAISS index that
                can reconstruct its vectors, or a Lance table with a column `vector`.
            ids: One for each; positions where they are left out. Of a Lance table the name of the column.
            texts: One for each, or none. Of a Lance table the name of the column.
            path: A folder that is new.
            metadata: An Arrow table or a dict of columns.
            model: Who encoded them, if it is known: then they can be searched with no other.
            dtype: What they are stored in.
            show_progress_bar: Show one.

        Raises:
            TypeError, ValueError: vectors of another shape, NaN, other numbers of ids and texts, duplicate ids.
            FileExistsError: an index is there already.
        """
        if LanceStore.is_there(path):
            raise FileExistsError(f"{path} is an index already. Choose another folder, or add to it.")
        encoder = None if model is None else IndexModel(model)
        batches = given_batches(vectors, ids, texts, metadata)
        first = next(batches, None)
        if first is None:
            raise ValueError("There are no vectors to make an index of.")
        dim = first[1].shape[1]
        if encoder is not None:
            encoder.refuse_other(None, dim, "the vectors given")
            if encoder.normalize or getattr(encoder.model, "scores_are_cosines", False):
                refuse_other_lengths(_tensor(first[1]))
        if encoder is None:
            store = LanceStore.create(path, first[0].schema, IndexSettings(dim, dtype))
        else:
            settings = IndexSettings(dim, dtype, encoder.probes(), encoder.hub_id)
            store = LanceStore.create(path, first[0].schema, settings, encoder.folder)
        index = cls(store)
        index._model = encoder
        try:
            with tqdm(desc="Adding", unit="candidate", disable=not show_progress_bar) as bar:
                for table, rows in chain([first], batches):
                    index._set(index.store.upsert(stored_rows(index.store, conforming(index.store, table), rows)))
                    bar.update(len(rows))
        except BaseException:
            shutil.rmtree(Path(path, TABLE))  # nobody could go on with a part of it
            raise
        return index

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: TwoSidedEncoder | None = None, version: int | None = None
    ) -> "CandidateIndex":
        """Open an index; without a model to look at it, or to search by vectors.

        Raises:
            FileNotFoundError: no index is there.
            ValueError: candidates were encoded otherwise than by this model; damaged files; a newer format.
        """
        return cls(LanceStore.open(path, version), model)

    @classmethod
    def from_pretrained(
        cls, repo_id: str, model: TwoSidedEncoder | None = None, *, revision: str | None = None, token: Any = None
    ) -> "CandidateIndex":
        """Download an index from the Hub, where it is a data set, or open a local one."""
        return cls.load(repo_id if Path(repo_id).is_dir() else download(repo_id, revision, token), model)

    def refresh(self) -> "CandidateIndex":
        """See what others have changed since; returns itself."""
        self._set(self.store.latest())
        return self

    # --- what is in it ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.store)

    def info(self) -> dict[str, Any]:
        """Counts, sizes in bytes, and how it was made."""
        settings, path = self.store.settings, self.store.path
        return {
            "candidates": len(self),
            "dim": settings.dim,
            "dtype": settings.dtype,
            "model": self.store.model,
            "version": self.store.version,
            "metadata": self.store.metadata_columns,
            "table_bytes": _size(path / TABLE),
            "derived_bytes": _size(path / FOLDER),
            "format": settings.format,
        }

    def verify(self) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            ValueError: names what is damaged.
        """
        if damaged := damaged_files(self.store):
            raise ValueError(f"{damaged[0]} is damaged. Delete its folder: it is made again from the table.")
        try:
            for _ in self.store.vectors(np.sort(self.store.row_ids())):
                pass
            for _, batch in self.store.rows():
                self.store.checked(batch.to_pylist())
        except (ValueError, OSError) as error:
            if str(self.store.path) in str(error):
                raise
            raise ValueError(f"The table of {self.store.path} is damaged: {first_line(error)}") from error

    # --- changing it -----------------------------------------------------------------------------------------------

    def add(self, candidates: Any, *, batch_size: int = 32, show_progress_bar: bool = False) -> int:
        """Add candidates; those that are there already, the same, are left. Returns how many are new.

        Raises:
            ValueError: an id is there with another text or metadata; `upsert` replaces it. Batches before it are added.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        return self._write(row_batches(candidates), candidates, replace=False, **options)

    def upsert(self, candidates: Any, *, batch_size: int = 32, show_progress_bar: bool = False) -> int:
        """Add candidates in place of those of the same ids. Returns how many were new or changed."""
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        return self._write(row_batches(candidates), candidates, **options)

    def delete(
        self,
        ids: Sequence[str | int] | None = None,
        *,
        filter: str | None = None,  # noqa: A002
    ) -> int:
        """Delete candidates by their ids, or those that meet a condition in SQL. Returns how many there were.

        Raises:
            ValueError: neither or both given, or a condition of wrong syntax or on a missing column.
        """
        if (ids is None) == (filter is None):
            raise ValueError("Give the ids to delete, or a filter.")
        if isinstance(ids, str):
            raise TypeError(f"ids is the text {ids!r}; expected a list of ids.")
        before = len(self.store.latest())
        if ids is not None:
            for start in range(0, len(ids), 1000):
                listed = ", ".join(map(sql_literal, ids[start : start + 1000]))
                self._set(self.store.latest().delete(f"{ID} IN ({listed})"))
        else:
            with clear_filter_errors(self.store):
                self._set(self.store.latest().delete(str(filter)))
        return before - len(self)

    def compact(self, keep_versions_of: timedelta = timedelta(days=7), show_progress_bar: bool = False) -> None:
        """Merge small files, drop deleted rows, forget versions older than this, and make the derived files again."""
        known = newest_derived(self.store)
        self._set(self.store.latest().compact(keep_versions_of))
        self._view = View(self.store, known is not None and known.graph is not None, show_progress_bar)

    # --- searching -------------------------------------------------------------------------------------------------

    def search(
        self,
        contexts: Any,
        top_k: int = 10,
        filter: str | None = None,  # noqa: A002
        *,
        engine: Engine | None = None,
        milvus: Any = None,
        neighbours: int | None = None,
        certify: bool = False,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> Any:
        """The best candidates for contexts.

        Args:
            contexts: A list of contexts, each a text, a list of turns or of chat messages; or a single text.
            top_k: How many for each; all where there are fewer.
            filter: Which to choose from: a condition on the metadata in SQL, such as `"year > 2020 AND tag = 'faq'"`.
            engine: `"exact"` scores all of them; `"ann"` those that a graph of near candidates finds, after it was made
                once; `"milvus"` those that Milvus finds. Up to 300,000 candidates exact by default.
            milvus: Where that is: `"http://host:19530"`, `"candidates.db"` for one in this process, or a
                `pymilvus.MilvusClient`. The first search copies the candidates there, later ones what has changed.
            neighbours: How many each context vector looks for but with `"exact"`: 64, or 16 where there are many.
            certify: Have a proven answer at any rate: score all where the engine could not prove its own.
            show_progress_bar: Show one while files are made.
            **options: Of `encode_query`.

        Returns:
            A list of `Hits` for each context; for a single text its `Hits`.

        Raises:
            ValueError: no model, a filter of wrong syntax or on a missing column, an unknown engine.
            OSError: Milvus cannot be reached, or failed.
        """
        if self._model is None:
            raise ValueError(
                "This index was opened without a model: CandidateIndex.load(path, model) searches by texts."
            )
        single = is_single_context(contexts)
        vectors = self._model.contexts([contexts] if single else contexts, show_progress_bar=False, **options)
        found = self.search_vectors(
            vectors,
            top_k,
            filter,
            scale=self._model.scale,
            engine=engine,
            milvus=milvus,
            neighbours=neighbours,
            certify=certify,
            show_progress_bar=show_progress_bar,
        )
        return found[0] if single else found

    def search_vectors(
        self,
        contexts: Any,
        top_k: int = 10,
        filter: str | None = None,  # noqa: A002
        *,
        scale: float,
        engine: Engine | None = None,
        milvus: Any = None,
        neighbours: int | None = None,
        certify: bool = False,
        show_progress_bar: bool = False,
    ) -> list[Hits]:
        """As `search`, for `(n, m, dim)` context vectors and a model's `final_scale`."""
        if engine not in (None, "exact", "ann", "milvus"):
            raise ValueError(f"engine is 'exact', 'ann' or 'milvus', not {engine!r}.")
        if engine == "milvus" and milvus is None:
            raise ValueError("engine='milvus' needs milvus=: a server's address, or a file name that ends in .db.")
        if engine is None:
            engine = "milvus" if milvus is not None else "exact" if len(self) <= EXACT_UP_TO else "ann"
        k = checked_count(top_k, "top_k", least=0) or 0
        given: dict[str, Any] = {"scale": scale, "condition": filter}
        given["neighbours"] = checked_count(neighbours, "neighbours")
        if engine == "milvus" and not certify:
            with self._preparing:
                if milvus not in self._mirrors:
                    self._mirrors[milvus] = MilvusMirror(self.store, milvus)
                mirror = self._mirrors[milvus]
                mirror.renew(self.store, show_progress_bar)
            return mirror.search(self.store, _tensor(contexts), k, **given)
        approximate = engine == "ann" and not certify  # a graph proves nothing: a proof takes all of them
        with self._preparing:
            if self._view is None or (approximate and not self._view.has_graph):
                self._view = View(self.store, approximate, show_progress_bar)
            view = self._view
        with clear_filter_errors(self.store):
            found = view.search(_tensor(contexts), k, approximate=approximate, **given)
        return view.hits(found)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: Any = None) -> str:
        """Upload it as a data set, with a card; derived files stay here. Returns the address."""
        return push(self.store, repo_id, private, token)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _set(self, store: LanceStore) -> None:
        self.store, self._view = store, None

    def _write(self, batches: Any, candidates: Any, **options: Any) -> int:
        if self._model is None:
            raise ValueError("This index was opened without a model, which is needed to encode candidates.")
        has_length = hasattr(candidates, "__len__") and not isinstance(candidates, str)
        total = len(candidates) if has_length else None
        try:
            store, written = encode_into(self.store, self._model, batches, total=total, **options)
        except BaseException:
            self.refresh()  # what was committed before stays
            raise
        self._set(store)
        return written


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _tensor(vectors: Any) -> torch.Tensor:
    return vectors if isinstance(vectors, torch.Tensor) else torch.as_tensor(np.asarray(vectors))
