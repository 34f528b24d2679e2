"""A graph of near candidates (HNSW, of FAISS): each context vector finds its own nearest, all of which are scored.

A candidate that is among the best by a Poly-encoder's score, which lies between its dots with the context vectors, is
among the nearest of at least one of them, or nearly so: on vectors of trained models the union holds 99 % of the best
ten and more, with one vector a turn and with 64 codes (docs/index.md has the figures, also where it does not).
"""

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from poly_encoders.index.extras import needs

LINKS = 32
WIDTH = 200  # of the search for neighbours, when the graph is made
SAMPLE = 65536  # candidates that the 8-bit codes are fitted to
ROWS_AT_ONCE = 16384
NEIGHBOURS = 64  # that a context vector looks for; a quarter where there are many of these
MANY = 16  # context vectors


class Graph:
    """A graph mapped from its file: rows are found by their position among those that it was made of."""

    def __init__(self, path: Path) -> None:
        faiss = needs("faiss")
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def nearest(self, context: np.ndarray, k: int, where: np.ndarray | None, neighbours: int | None) -> np.ndarray:
        """Positions, ascending, of candidates that are near one of `(m, dim)` float32 context vectors.

        `where`, `(n,)` booleans, says which to choose from.
        """
        faiss = needs("faiss")
        wanted = neighbours_of(len(context), k, neighbours)
        options = faiss.SearchParametersHNSW(efSearch=2 * wanted)
        if where is not None:
            bits = np.packbits(where, bitorder="little")
            options.sel = faiss.IDSelectorBitmap(bits)
        found = self._index.search(np.ascontiguousarray(context), wanted, params=options)[1]
        return np.unique(found[found >= 0])


def neighbours_of(vectors: int, k: int, wanted: int | None) -> int:
    """How many each of a context's vectors looks for."""
    return max(k, wanted or (NEIGHBOURS if vectors <= MANY else NEIGHBOURS // 4))


def build_graph(vectors: np.ndarray, path: Path, show_progress_bar: bool = False) -> None:
    """Write the graph of `(n, dim)` vectors to a file. Its codes have 8 bits: final scores come from elsewhere."""
    faiss = needs("faiss")
    n, dim = vectors.shape
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = WIDTH
    graph.train(np.ascontiguousarray(vectors[:: max(1, n // SAMPLE)], dtype=np.float32))
    with tqdm(total=n, desc="Linking", unit="candidate", disable=not show_progress_bar) as bar:
        for start in range(0, n, ROWS_AT_ONCE):
            rows = np.ascontiguousarray(vectors[start : start + ROWS_AT_ONCE], dtype=np.float32)
            graph.add(rows)
            bar.update(len(rows))
    faiss.write_index(graph, str(path))
