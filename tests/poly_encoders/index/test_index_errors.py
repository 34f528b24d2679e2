"""What an index is asked or given wrongly, and what is damaged: clear errors, nothing lost."""

import json
import shutil
import sys
from unittest import mock

import numpy as np
import pytest

from index_rows import CONTEXTS, assert_found, expected, rows_of
from poly_encoders.index import CandidateIndex, lance_store, view

lance = pytest.importorskip("lance")


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ([], ValueError, "no candidates"),
        (["a", " "], ValueError, "Candidate 1 .*give it one"),
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], ValueError, "Candidate 1 has the id 1, which another has"),
        ([{"id": 1, "text": "a"}, {"id": "b", "text": "b"}], TypeError, "mixed types"),
        ([{"id": 1.5, "text": "a"}], TypeError, "ids are texts or whole numbers"),
        ([{"id": 1}], ValueError, "has the text None"),
        ([{"id": 1, "text": "a", "vector": 3}], ValueError, "a column 'vector'"),
        ([5], TypeError, "Candidate 0 is a int"),
        (7, TypeError, "Candidates are a int"),
        ("nowhere.jsonl", FileNotFoundError, "no file nowhere.jsonl"),
        ("a/b/c.xyz", ValueError, "no file of candidates"),
    ],
)
def test_candidates_that_are_none(poly_encoder, tmp_path, candidates, error, message):
    with pytest.raises(error, match=message):
        CandidateIndex.build(poly_encoder, candidates, tmp_path / "index", show_progress_bar=False)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"id": "x", "text": "a", "tag": 1}], ValueError, "no column 'tag'; its metadata columns are: year"),
        ([{"id": 5, "text": "a"}], TypeError, "ids have one type"),
        ([{"id": "x", "text": "a", "year": "soon"}], TypeError, "Column 'year'"),
        ([{"id": "c1", "text": "another text", "year": 2001}], ValueError, "upsert"),
    ],
)
def test_rows_that_do_not_fit_lose_nothing(index, rows, error, message):
    before = index.search(CONTEXTS, top_k=3)
    with pytest.raises(error, match=message):
        index.add(rows)
    assert index.search(CONTEXTS, top_k=3) == before
    assert len(index) == 60


@pytest.mark.parametrize(
    ("vectors", "ids", "error", "message"),
    [
        (np.zeros((3, 4), dtype=np.int8), None, TypeError, "int8"),
        (np.zeros(4), None, ValueError, "shape"),
        (np.full((3, 4), np.nan), None, ValueError, "NaN"),
        (np.full((3, 4), 1e6), None, ValueError, "float16"),
        (np.ones((3, 4)), [1, 2], ValueError, "3 vectors came with 2 values of 'id'"),
        (np.ones((2, 4)), [1, 1], ValueError, "another has already"),
        (np.ones((0, 4)), None, ValueError, "no vectors"),
        ("x", None, TypeError, "str"),
    ],
)
def test_vectors_that_are_none(tmp_path, vectors, ids, error, message):
    with pytest.raises(error, match=message):
        CandidateIndex.from_vectors(vectors, ids, path=tmp_path / "index", show_progress_bar=False)
    good = np.ones((3, 4))  # nothing is left in the way
    assert len(CandidateIndex.from_vectors(good, path=tmp_path / "index", show_progress_bar=False)) == 3


def test_what_is_asked_wrongly(index, tmp_path, poly_encoder):
    for options, message in [
        ({"engine": "fast"}, "engine"),
        ({"top_k": -1}, "top_k"),
        ({"neighbours": 0, "engine": "ann"}, "neighbours"),
    ]:
        with mock.patch.object(view, "IN_MEMORY", 0), pytest.raises(ValueError, match=message):
            index.search(CONTEXTS, **options)
    with pytest.raises(ValueError, match="ids to delete, or a filter"):
        index.delete()
    with pytest.raises(TypeError, match="list of ids"):
        index.delete("c1")
    with pytest.raises(TypeError, match="no id"):
        index.delete([1.5])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CandidateIndex.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder of an index"):
        CandidateIndex.load(tmp_path)
    with pytest.raises(FileExistsError, match="an index already"):
        CandidateIndex.from_vectors(np.ones((2, 4)), path=index.store.path)
    with pytest.raises(ValueError, match="without a model"):
        CandidateIndex.load(index.store.path).search(CONTEXTS)
    with pytest.raises(ValueError, match="no version 99"):
        CandidateIndex.load(index.store.path, version=99)
    with pytest.raises(ValueError, match="dtype"):
        CandidateIndex.build(poly_encoder, ["a"], tmp_path / "x", dtype="int8")
    with mock.patch.dict(sys.modules, ray=None), pytest.raises(ImportError, match=r"poly-encoders\[ray\]"):
        CandidateIndex.build(poly_encoder, ["a"], tmp_path / "x", ray=True)
    assert not (tmp_path / "x").exists()
    wide = np.ones((2, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="4 wide"):
        CandidateIndex.from_vectors(wide, path=tmp_path / "y", model=poly_encoder)


def test_a_newer_format_and_another_table_are_refused(index, tmp_path):
    table = index.store.dataset.to_table()
    for name, metadata, message in [
        ("new", {lance_store.SETTINGS: json.dumps({"format": 99}).encode()}, r"format 99.*Upgrade"),
        ("other", None, "no index of candidates"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        lance.write_dataset(table.replace_schema_metadata(metadata), folder / lance_store.TABLE)
        with pytest.raises(ValueError, match=message):
            CandidateIndex.load(folder)


def damage(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 4] = bytes(byte ^ 0x55 for byte in content[middle : middle + 4])
    path.write_bytes(content)


def test_damage_is_found_and_named(index, poly_encoder, in_files):
    options = {"engine": "ann", "neighbours": 1000}
    before = index.search(CONTEXTS, **options)
    index.verify()
    folder = index.store.path / "derived"
    names = sorted({path.name for path in folder.rglob("*") if path.is_file()} - {"manifest.json"})
    assert len(names) >= 8
    for name in names:
        [path] = folder.rglob(name)
        damage(path)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            index.verify()
        path.write_bytes(path.read_bytes()[:-3])  # cut off: made again when it is opened
        again = CandidateIndex.load(index.store.path, poly_encoder)
        assert again.search(CONTEXTS, **options) == before
        index = again
    [manifest] = folder.rglob("manifest.json")
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        index.verify()
    shutil.rmtree(folder)
    index.verify()


def test_damage_of_the_table_is_found(index):
    [data] = (index.store.path / lance_store.TABLE / "data").iterdir()
    whole = data.read_bytes()
    for place in range(0, len(whole) // 2, max(1, len(whole) // 40)):
        data.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        fresh = CandidateIndex.load(index.store.path)
        try:
            fresh.verify()
        except ValueError as error:
            assert str(index.store.path) in str(error)  # noqa: PT017
        else:  # padding, which nobody reads
            assert fresh.store.hashes() == index.store.hashes()


def test_a_table_of_the_same_place_does_not_take_the_files_of_another(poly_encoder, tmp_path, in_files):
    path = tmp_path / "index"
    CandidateIndex.build(poly_encoder, rows_of(30), path, show_progress_bar=False).search(CONTEXTS)
    shutil.rmtree(path / lance_store.TABLE)
    index = CandidateIndex.build(poly_encoder, rows_of(30, seed=5), path, show_progress_bar=False)
    assert_found(index.search(CONTEXTS, top_k=5), expected(poly_encoder, rows_of(30, seed=5)))


def test_a_folder_without_permission_and_a_full_disk(index, poly_encoder, tmp_path):
    before = index.search(CONTEXTS, top_k=3)
    for change in (
        lambda: index.add([{"id": "x", "text": "y", "year": 1}]),
        lambda: index.delete(["c1"]),
        index.compact,
    ):
        with (
            mock.patch.object(lance_store, "FileLock", side_effect=OSError("No space left on device")),
            pytest.raises(OSError, match=r"is as it was before: this write failed .No space left"),
        ):
            change()
    assert index.search(CONTEXTS, top_k=3) == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError):
        CandidateIndex.build(poly_encoder, ["a"], file / "index", show_progress_bar=False)
