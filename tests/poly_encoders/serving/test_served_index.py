"""/search and /candidates over an index that others change as well."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from index_rows import CONTEXTS, rows_of
from poly_encoders.index import CandidateIndex


@pytest.fixture
def path(poly_encoder, tmp_path):
    CandidateIndex.build(poly_encoder, rows_of(60), tmp_path / "index", show_progress_bar=False)
    return str(tmp_path / "index")


def test_search_is_the_indexs(poly_encoder, path, serve):
    index = CandidateIndex.load(path, poly_encoder)
    with serve(poly_encoder, index=path) as client:
        for context in CONTEXTS:
            for options in ({}, {"filter": "year > 2003"}, {"certify": True, "engine": "exact"}):
                answer = client.post("/search", json={"context": context, "top_k": 4, **options}).json()
                [hits] = index.search([context], 4, options.get("filter"))
                assert [row["id"] for row in answer["results"]] == [hit["id"] for hit in hits]
                assert answer["results"][0].keys() == {"id", "score", "text", "year"}
                assert [row["score"] for row in answer["results"]] == pytest.approx(
                    [hit["score"] for hit in hits], abs=1e-6
                )
                assert answer["proven"] is True
        assert client.get("/info").json()["index"] == {"candidates": 60}


def test_a_bi_encoders_index(bi_encoder, tmp_path, serve):
    index = CandidateIndex.build(bi_encoder, rows_of(30), tmp_path / "index", show_progress_bar=False)
    with serve(bi_encoder, index=str(tmp_path / "index")) as client:
        answer = client.post("/search", json={"context": CONTEXTS[0]}).json()
    [hits] = index.search([CONTEXTS[0]])
    assert [row["id"] for row in answer["results"]] == [hit["id"] for hit in hits]


def test_changes_are_seen_at_once(poly_encoder, path, serve):
    with serve(poly_encoder, index=path) as client:
        new = {"id": "new", "text": "something else", "year": 2030}
        assert client.post("/candidates", json={"candidates": [new]}).json() == {"written": 1, "total": 61}
        assert client.post("/candidates", json={"candidates": [new]}).json() == {"written": 0, "total": 61}
        look = {"filter": "year = 2030"}
        assert client.get("/candidates", params=look).json()["candidates"] == [new]
        assert (
            client.post("/search", json={"context": "a", "filter": "year = 2030"}).json()["results"][0]["id"] == "new"
        )
        changed = {**new, "text": "changed"}
        assert client.put("/candidates", json={"candidates": [changed]}).json() == {"written": 1, "total": 61}
        assert client.get("/candidates", params=look).json()["candidates"] == [changed]
        assert client.request("DELETE", "/candidates", json={"ids": ["new", "none"]}).json() == {
            "deleted": 1,
            "total": 60,
        }
        assert client.request("DELETE", "/candidates", json={"filter": "year = 2001"}).json()["deleted"] == 9
        page = [client.get("/candidates", params={"limit": 2, "offset": 2 * place}).json() for place in (0, 1)]
        assert len({row["id"] for some in page for row in some["candidates"]}) == 4
        # another process, to this one
        CandidateIndex.load(path, poly_encoder).add([{"id": "theirs", "text": "of another", "year": 2040}])
        hits = client.post("/search", json={"context": "a", "filter": "year = 2040"}).json()["results"]
        assert [hit["id"] for hit in hits] == ["theirs"]


def test_searches_and_changes_at_once(poly_encoder, path, serve):
    with serve(poly_encoder, index=path) as client, ThreadPoolExecutor(6) as pool:

        def change(number):
            row = {"id": f"new {number}", "text": f"new {number}", "year": 2050 + number}
            return client.post("/candidates", json={"candidates": [row]}).json()["written"]

        def search(number):
            answer = client.post("/search", json={"context": CONTEXTS[number % 3], "top_k": 3})
            return answer.status_code, len(answer.json()["results"])

        changes = [pool.submit(change, number) for number in range(6)]
        searches = [pool.submit(search, number) for number in range(30)]
        assert [future.result() for future in changes] == [1] * 6
        assert {future.result() for future in searches} == {(200, 3)}
        assert client.get("/candidates").json()["total"] == 66


def test_no_index_and_that_of_another_model(poly_encoder, codes_encoder, cross_encoder, path, serve):
    with serve(poly_encoder) as client:
        assert client.post("/search", json={"context": "a"}).status_code == 404
        assert "--index" in client.get("/candidates").json()["error"]["message"]
    with pytest.raises(ValueError, match="searches no index"), serve(cross_encoder, index=path):
        pass
    with (
        pytest.raises(ValueError, match="encodes candidates otherwise"),
        serve(codes_encoder, index=path),
    ):
        pass


def test_an_index_in_milvus(poly_encoder, path, serve, tmp_path):
    pytest.importorskip("pymilvus")
    with serve(poly_encoder, index=path, milvus=str(tmp_path / "served.db")) as client:
        index = CandidateIndex.load(path, poly_encoder)
        for body in ({"context": CONTEXTS[0]}, {"context": CONTEXTS[0], "engine": "exact"}):
            answer = client.post("/search", json={**body, "top_k": 3}).json()
            assert [row["id"] for row in answer["results"]] == [hit["id"] for hit in index.search([CONTEXTS[0]], 3)[0]]
        new = {"id": "new", "text": "something else", "year": 2030}
        assert client.post("/candidates", json={"candidates": [new]}).is_success
        hits = client.post("/search", json={"context": "a", "filter": "year = 2030"}).json()["results"]
        assert [hit["id"] for hit in hits] == ["new"]
