"""What every engine finds is what scoring everything finds, whatever was changed, filtered or asked."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from index_rows import CONTEXTS, assert_found, expected, rows_of, texts_of
from poly_encoders.index import CandidateIndex, view

pytest.importorskip("lance")


def test_search_finds_what_scoring_everything_does(index, poly_encoder, engine):
    rows = rows_of(60)
    answers = index.search(CONTEXTS, top_k=5, **engine)
    assert_found(answers, expected(poly_encoder, rows), proven=engine["engine"] != "ann")
    by_id = {row["id"]: row for row in rows}
    for hit in (hit for hits in answers for hit in hits):
        assert [*hit] == ["id", "score", "text", "year"]
        assert {name: hit[name] for name in ("id", "text", "year")} == by_id[hit["id"]]
    assert answers == index.search(CONTEXTS, top_k=5, engine="exact")  # to the last bit
    assert [hits.looked_at for hits in answers] == [1.0] * 3
    assert len(index) == 60
    assert index.search("hello there", top_k=2, **engine) == index.search(["hello there"], top_k=2, **engine)[0]
    assert index.search([], top_k=3, **engine) == []
    assert index.search(CONTEXTS, top_k=0, **engine) == [[], [], []]


def test_more_than_there_are_gives_all_of_them(index, engine):
    for where, number in ((None, 60), ("year = 2003", 9)):
        answers = index.search(CONTEXTS, 100, where, **(engine | {"neighbours": 1}))
        assert [len(hits) for hits in answers] == [number] * 3
        assert all(hits.proven for hits in answers)
        assert answers == index.search(CONTEXTS, 100, where, engine="exact")


def test_all_changes_and_files_give_the_same_as_a_new_index(index, poly_encoder, engine):
    rows = {row["id"]: row for row in rows_of(60)}

    def agrees():
        found = index.search(CONTEXTS, top_k=5, **engine)
        assert_found(found, expected(poly_encoder, [*rows.values()]), proven=engine["engine"] != "ann")
        again = CandidateIndex.load(index.store.path, poly_encoder)
        assert again.search(CONTEXTS, top_k=5, **engine) == index.search(CONTEXTS, top_k=5, **engine)

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
        rows = {**{k: v for k, v in rows.items() if k != "c1"}, "c1": changed}
        agrees()
    index.compact()
    agrees()
    index.verify()


@pytest.mark.parametrize(
    ("condition", "keep"),
    [
        ("year = 2003", lambda row: row["year"] == 2003),
        ("year > 2004 AND text LIKE '%film%'", lambda row: row["year"] > 2004 and "film" in row["text"]),
        ("NOT (year <> 2003 OR id = 'c3')", lambda row: row["year"] == 2003 and row["id"] != "c3"),
        ("id IN ('c3', 'c5')", lambda row: row["id"] in ("c3", "c5")),
        ("year IS NULL", lambda row: False),
        ("year = 1", lambda row: False),
    ],
)
def test_filters(index, poly_encoder, engine, condition, keep):
    extra = {"id": "late", "text": "film of the evening", "year": 2005}
    index.search(CONTEXTS, **engine)  # files first
    with mock.patch.object(view, "IN_MEMORY", 20):
        index.add([extra])
        answers = index.search(CONTEXTS, top_k=5, filter=condition, **engine)
    mine = [row for row in [*rows_of(60), extra] if keep(row)]
    wanted = expected(poly_encoder, mine) if mine else [[], [], []]
    for hits, pairs in zip(answers, wanted, strict=True):
        assert [hit["id"] for hit in hits] == [id_ for id_, _ in pairs]
        assert hits.proven or (engine["engine"] == "ann" and len(mine) > 5)


@pytest.mark.parametrize("condition", ["nothing = 3", "year = = 2", "year"])
def test_filters_that_cannot_be_read(index, engine, condition):
    with pytest.raises(ValueError, match=r"filter cannot be read.*year"):
        index.search(CONTEXTS, filter=condition, **engine)
    with pytest.raises(ValueError, match="filter cannot be read"):
        index.delete(filter=condition)
    assert len(index) == 60


def test_an_emptied_index_can_be_searched_and_filled_again(index, engine):
    index.delete(filter="year > 0")
    assert index.search(CONTEXTS, **engine) == [[], [], []]
    index.add([{"id": "one", "text": "hello", "year": 3}])
    assert [hits[0]["id"] for hits in index.search(CONTEXTS, **engine)] == ["one"] * 3


def test_ids_and_texts_of_any_spelling(poly_encoder, tmp_path, engine):
    ids = ["it's", '"', "a\\b", "é\n", "x'; DROP TABLE", "\N{GRINNING FACE}\t\\\"'", "\\n"]
    rows = [{"id": id_, "text": f"{text} {id_} = <> (IN)"} for id_, text in zip(ids, texts_of(7), strict=True)]
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert {hit["id"]: hit["text"] for hit in index.search("hello", **engine)} == {r["id"]: r["text"] for r in rows}
    for row in rows:
        spelt = (row[name].replace("'", "''") for name in ("id", "text"))
        condition = "`id` = '{}' AND text = '{}'".format(*spelt)
        assert [hit["id"] for hit in index.search("hello", filter=condition, **engine)] == [row["id"]]
    assert index.delete(ids[:4]) == 4
    assert {hit["id"] for hit in index.search("hello", **engine)} == {*ids[4:]}


def test_metadata_of_any_kind_comes_back_as_it_was(tmp_path, engine):
    day, vectors = datetime.datetime(2025, 1, 31, 12, 30, 0, 5), np.random.default_rng(0).standard_normal((4, 8))
    metadata = {
        "number": [1, None, -(2**62), 0],
        "share": [0.1, None, -1e300, 3.0],
        "yes": [True, None, False, True],
        "when": [day, None, day.replace(year=1969), day],
        "day": [day.date(), None, day.date(), day.date()],
        "tags": [["a", "b"], None, [], ["c"]],
        "of": [{"name": "x", "n": 1}, None, {"name": None, "n": 2}, {"name": "y", "n": None}],
    }
    index = CandidateIndex.from_vectors(
        vectors, [5, 7, -2, 2**60], ["a", None, "", "d"], tmp_path / "i", metadata=metadata, show_progress_bar=False
    )
    context = np.random.default_rng(1).standard_normal((1, 3, 8))
    [hits] = index.search_vectors(context, scale=1.0, **engine)
    found = {hit["id"]: {name: hit[name] for name in metadata} for hit in hits}
    assert found == {
        id_: {name: values[place] for name, values in metadata.items()} for place, id_ in enumerate([5, 7, -2, 2**60])
    }
    assert hits == index.search_vectors(context, scale=1.0, engine="exact")[0]


def test_searches_at_once_make_files_once(poly_encoder, tmp_path, in_files, monkeypatch):
    """Of many threads that search first, one makes the files and the others wait for them."""
    CandidateIndex.build(poly_encoder, rows_of(60), tmp_path / "index", show_progress_bar=False)
    made, derive = [], view.derive

    def slow(*args, **options):
        made.append(args)
        time.sleep(0.2)
        return derive(*args, **options)

    monkeypatch.setattr(view, "derive", slow)
    index = CandidateIndex.load(tmp_path / "index", poly_encoder)
    with ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda _: index.search(CONTEXTS, 3, engine="ann"), range(6))]
    assert len(made) == 1
    assert all(answer == answers[0] for answer in answers)
