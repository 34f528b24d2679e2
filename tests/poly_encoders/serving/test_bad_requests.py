"""More than two hundred requests that are wrong: each gets a 4xx in the form of what it called, and harms nobody."""

import json
import time

import pytest

from poly_encoders.index import CandidateIndex

GOOD = {
    "/rerank": {"query": "hello", "texts": ["yes", "no"]},
    "/v1/rerank": {"query": "hello", "documents": ["yes", "no"]},
    "/v2/rerank": {"query": "hello", "documents": ["yes", "no"]},
    "/infinity/rerank": {"query": "hello", "documents": ["yes", "no"]},
    "/score": {"text_1": "hello", "text_2": ["yes", "no"]},
    "/similarity": {"inputs": {"source_sentence": "hello", "sentences": ["yes", "no"]}},
    "/embed": {"inputs": ["yes", "no"]},
    "/v1/embeddings": {"input": ["yes", "no"]},
    "/search": {"context": "hello"},
    "/candidates": {"candidates": [{"id": "new", "text": "new", "year": 1}]},
    "/page/answers": {"turns": ["hello"]},
    "/page/why": {"turns": ["hello"], "candidate": "yes"},
}
CANARY = "xyzzy"  # a text of another request, which no error may show
LIMITS = {"max_documents": 50, "max_characters": 3000, "max_body_bytes": 100_000}


def changed(path, *names, value):
    """The good body with the value at a place in it."""
    body = json.loads(json.dumps(GOOD[path]))
    inner = body
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    return json.dumps(body)


def without(path, name):
    return json.dumps({key: value for key, value in GOOD[path].items() if key != name})


# Where texts are, of each route: the context's place, and that of the list of candidates.
CONTEXTS = {
    "/rerank": ["query"],
    "/v1/rerank": ["query"],
    "/v2/rerank": ["query"],
    "/infinity/rerank": ["query"],
    "/score": ["text_1"],
    "/similarity": ["inputs", "source_sentence"],
    "/search": ["context"],
}
LISTS = {
    "/rerank": ["texts"],
    "/v1/rerank": ["documents"],
    "/v2/rerank": ["documents"],
    "/infinity/rerank": ["documents"],
    "/score": ["text_2"],
    "/similarity": ["inputs", "sentences"],
    "/embed": ["inputs"],
    "/v1/embeddings": ["input"],
}
SURROGATE = "half \ud83d"

CASES: list[tuple[str, str]] = []
for path, good in GOOD.items():
    CASES += [(path, body) for body in ("", "{", "[]", "null", '"text"', "12", '{"a": ', "{'query': 'x'}", "\ufeff{}")]
    CASES += [(path, json.dumps(good)[:-1] + ', "extra": NaN}'), (path, "[" * 5000), (path, '{"a":' * 3000)]
    CASES += [(path, without(path, name)) for name in good]
    first = next(iter(good))
    CASES.append((path, json.dumps(good)[:-1] + f", {json.dumps(first)}: {json.dumps(good[first])}}}"))  # comes twice
for path, names in CONTEXTS.items():
    for value in (5, True, "", "  \n", [], [""], [{}], [{"role": "user"}], [1], SURROGATE, "x" * 3001, [["a"], 1]):
        CASES.append((path, changed(path, *names, value=value)))
for path, names in LISTS.items():
    for value in (5, {"a": 1}, [1], [None], ["yes", ""], ["yes", " "], [SURROGATE], ["x" * 3001], ["y"] * 51, [["a"]]):
        CASES.append((path, changed(path, *names, value=value)))
OTHERS = [  # the fields of one interface at another's address, and options of a wrong type
    ("/rerank", {"query": "a", "texts": ["b"], "documents": ["c"]}),
    ("/rerank", {"query": "a"}),
    ("/rerank", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ("/rerank", {"query": "a", "texts": ["b"], "truncate": "yes"}),
    ("/rerank", {"query": "a", "texts": ["b"], "raw_scores": 1}),
    ("/v2/rerank", {"query": "a", "texts": ["b"]}),
    ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": -1}),
    ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": "2"}),
    ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": 1.5}),
    ("/v2/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}),
    ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}),
    ("/v1/rerank", {"query": "a", "documents": [{"text": 5}]}),
    ("/v1/rerank", {"query": "a", "documents": [{"text": "b"}], "rank_fields": ["title"]}),
    ("/v1/rerank", {"query": "a", "documents": {"text": "b"}}),
    ("/score", {"query": "a", "documents": ["b"]}),
    ("/score", {"text_1": "a", "text_2": ["b"], "queries": "c"}),
    ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}),
    ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}),
    ("/similarity", {"query": "a", "texts": ["b"]}),
    ("/similarity", {"inputs": ["a"]}),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"prompt_name": "none"}}),
    ("/embed", {"input": ["a"]}),
    ("/embed", {"inputs": ["a"], "dimensions": 7}),
    ("/embed", {"inputs": ["a"], "prompt_name": "query"}),
    ("/embed", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ("/v1/embeddings", {"inputs": ["a"]}),
    ("/v1/embeddings", {"input": ["a"], "encoding_format": "hex"}),
    ("/v1/embeddings", {"input": []}),
    ("/v1/embeddings", {"input": [[1, 2, 3]]}),
    ("/search", {"query": "a"}),
    ("/search", {"context": "a", "top_k": 0}),
    ("/search", {"context": "a", "top_k": 10**9}),
    ("/search", {"context": "a", "filter": "year ="}),
    ("/search", {"context": "a", "filter": "nowhere = 1"}),
    ("/search", {"context": "a", "engine": "fast"}),
    ("/candidates", {"candidates": []}),
    ("/candidates", {"candidates": [{"text": "no id"}]}),
    ("/candidates", {"candidates": [{"id": "x"}]}),
    ("/candidates", {"candidates": [{"id": "x", "text": 5}]}),
    ("/candidates", {"candidates": [{"id": 5, "text": "a number, where ids are texts"}]}),
    ("/candidates", {"candidates": [{"id": "x", "text": "a", "score": 1}]}),
    ("/candidates", {"candidates": [{"id": "x", "text": "a", "color": "red"}]}),
    ("/candidates", {"candidates": [{"id": "x", "text": "a"}, {"id": "x", "text": "b"}]}),
    ("/candidates", {"candidates": [{"id": "c0", "text": "another text than it has"}]}),
    ("/page/answers", {"turns": []}),
    ("/page/answers", {"turns": "hello"}),
    ("/page/why", {"turns": ["a"], "candidate": ""}),
]
CASES += [(path, json.dumps(body)) for path, body in OTHERS]


@pytest.fixture(scope="module")
def client(_poly_encoder, serve, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "index"
    rows = [{"id": f"c{place}", "text": f"candidate {place}", "year": 2000 + place} for place in range(5)]
    CandidateIndex.build(_poly_encoder, rows, path, show_progress_bar=False)
    with serve(_poly_encoder, index=str(path), **LIMITS) as client:
        assert client.post(
            "/similarity", json={"inputs": {"source_sentence": CANARY, "sentences": [CANARY]}}
        ).is_success
        yield client


def assert_refused(answer, path, statuses=range(400, 500)):
    assert answer.status_code in statuses, answer.text
    body = answer.json()
    if path in ("/v1/rerank", "/v2/rerank"):
        assert isinstance(body["message"], str)
        assert body["detail"] == body["message"]
    elif path in ("/", "/similarity", "/embed") or isinstance(body["error"], str):
        assert path in ("/", "/similarity", "/embed", "/rerank")
        assert isinstance(body["error"], str)
        assert body["error_type"] in ("Validation", "Backend", "Overloaded", "Unhealthy")
    else:
        assert isinstance(body["error"]["message"], str)
        assert body["error"]["code"] == answer.status_code
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    assert CANARY not in answer.text


def test_there_are_many():
    assert len(set(CASES)) >= 300


@pytest.mark.parametrize("path", GOOD)
def test_wrong_bodies(client, path):
    for number, (at, body) in enumerate(CASES):
        if at == path:
            answer = client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
            assert_refused(answer, path)
            assert answer.status_code not in (404, 405, 408, 499), (number, body[:200])
    assert client.post("/rerank", json=GOOD["/rerank"]).status_code == 200  # it is still there


def test_too_many_candidates(poly_encoder, serve):
    with serve(poly_encoder) as client:
        for path in ("/rerank", "/v2/rerank"):
            names = LISTS[path]
            assert_refused(client.post(path, content=changed(path, *names, value=["a"] * 100_001)), path, [413])


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank", "/v1/embeddings"])
def test_a_body_that_is_too_large(client, path):
    assert_refused(client.post(path, content=b" " * 100_001), path, [413])
    pieces = (b" " * 10_000 for _ in range(20))  # whose length is not said
    assert_refused(client.post(path, content=pieces), path, [413])


@pytest.mark.parametrize("body", [b"\xff\xfe", b"\x00", b'{"query": "\xff", "texts": ["a"]}', b"{}" * 40_000])
def test_what_is_no_text(client, body):
    assert_refused(client.post("/rerank", content=body), "/rerank", [422])


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/rerank"), ("DELETE", "/score"), ("GET", "/nowhere"), ("PUT", "/")]
)
def test_other_paths_and_methods(client, method, path):
    answer = client.request(method, path)
    assert_refused(answer, path, [404, 405])


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "limit=9999", "offset=1e3", "filter=no+such", "limit=" + "9" * 99]
)
def test_looks_at_nothing(client, query):
    assert_refused(client.get(f"/candidates?{query}"), "/candidates", [400])


def test_a_filter_that_cannot_be_read_is_said_in_our_words(client):
    for answer in (
        client.get("/candidates?filter=no+such"),
        client.post("/search", json={"context": "a", "filter": "no such"}),
    ):
        assert answer.json()["error"]["message"].startswith("The filter cannot be read")
        assert ".rs" not in answer.text  # nor where in Lance's source


@pytest.mark.parametrize(
    "body", [{}, {"ids": ["c0"], "filter": "year = 1"}, {"ids": "c0"}, {"filter": "year ="}, {"ids": [1.5]}]
)
def test_deletes_nothing(client, body):
    before = client.get("/candidates").json()["total"]
    assert_refused(client.request("DELETE", "/candidates", json=body), "/candidates", [400])
    assert client.get("/candidates").json()["total"] == before


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic c2VjcmV0", "secret", "Bearer sécret"])
def test_wrong_keys(poly_encoder, serve, header):
    with serve(poly_encoder, api_key="secret") as client:
        headers = {} if header is None else {"Authorization": header.encode()}
        for path, body in GOOD.items():
            assert_refused(client.post(path, json=body, headers=headers), path, [401])
        assert client.post("/rerank", json=GOOD["/rerank"], headers={"Authorization": "Bearer secret"}).is_success


def test_a_full_queue_in_each_form(poly_encoder, serve, monkeypatch):
    with serve(poly_encoder) as client:
        monkeypatch.setattr(client.app.state.service.batcher, "_max_waiting", 0)
        for path in CONTEXTS.keys() - {"/search"}:  # there is no index
            answer = client.post(path, json=GOOD[path])
            assert_refused(answer, path, [429])
            assert int(answer.headers["Retry-After"]) >= 1


def test_a_failure_of_the_model_says_nothing_of_itself(poly_encoder, serve, monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError(f"a tensor of {CANARY} in /home/somebody")

    with serve(poly_encoder) as client:
        monkeypatch.setattr(poly_encoder, "encode_query", fail)
        answer = client.post("/rerank", json=GOOD["/rerank"])
        assert_refused(answer, "/rerank", [500])
        assert "/home" not in answer.text
        monkeypatch.undo()
        assert client.post("/rerank", json=GOOD["/rerank"]).is_success
    assert CANARY not in caplog.text


def test_what_takes_too_long_is_given_up(poly_encoder, serve, monkeypatch):
    encode = poly_encoder.encode_query
    with serve(poly_encoder, timeout=0.3) as client:
        monkeypatch.setattr(
            poly_encoder, "encode_query", lambda *args, **options: time.sleep(0.8) or encode(*args, **options)
        )
        answer = client.post("/rerank", json=GOOD["/rerank"])
        assert_refused(answer, "/rerank", [504])
        monkeypatch.undo()
        time.sleep(0.8)
        assert client.post("/rerank", json=GOOD["/rerank"]).is_success


def test_what_was_given_up_goes_on_where_it_was(poly_encoder, serve, monkeypatch):
    """A client that tries again after a 504 finds what was encoded by then."""
    encode = poly_encoder.encode_document
    slow = lambda texts, **options: time.sleep(0.02 * len(texts)) or encode(texts, **options)  # noqa: E731
    with serve(poly_encoder, timeout=0.4, max_batch_tokens=50) as client:
        monkeypatch.setattr(poly_encoder, "encode_document", slow)
        body = {"query": "hello", "texts": [f"number {place}" for place in range(40)]}
        statuses = [client.post("/rerank", json=body).status_code for _ in range(6)]
    assert statuses[0] == 504
    assert statuses[-1] == 200
