"""An index against scoring everything: what a user builds and opens. test_engines.py has how it is searched."""

import json
from unittest import mock

import datasets
import pyarrow as pa
import pytest
import torch

from index_rows import CONTEXTS, assert_found, expected, rows_of, texts_of
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.index import CandidateIndex, candidate_index, row_batches

lance = pytest.importorskip("lance")


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


def test_a_large_index_takes_the_approximate_engine(index, in_files):
    with mock.patch.object(candidate_index, "EXACT_UP_TO", 10):
        assert not index.search(CONTEXTS, top_k=1)[0].proven
        assert index.search(CONTEXTS, top_k=1, engine="exact")[0].proven
    assert index.search(CONTEXTS, top_k=1)[0].proven
