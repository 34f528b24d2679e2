"""What searching reads: arrays made of one version of the table, mapped from files beside it, made again when stale.

Lance decodes rows into memory whenever it reads them, so that a pass over all of them wants a plain array. Files are
written into a folder beside their place, which is then renamed: a reader sees all of them or none, and keeps those that
it has mapped when newer ones come.
"""

import json
import logging
import shutil
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from poly_encoders.index.graph import Graph, build_graph
from poly_encoders.index.lance_store import LanceStore
from poly_encoders.scoring import PreparedCandidates, load_prepared, prepare

logger = logging.getLogger(__name__)

FOLDER = "derived"  # in an index's folder
LAYOUT = 1
ABANDONED = 24 * 3600  # seconds
MANIFEST, VECTORS, ROW_IDS, PREPARED = "manifest.json", "vectors.npy", "row_ids.npy", "prepared"
ROWS, TABLE_IDS, GRAPH = "rows.arrow", "table_ids.npy", "graph.faiss"


@dataclass(frozen=True)
class Derived:
    """Arrays over the rows of a version, in the order of their ids.

    Attributes:
        row_ids: `(n,)` uint64, Lance's.
        rows: Their ids, texts and metadata.
        prepared: The `(n, dim)` vectors, mapped, and what a first pass reads.
        graph: Of near rows; `None` where nobody has asked for an approximate search.
    """

    row_ids: np.ndarray
    rows: "MappedRows"
    prepared: PreparedCandidates
    graph: Graph | None

    def __len__(self) -> int:
        return len(self.row_ids)


class MappedRows:
    """Rows in an Arrow file that is mapped, found by their ids in microseconds, where Lance takes milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        in_order = np.load(folder / TABLE_IDS, allow_pickle=False)
        self._by_id = np.argsort(in_order, kind="stable")
        self._ids = in_order[self._by_id]
        sizes = [self._file.get_batch(number).num_rows for number in range(self._file.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def at(self, row_ids: np.ndarray) -> list[dict[str, Any]]:
        """The rows of some ids."""
        places = self._by_id[np.searchsorted(self._ids, row_ids)]
        batches = np.searchsorted(self._starts, places, side="right") - 1
        return [
            self._file.get_batch(int(batch)).slice(int(place - self._starts[batch]), 1).to_pylist()[0]
            for place, batch in zip(places, batches, strict=True)
        ]

    @staticmethod
    def write(store: LanceStore, folder: Path) -> None:
        """All rows of a store."""
        ids, writer = [np.empty(0, dtype=np.uint64)], None
        with pa.OSFile(str(folder / ROWS), "wb") as file:
            for found, batch in store.rows():
                writer = writer or pa.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
                ids.append(found)
            (writer or pa.ipc.new_file(file, pa.schema([]))).close()
        np.save(folder / TABLE_IDS, np.concatenate(ids))


def derive(store: LanceStore, with_graph: bool, show_progress_bar: bool = False) -> Derived:
    """Make the files of the store's version, in place of those that are there."""
    home = store.path / FOLDER
    home.mkdir(exist_ok=True)
    for left in home.glob(".*"):  # of a run that was killed, not of one at work
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    staging = home / f".{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        row_ids = np.sort(store.row_ids())
        MappedRows.write(store, staging)
        _write_vectors(store, row_ids, staging, show_progress_bar)
        np.save(staging / ROW_IDS, row_ids)
        if with_graph and len(row_ids):
            build_graph(_mapped(staging), staging / GRAPH, show_progress_bar)
        prepare(_mapped(staging), folder=staging / PREPARED, show_progress_bar=show_progress_bar)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        manifest = {
            "layout": LAYOUT,
            "table": _table_name(store),
            "version": store.version,
            "rows": len(row_ids),
            "files": {str(path.relative_to(staging)): path.stat().st_size for path in files},
            "checks": {str(path.relative_to(staging)): _checksum(path) for path in files},
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
        place = home / f"{store.version}-{staging.name[1:]}"
        staging.rename(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for other in home.glob("[0-9]*"):
        if other != place and _version_of(other) <= store.version:
            shutil.rmtree(other, ignore_errors=True)  # who has mapped them keeps them
    return _open(place)


def newest_derived(store: LanceStore) -> Derived | None:
    """The files of this version or of an older one, if there are any that are whole."""
    home = store.path / FOLDER
    for place in sorted(home.glob("[0-9]*"), key=_version_of, reverse=True) if home.is_dir() else []:
        try:
            manifest = json.loads((place / MANIFEST).read_text())
            if (
                manifest["layout"] != LAYOUT
                or manifest["table"] != _table_name(store)
                or manifest["version"] > store.version
            ):
                continue
            if wrong := [name for name, size in manifest["files"].items() if (place / name).stat().st_size != size]:
                raise ValueError(f"{place / wrong[0]} has another size than when it was written")
            return _open(place)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s is made again: %s.", place, error)
    return None


def _version_of(place: Path) -> int:
    return int(place.name.split("-")[0])


def damaged_files(store: LanceStore) -> list[Path]:
    """Derived files that are not as they were written; reads all of them."""
    found = []
    for manifest in (store.path / FOLDER).glob(f"[0-9]*/{MANIFEST}"):
        try:
            checks = json.loads(manifest.read_text())["checks"]
        except (ValueError, KeyError):
            found.append(manifest)
            continue
        places = {manifest.parent / name: check for name, check in checks.items()}
        found += [path for path, check in places.items() if not path.is_file() or _checksum(path) != check]
    return found


def _write_vectors(store: LanceStore, row_ids: np.ndarray, folder: Path, show_progress_bar: bool) -> None:
    settings = store.settings
    shape = (len(row_ids), settings.dim)
    vectors = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=settings.dtype, shape=shape)
    with tqdm(total=len(row_ids), desc="Reading vectors", unit="candidate", disable=not show_progress_bar) as bar:
        for some, rows in store.vectors(row_ids):
            vectors[np.searchsorted(row_ids, some)] = rows
            bar.update(len(rows))
    vectors.flush()


def _open(place: Path) -> Derived:
    return Derived(
        np.load(place / ROW_IDS, allow_pickle=False),
        MappedRows(place),
        load_prepared(_mapped(place), place / PREPARED),
        Graph(place / GRAPH) if (place / GRAPH).is_file() else None,
    )


def _mapped(folder: Path) -> Any:
    return np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)


def _table_name(store: LanceStore) -> str:
    return store.settings.name


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            found = zlib.crc32(piece, found)
    return found
