"""The mirror of an index in Milvus: what goes there, when, and what cannot. test_engines.py has what it finds."""

import sys
from unittest import mock

import numpy as np
import pytest

from index_rows import CONTEXTS, assert_found, expected, rows_of
from poly_encoders.index import CandidateIndex
from poly_encoders.index import milvus as milvus_module
from poly_encoders.index.filters import milvus_filter

pytest.importorskip("lance")
pymilvus = pytest.importorskip("pymilvus")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("year = 3", "year == 3"),
        ("a<>1 AND NOT b>=2 Or c!=3", "a!=1 and not b>=2 or c!=3"),
        ("t = 'x = ''y'' AND (\"z\") \\'", 't == "x = \'y\' AND (\\"z\\") \\\\"'),
        ("(a IN (1, 2)) AND b IN('c)', 'd')", '(a in [1, 2]) and b in["c)", "d"]'),
        ("`a` IS NOT NULL", "a is not null"),
    ],
)
def test_sql_in_milvuss_words(sql, said):
    assert milvus_filter(sql) == said


def test_only_what_has_changed_goes_there(index, poly_encoder, milvus):
    options = {"milvus": milvus, "top_k": 5}
    with mock.patch.object(milvus_module, "AT_ONCE", 7):
        index.search(CONTEXTS, **options)
        index.delete([f"c{i}" for i in range(20)])
        index.search(CONTEXTS, **options)
    index.upsert([{"id": "c20", "text": "changed", "year": 1}, {"id": "c99", "text": "new", "year": 2}])
    index.compact()
    client = pymilvus.MilvusClient(milvus)
    with (
        mock.patch.object(client, "upsert", side_effect=client.upsert) as upsert,
        mock.patch.object(client, "delete", side_effect=client.delete) as delete,
    ):
        found = index.search(CONTEXTS, top_k=5, milvus=client)
        assert sorted(row["id"] for call in upsert.call_args_list for row in call.args[1]) == ["c20", "c99"]
        again = CandidateIndex.load(index.store.path, poly_encoder)
        assert again.search(CONTEXTS, top_k=5, milvus=client) == found == index.search(CONTEXTS, top_k=5)
        assert upsert.call_count == 1
        delete.assert_not_called()


def test_an_older_version_takes_nothing_back(index, poly_encoder, milvus):
    older = CandidateIndex.load(index.store.path, poly_encoder)
    index.delete(filter="year < 2005")
    newer = index.search(CONTEXTS, milvus=milvus)
    assert older.search(CONTEXTS, milvus=milvus) == newer
    assert older.search(CONTEXTS, milvus=milvus, certify=True) == older.search(CONTEXTS) != newer
    assert older.refresh().search(CONTEXTS, milvus=milvus) == newer


def test_a_copy_that_was_cut_short_goes_on(index, poly_encoder, milvus):
    client = pymilvus.MilvusClient(milvus)
    upsert, calls = client.upsert, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 4:
            raise pymilvus.MilvusException(message="gone")
        return upsert(*args)

    with mock.patch.object(client, "upsert", cut), mock.patch.object(milvus_module, "AT_ONCE", 10):
        with pytest.raises(OSError, match="the given client failed: gone"):
            index.search(CONTEXTS, milvus=client)
        index.delete(["c0", "c59"])  # the first of which is there
        assert_found(index.search(CONTEXTS, 5, milvus=client), expected(poly_encoder, rows_of(60)[1:-1]))
    assert len(calls) == 4 + 3


def test_it_proves_nothing_of_many(poly_encoder, tmp_path, milvus):
    rows = rows_of(400)
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    options = {"milvus": milvus, "top_k": 5, "neighbours": 20}
    answers, wanted = index.search(CONTEXTS, **options), expected(poly_encoder, rows)
    for hits, pairs in zip(answers, wanted, strict=True):
        assert not hits.proven
        assert len({hit["id"] for hit in hits} & {id_ for id_, _ in pairs}) >= 3
        assert 0 < hits.looked_at < 0.2
    assert_found(index.search(CONTEXTS, certify=True, **options), wanted)


def test_what_milvus_cannot_do_has_clear_errors(index, tmp_path, milvus):
    for options, error, message in [
        ({"engine": "milvus"}, ValueError, "needs milvus=: a server's address"),
        ({"milvus": "nowhere"}, ValueError, r"No Milvus opens as 'nowhere' .*http://localhost:19530"),
        ({"milvus": str(tmp_path / "no" / "x.db")}, ValueError, "No Milvus opens as"),
        ({"milvus": "http://127.0.0.1:9"}, ConnectionError, r"No Milvus answers at http://127\.0\.0\.1:9 "),
        ({"milvus": milvus, "top_k": 20000}, ValueError, "top_k is 20000; Milvus gives up to 16384"),
        ({"milvus": milvus, "filter": "year BETWEEN 1 AND 2"}, ValueError, "Milvus cannot read the filter 'year BETW"),
    ]:
        with pytest.raises(error, match=message):
            index.search(CONTEXTS, **options)
    with mock.patch.dict(sys.modules, pymilvus=None), pytest.raises(ImportError, match=r"poly-encoders\[milvus\]"):
        index.search(CONTEXTS, milvus="other.db")
    index.add([{"id": "long", "text": "é" * 40_000, "year": 1}])
    with pytest.raises(ValueError, match="'text' of the candidate 'long' has 80,000 bytes; Milvus holds up to 65,535"):
        index.search(CONTEXTS, milvus=milvus)
    vectors = np.ones((1, 4))
    index = CandidateIndex.from_vectors(vectors, path=tmp_path / "b", metadata={"raw": [b"x"]}, show_progress_bar=False)
    with pytest.raises(TypeError, match="'raw' is binary, which Milvus cannot hold"):
        index.search_vectors(vectors[None], scale=1.0, milvus=milvus)
