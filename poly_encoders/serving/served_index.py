"""An index of candidates as several requests use it: searches keep what they began with, writes take turns."""

import asyncio
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from poly_encoders.index import CandidateIndex
from poly_encoders.index.encoding import IndexModel
from poly_encoders.index.filters import clear_filter_errors
from poly_encoders.index.lance_store import ID, TABLE, TEXT, LanceStore


class ServedIndex:
    """Opened again whenever its table has another version, of whichever process.

    Args:
        path: The index's folder.
        model: A Poly- or Bi-encoder that encodes candidates as those of the index were.
        milvus: The address of a Milvus to search in, unless a search names another engine.
    """

    def __init__(self, path: str, model: Any, milvus: str | None = None) -> None:
        self.path, self._model, self._milvus = Path(path), model, milvus
        encoder = IndexModel(model)
        self.scale, self._normalize = encoder.scale, encoder.normalize
        self._writing, self._opening = asyncio.Lock(), asyncio.Lock()
        self._seen = self._mark() if LanceStore.is_there(path) else 0  # before it is opened: no change is missed
        self._index = CandidateIndex.load(path, model)

    def __len__(self) -> int:
        return len(self._index)

    def _mark(self) -> int:
        return (self.path / TABLE / "_versions").stat().st_mtime_ns

    async def current(self) -> CandidateIndex:
        """The newest version, opened once."""
        if self._mark() != self._seen:
            async with self._opening:
                if (mark := self._mark()) != self._seen:
                    index = await asyncio.to_thread(CandidateIndex.load, self.path, self._model)
                    index._mirrors = self._index._mirrors  # one connection to Milvus for all versions
                    self._index, self._seen = index, mark
        return self._index

    async def search(
        self, context: Tensor, top_k: int, condition: str | None, engine: Any = None, certify: bool = False
    ) -> Any:
        """`Hits` for one context's vectors, `(m, dim)` or `(dim,)`."""
        index = await self.current()
        contexts = normalize(context, dim=-1) if self._normalize else context
        [hits] = await asyncio.to_thread(
            index.search_vectors,
            contexts.reshape(1, -1, contexts.shape[-1]),
            top_k,
            condition,
            scale=self.scale,
            engine=engine,
            certify=certify,
            milvus=self._milvus,
        )
        return hits

    async def write(self, method: str, *args: Any, **options: Any) -> int:
        """`add`, `upsert` or `delete`, in an index object of its own: those who search keep theirs."""
        async with self._writing:
            index = await asyncio.to_thread(CandidateIndex.load, self.path, self._model)
            return int(await asyncio.to_thread(getattr(index, method), *args, **options))

    async def look(self, condition: str | None, limit: int, offset: int) -> list[dict[str, Any]]:
        """Some rows: `id`, `text` and metadata.

        Raises:
            ValueError: a condition of wrong syntax or on a missing column.
        """
        store = (await self.current()).store
        columns = [ID, TEXT, *store.metadata_columns]
        options = {"columns": columns, "filter": condition, "limit": limit, "offset": offset}
        with clear_filter_errors(store):
            table = await asyncio.to_thread(lambda: store.dataset.to_table(**options))
        return table.to_pylist()
