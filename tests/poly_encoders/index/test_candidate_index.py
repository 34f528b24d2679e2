"""An index against scoring everything: what a user builds, changes, searches and breaks."""

import json
import shutil
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.index import CandidateIndex, candidate_index, lance_store, row_batches, view
from poly_encoders.modeling import poly_score

lance = pytest.importorskip("lance")

WORDS = ["hello", "there", "how", "are", "you", "fine", "weather", "nice", "today", "film", "music", "dinner", "work"]


def texts_of(n, seed=0):
    choose = np.random.default_rng(seed)
    return [f"{' '.join(choose.choice(WORDS, 4))} {number}" for number in range(n)]


def rows_of(n, seed=0):
    return [{"id": f"c{i}", "text": text, "year": 2000 + i % 7} for i, text in enumerate(texts_of(n, seed))]


CONTEXTS = [["hello there", "how are you"], ["what about dinner"], ["nice weather", "is it", "music today"]]


@pytest.fixture
def index(poly_encoder, tmp_path):
    return CandidateIndex.build(poly_encoder, rows_of(60), tmp_path / "index", show_progress_bar=False)


def expected(model, rows, k=5, dtype=torch.float16):
    """The slow, obvious twin: encode all, round as they are stored, score all, sort."""
    vectors = model.encode_document([row["text"] for row in rows], convert_to_tensor=True).to(dtype).double()
    scores = poly_score(model.encode_query(CONTEXTS, convert_to_tensor=True).double(), vectors, model.final_scale)
    best = scores.sort(descending=True, stable=True)
    return [
        [(rows[i]["id"], score) for i, score in zip(places[:k].tolist(), values[:k].tolist(), strict=True)]
        for places, values in zip(best.indices, best.values, strict=True)
    ]


def assert_found(answers, wanted, proven=True):
    for hits, pairs in zip(answers, wanted, strict=True):
        assert hits.proven == proven
        assert [hit["id"] for hit in hits] == [id_ for id_, _ in pairs]
        assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in pairs], abs=2e-6)


@pytest.fixture
def in_files():
    """All rows in derived files, however few."""
    with mock.patch.multiple(view, IN_MEMORY=0, FEW=0):
        yield


def test_search_finds_what_scoring_everything_does(index, poly_encoder):
    rows = rows_of(60)
    answers = index.search(CONTEXTS, top_k=5)
    assert_found(answers, expected(poly_encoder, rows))
    by_id = {row["id"]: row for row in rows}
    for hit in (hit for hits in answers for hit in hits):
        assert hit.keys() == {"id", "score", "text", "year"}
        assert {name: hit[name] for name in ("id", "text", "year")} == by_id[hit["id"]]
    assert len(index) == 60
    assert index.search("hello there", top_k=2) == index.search(["hello there"], top_k=2)[0]
    assert index.search([], top_k=3) == []
    assert [len(hits) for hits in index.search(CONTEXTS, top_k=100)] == [60] * 3
    assert index.search(CONTEXTS, top_k=0) == [[], [], []]


@pytest.mark.parametrize("engine", ["exact", "ann"])
def test_all_changes_and_files_give_the_same_as_a_new_index(index, poly_encoder, in_files, engine):
    rows = {row["id"]: row for row in rows_of(60)}
    options = {"engine": engine, "neighbours": 1000}

    def agrees():
        found = index.search(CONTEXTS, top_k=5, **options)
        assert_found(found, expected(poly_encoder, [*rows.values()]), proven=engine == "exact")
        again = CandidateIndex.load(index.store.path, poly_encoder)
        assert again.search(CONTEXTS, top_k=5, **options) == index.search(CONTEXTS, top_k=5, **options)

    agrees()
    more = [{"id": f"new{i}", "text": text, "year": 1999} for i, text in enumerate(texts_of(10, seed=1))]
    with mock.patch.object(view, "IN_MEMORY", 20):  # so that these are searched beside the files
        assert index.add(more) == 10
        rows |= {row["id"]: row for row in more}
        agrees()
        gone = [f"c{i}" for i in range(0, 30, 3)]
        assert index.delete(gone) == 10
        rows = {id_: row for id_, row in rows.items() if id_ not in gone}
        agrees()
        changed = {"id": "c1", "text": "hello there how are you", "year": 2024}
        assert index.upsert([changed]) == 1
        rows["c1"] = changed
        rows = {**{k: v for k, v in rows.items() if k != "c1"}, "c1": changed}
        agrees()
    index.compact()
    agrees()
    index.verify()


def test_the_graph_finds_most_and_says_that_it_proves_nothing(poly_encoder, tmp_path, in_files):
    rows = rows_of(400)
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    wanted = expected(poly_encoder, rows)
    for neighbours in (5, 20, 1000):
        answers = index.search(CONTEXTS, top_k=5, engine="ann", neighbours=neighbours)
        for hits, pairs in zip(answers, wanted, strict=True):
            assert not hits.proven
            assert len({hit["id"] for hit in hits} & {id_ for id_, _ in pairs}) >= 3
            assert hits.looked_at < 0.2 or neighbours == 1000
    assert_found(answers, wanted, proven=False)
    assert_found(index.search(CONTEXTS, top_k=5, engine="ann", certify=True), wanted)
    assert [len(hits) for hits in index.search(CONTEXTS, top_k=300, engine="ann")] == [300] * 3


@pytest.mark.parametrize(
    "condition", ["year = 2003", "year > 2004 AND text LIKE '%film%'", "id IN ('c3', 'c5')", "year = 1"]
)
@pytest.mark.parametrize("engine", ["exact", "ann"])
def test_filters(index, poly_encoder, in_files, condition, engine):
    keep = {
        "year = 2003": lambda row: row["year"] == 2003,
        "year > 2004 AND text LIKE '%film%'": lambda row: row["year"] > 2004 and "film" in row["text"],
        "id IN ('c3', 'c5')": lambda row: row["id"] in ("c3", "c5"),
        "year = 1": lambda row: False,
    }[condition]
    extra = {"id": "late", "text": "film of the evening", "year": 2005}
    index.search(CONTEXTS, engine=engine)  # files first
    with mock.patch.object(view, "IN_MEMORY", 20):
        index.add([extra])
        answers = index.search(CONTEXTS, top_k=5, filter=condition, engine=engine, neighbours=1000)
    mine = [row for row in [*rows_of(60), extra] if keep(row)]
    wanted = expected(poly_encoder, mine) if mine else [[], [], []]
    for hits, pairs in zip(answers, wanted, strict=True):
        assert [hit["id"] for hit in hits] == [id_ for id_, _ in pairs]
        assert hits.proven or (engine == "ann" and len(mine) > 5)


def test_a_second_build_encodes_what_is_new_or_changed(index, poly_encoder):
    rows = rows_of(60)
    rows[7] = {**rows[7], "text": "something else"}
    rows[8] = {**rows[8], "year": 1}
    rows.append({"id": "more", "text": "another", "year": 5})
    with mock.patch.object(
        PolyEncoder, "encode_document", autospec=True, side_effect=PolyEncoder.encode_document
    ) as encode:
        again = CandidateIndex.build(poly_encoder, rows, index.store.path, show_progress_bar=False)
    encoded = [text for call in encode.call_args_list for text in call.args[1]]
    assert {"something else", rows[8]["text"], "another"} <= set(encoded)
    assert len(encoded) == 3 + 3  # and the probes
    assert len(again) == 61
    moved = [row for row in rows if row["id"] not in ("c7", "c8", "more")] + [rows[7], rows[8], rows[-1]]
    assert_found(again.search(CONTEXTS, top_k=5), expected(poly_encoder, moved))


def test_a_build_goes_on_after_a_kill(poly_encoder, tmp_path):
    rows = rows_of(50)
    encode, calls = PolyEncoder.encode_document, []

    def killed(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    with (
        mock.patch.object(PolyEncoder, "encode_document", killed),
        mock.patch.object(row_batches.row_batches, "__defaults__", (10, True)),
        pytest.raises(KeyboardInterrupt),
    ):
        CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert len(CandidateIndex.load(tmp_path / "index")) == 20
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert sorted(index.store.hashes()) == sorted(row["id"] for row in rows)
    assert len(index) == 50


@pytest.mark.parametrize("kind", ["texts", "dataset", "stream", "jsonl", "csv", "parquet", "txt"])
def test_candidates_in_whatever_holds_them(poly_encoder, tmp_path, kind):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts_of(12))]
    table = pa.Table.from_pylist(rows)
    given = tmp_path / f"rows.{kind}"
    if kind == "texts":
        given = [row["text"] for row in rows]
    elif kind == "dataset":
        given = datasets.Dataset(table)
    elif kind == "stream":
        given = datasets.Dataset(table).to_iterable_dataset()
    elif kind == "jsonl":
        given.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        given.write_text("id,text\n" + "\n".join(f"{row['id']},{row['text']}" for row in rows))
    elif kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, given)
    else:
        given.write_text("\n".join(row["text"] for row in rows))
    index = CandidateIndex.build(poly_encoder, given, tmp_path / "index", show_progress_bar=False)
    assert_found(index.search(CONTEXTS, top_k=5), expected(poly_encoder, rows))


@pytest.mark.parametrize("kind", ["numpy", "float64", "tensor", "arrow", "faiss", "lance"])
def test_vectors_that_are_there(poly_encoder, tmp_path, kind):
    rows = rows_of(40)
    vectors = poly_encoder.encode_document([row["text"] for row in rows])
    ids, texts = [row["id"] for row in rows], [row["text"] for row in rows]
    arrow = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    if kind == "faiss":
        faiss = pytest.importorskip("faiss")
        held = faiss.IndexFlatIP(vectors.shape[1])
        held.add(vectors)
    elif kind == "lance":
        held = lance.write_dataset(pa.table({"key": ids, "words": texts, "vector": arrow}), tmp_path / "x.lance")
        ids, texts = "key", "words"
    else:
        held = {
            "numpy": vectors,
            "float64": vectors.astype(float),
            "tensor": torch.from_numpy(vectors),
            "arrow": arrow,
        }[kind]
    index = CandidateIndex.from_vectors(
        held, ids, texts, tmp_path / "index", metadata={"n": [*range(40)]}, model=poly_encoder, show_progress_bar=False
    )
    answers = index.search(CONTEXTS, top_k=5)
    assert_found(answers, expected(poly_encoder, rows))
    assert answers[0][0]["n"] == int(answers[0][0]["id"][1:])


def test_float32_keeps_all_digits(poly_encoder, tmp_path):
    index = CandidateIndex.build(poly_encoder, rows_of(30), tmp_path / "i", dtype="float32", show_progress_bar=False)
    assert_found(index.search(CONTEXTS, top_k=5), expected(poly_encoder, rows_of(30), dtype=torch.float32))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_bi_encoder(checkpoints, tmp_path, similarity):
    model = BiEncoder(checkpoints("bert"), similarity_fn_name=similarity, device="cpu")
    rows = rows_of(30)
    index = CandidateIndex.build(model, rows, tmp_path / "index", dtype="float32", show_progress_bar=False)
    scores = model.similarity(model.encode_query(CONTEXTS), model.encode_document([row["text"] for row in rows]))
    for hits, row in zip(index.search(CONTEXTS, top_k=3), scores, strict=True):
        assert [hit["score"] for hit in hits] == pytest.approx(row.sort(descending=True).values[:3].tolist(), abs=1e-5)


def test_a_model_that_changed_its_context_side_alone_is_welcome_and_others_are_not(checkpoints, tmp_path):
    model = PolyEncoder(checkpoints("bert"), num_codes=4, share_encoders=False, device="cpu")
    path = CandidateIndex.build(model, rows_of(20), tmp_path / "index", show_progress_bar=False).store.path
    with torch.no_grad():
        for parameter in model[0].model.context_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert len(CandidateIndex.load(path, model).search(CONTEXTS, top_k=2)[0]) == 2
    shorter = PolyEncoder(checkpoints("bert"), num_codes=4, max_candidate_length=5, device="cpu")
    with pytest.raises(ValueError, match="encodes candidates otherwise"):
        CandidateIndex.load(path, shorter)
    with torch.no_grad():
        for parameter in model[0].model.candidate_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    with pytest.raises(ValueError, match="encodes candidates otherwise"):
        CandidateIndex.load(path, model)
    with pytest.raises(ValueError, match="encodes candidates otherwise"):
        CandidateIndex.build(model, rows_of(20), path, show_progress_bar=False)
    with pytest.raises(TypeError, match="not a CrossEncoder"):
        CandidateIndex.load(path, CrossEncoder(checkpoints("bert"), num_labels=1, device="cpu"))


def test_readers_keep_their_version(index, poly_encoder, in_files):
    reader = CandidateIndex.load(index.store.path, poly_encoder)
    before = reader.search(CONTEXTS, top_k=3)
    index.delete(filter="year < 2005")
    index.compact()
    assert reader.search(CONTEXTS, top_k=3) == before
    assert len(reader) == 60
    assert len(reader.refresh()) == len(index) < 60
    assert reader.search(CONTEXTS, top_k=3) == index.search(CONTEXTS, top_k=3)
    assert len(CandidateIndex.load(index.store.path, version=index.store.version)) == len(index)


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


@pytest.mark.parametrize("condition", ["nothing = 3", "year = = 2", "year"])
def test_filters_that_cannot_be_read(index, condition):
    with pytest.raises(ValueError, match=r"filter cannot be read.*year"):
        index.search(CONTEXTS, filter=condition)
    with pytest.raises(ValueError, match="filter cannot be read"):
        index.delete(filter=condition)
    assert len(index) == 60


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


def test_an_emptied_index_can_be_searched_and_filled_again(index, in_files):
    index.delete(filter="year > 0")
    assert index.search(CONTEXTS) == [[], [], []]
    index.add([{"id": "one", "text": "hello", "year": 3}])
    assert [hits[0]["id"] for hits in index.search(CONTEXTS)] == ["one"] * 3


def test_ids_of_any_spelling(poly_encoder, tmp_path):
    ids = ["it's", '"', "a\\b", "é\n", "x'; DROP TABLE"]
    rows = [{"id": id_, "text": text} for id_, text in zip(ids, texts_of(5), strict=True)]
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert index.delete(ids[:4]) == 4
    assert [hit["id"] for hit in index.search("hello")] == [ids[4]]


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
    with (
        mock.patch.object(lance_store.LanceStore, "upsert", side_effect=OSError("No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        index.add([{"id": "x", "text": "y", "year": 1}])
    assert index.search(CONTEXTS, top_k=3) == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError):
        CandidateIndex.build(poly_encoder, ["a"], file / "index", show_progress_bar=False)


def test_a_large_index_takes_the_approximate_engine(index, in_files):
    with mock.patch.object(candidate_index, "EXACT_UP_TO", 10):
        assert not index.search(CONTEXTS, top_k=1)[0].proven
        assert index.search(CONTEXTS, top_k=1, engine="exact")[0].proven
    assert index.search(CONTEXTS, top_k=1)[0].proven
