"""Cells of near candidates: an approximate search looks into a few of them, and a bound on the others may prove it.

**The bound.** Let c be a cell's centre and R the largest distance of its candidates from it. Of any candidate x in it,
x . y_i = c . y_i + (x - c) . y_i <= c . y_i + R |y_i| for all i, by Cauchy-Schwarz. A Poly-encoder's score lies between
the least and the largest dot, so it is at most max_i (c . y_i + R |y_i|); and as the score is Lipschitz in the dots,
it is at most the centre's own score + L(m) R max_i |y_i| (`poly_encoders.scoring.bounds`). A cell whose bound is below
the k-th best score that was found holds none of the k best; if that goes for all cells that were not looked into, the
answer is the exact one.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from poly_encoders.index.extras import needs
from poly_encoders.modeling import poly_score
from poly_encoders.scoring.bounds import lipschitz

CELLS = 4  # times the square root of n: 4,000 of 250 candidates for a million
SAMPLE_A_CELL = 48  # candidates that centres are found from
ROUNDS = 8
ROWS_AT_ONCE = 8192
ROUNDING = 1e-5  # of two lengths: more than float32 dots of any usual width are off by


@dataclass(frozen=True)
class Cells:
    """Cells of candidates that lie sorted by them.

    Attributes:
        centres: `(c, dim)` float32.
        starts: `(c + 1,)` int64: where each cell's candidates begin, and the end.
        radii: `(c,)` float32: at least the distance of each cell's candidates from its centre.
    """

    centres: np.ndarray
    starts: np.ndarray
    radii: np.ndarray

    def __len__(self) -> int:
        return len(self.centres)

    def save(self, folder: Path) -> None:
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "Cells | None":
        places = [folder / f"{field.name}.npy" for field in fields(cls)]
        return cls(*(np.load(place, allow_pickle=False) for place in places)) if places[0].is_file() else None

    def scores(self, context: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Of `(m, dim)` context vectors: what each centre scores, and what no candidate of a cell exceeds, `(c,)`."""
        context = context.float().cpu()
        dots = torch.from_numpy(self.centres) @ context.T
        radii, lengths = torch.from_numpy(self.radii), context.norm(dim=1)
        score = poly_score(context[None], torch.from_numpy(self.centres), scale)[0]
        used = context[(context != 0).any(dim=1)]
        reach = lengths.amax() * radii
        highest = torch.minimum(
            (dots + radii[:, None] * lengths).amax(dim=1), score + lipschitz(max(1, len(used))) * reach
        )
        room = ROUNDING * lengths.amax() * (torch.from_numpy(self.centres).norm(dim=1) + radii)
        return score, highest + room

    def ranges(self, which: np.ndarray) -> list[tuple[int, int]]:
        """Where the candidates of some cells are: neighbours joined."""
        found: list[tuple[int, int]] = []
        for cell in np.sort(which).tolist():
            start, stop = int(self.starts[cell]), int(self.starts[cell + 1])
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif start < stop:
                found.append((start, stop))
        return found


def find_cells(vectors: np.ndarray, show_progress_bar: bool = False) -> tuple[Cells, np.ndarray]:
    """Cells of `(n, dim)` vectors by k-means, and the `(n,)` order that sorts these by cell."""
    faiss = needs("faiss", "index")
    n, dim = vectors.shape
    number = max(1, min(n, round(CELLS * math.sqrt(n))))
    sample = vectors[np.sort(np.random.default_rng(0).choice(n, min(n, number * SAMPLE_A_CELL), replace=False))]
    clustering = faiss.Kmeans(dim, number, niter=ROUNDS, seed=0, min_points_per_centroid=1, verbose=show_progress_bar)
    clustering.train(np.ascontiguousarray(sample, dtype=np.float32))
    nearest, distances = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    for start in range(0, n, ROWS_AT_ONCE):
        rows = np.ascontiguousarray(vectors[start : start + ROWS_AT_ONCE], dtype=np.float32)
        nearest[start : start + len(rows)] = clustering.index.search(rows, 1)[1][:, 0]
        apart = rows - clustering.centroids[nearest[start : start + len(rows)]]
        distances[start : start + len(rows)] = np.linalg.norm(apart, axis=1)
    order = np.argsort(nearest, kind="stable")
    counts = np.bincount(nearest, minlength=number)
    starts = np.concatenate([[0], counts.cumsum()])
    radii = np.zeros(number, dtype=np.float32)
    np.maximum.at(radii, nearest, distances)
    return Cells(clustering.centroids.astype(np.float32), starts, radii * np.float32(1 + 1e-5)), order
