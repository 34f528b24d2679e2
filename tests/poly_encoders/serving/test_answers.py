"""Every interface's answer is what `rank` gives, in that interface's form."""

import base64
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.serving.rerank_routes import to_unit

QUERY = ["hello", "do you like tea?"]
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "do you like tea?"}]
TEXTS = ["yes, green tea", "no", "what?", "no", "a cat \U0001f408 said “no”"]


def unit(model, score):
    """The map that docs/serving.md describes."""
    if getattr(model, "scores_are_cosines", False):
        return (1 + score) / 2
    if isinstance(model, CrossEncoder):
        return 1 / (1 + math.exp(-score))
    z = score * float(getattr(model, "final_scale", 1))
    return (1 + z / (1 + abs(z))) / 2


def ranked(model, top_k=None):
    return [(row["corpus_id"], row["score"]) for row in model.rank(QUERY, TEXTS, top_k)]


def assert_ranking(found, expected):
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_scores_between_0_and_1_keep_their_order(any_model, codes_encoder):
    """Also large dot products, of which a sigmoid would make 1."""
    for model, scores in ((any_model, (-1, -0.5, 0, 0.9, 0.90001, 1)), (codes_encoder, (-500, -50, 0, 50, 50.1, 500))):
        service = type("Service", (), {"model": model})
        found = [to_unit(service)(score) for score in scores]
        assert sorted(set(found)) == found
        assert 0 <= found[0] < found[-1] <= 1
        assert found == pytest.approx([unit(model, score) for score in scores])


@pytest.mark.parametrize("query", [QUERY, MESSAGES])
def test_tei(any_model, serve, query):
    with serve(any_model) as client:
        rows = client.post("/rerank", json={"query": query, "texts": TEXTS, "raw_scores": True}).json()
        assert_ranking([(row["index"], row["score"]) for row in rows], ranked(any_model))
        rows = client.post("/rerank", json={"query": query, "texts": TEXTS, "return_text": True}).json()
    expected = [(index, unit(any_model, score)) for index, score in ranked(any_model)]
    assert_ranking([(row["index"], row["score"]) for row in rows], expected)
    assert all(0 <= row["score"] <= 1 and row["text"] == TEXTS[row["index"]] for row in rows)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/infinity/rerank"])
def test_documents(any_model, serve, path):
    body = {"model": "m", "query": QUERY, "documents": [{"text": TEXTS[0]}, *TEXTS[1:]], "top_n": 3, "user": None}
    with serve(any_model) as client:
        raw = client.post(path, json={**body, "raw_scores": True}).json()["results"]
        full = client.post(path, json={**body, "return_documents": True}).json()
    assert_ranking([(row["index"], row["relevance_score"]) for row in raw], ranked(any_model, 3))
    expected = [(index, unit(any_model, score)) for index, score in ranked(any_model, 3)]
    assert_ranking([(row["index"], row["relevance_score"]) for row in full["results"]], expected)
    shown = [TEXTS[row["index"]] for row in full["results"]]
    plain = path == "/infinity/rerank"
    assert [row["document"] for row in full["results"]] == [text if plain else {"text": text} for text in shown]
    assert full["usage"]["total_tokens"] > len(TEXTS)


def test_documents_of_fields_and_cut_ones(poly_encoder, serve):
    documents = [{"title": "no", "body": "what?"}, {"title": "yes", "body": "tea"}]
    with serve(poly_encoder) as client:
        body = {"query": QUERY, "documents": documents, "rank_fields": ["title", "body"], "raw_scores": True}
        rows = client.post("/v1/rerank", json=body).json()["results"]
        expected = poly_encoder.rank(QUERY, ["no\nwhat?", "yes\ntea"])
        assert_ranking(
            [(row["index"], row["relevance_score"]) for row in rows],
            [(row["corpus_id"], row["score"]) for row in expected],
        )
        body = {"query": QUERY, "documents": ["abcdef", "abcxyz"], "max_tokens_per_doc": 3, "raw_scores": True}
        scores = [row["relevance_score"] for row in client.post("/v2/rerank", json=body).json()["results"]]
        assert scores[0] == scores[1] == pytest.approx(poly_encoder.rank(QUERY, ["abc"])[0]["score"], abs=1e-5)


def test_score(any_model, serve):
    expected = {text: row for row in any_model.rank(QUERY, TEXTS) for text in [TEXTS[row["corpus_id"]]]}
    scores = [expected[text]["score"] for text in TEXTS]
    with serve(any_model) as client:
        for body in (
            {"text_1": MESSAGES, "text_2": TEXTS},
            {"queries": [QUERY], "documents": TEXTS},
            {"queries": [QUERY] * len(TEXTS), "items": TEXTS},
            {"data_1": [MESSAGES], "data_2": TEXTS},
        ):
            data = client.post("/score", json=body).json()["data"]
            assert [row["score"] for row in data] == pytest.approx(scores, abs=1e-5)
        pairs = {"text_1": ["hello", "what?"], "text_2": ["no", "tea"], "use_activation": True}
        data = client.post("/v1/score", json=pairs).json()["data"]
    each = [any_model.rank(one, [other])[0]["score"] for one, other in zip(*list(pairs.values())[:2], strict=True)]
    assert [row["score"] for row in data] == pytest.approx([unit(any_model, score) for score in each], abs=1e-5)


@pytest.mark.parametrize("path", ["/similarity", "/"])
def test_similarity(any_model, serve, path):
    with serve(any_model) as client:
        inputs = {"source_sentence": QUERY, "sentences": TEXTS}
        scores = client.post(path, json={"inputs": inputs, "parameters": {"truncate": True}}).json()
    best = sorted(range(len(TEXTS)), key=lambda place: -scores[place])
    assert_ranking([(place, scores[place]) for place in best], ranked(any_model))


@pytest.mark.parametrize("kind", ["poly_encoder", "bi_encoder"])
def test_embeddings(kind, serve, request):
    model = request.getfixturevalue(kind)
    expected = model.encode_document(TEXTS)
    with serve(model) as client:
        for path in ("/embed", "/"):
            np.testing.assert_allclose(client.post(path, json={"inputs": TEXTS}).json(), expected, atol=1e-6)
        rows = client.post("/v1/embeddings", json={"input": TEXTS, "model": "m"}).json()["data"]
        np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)
        rows = client.post("/embeddings", json={"input": TEXTS[0], "encoding_format": "base64"}).json()["data"]
        as_bytes = np.frombuffer(base64.b64decode(rows[0]["embedding"]), dtype="<f4")
        np.testing.assert_allclose(as_bytes, expected[0], atol=1e-6)
        answer = client.post("/v1/embeddings", json={"input": [MESSAGES], "input_type": "query"})
        if isinstance(model, PolyEncoder):
            assert answer.status_code == 400
            assert f"{model[0].config.num_context_vectors} vectors" in answer.json()["error"]["message"]
            assert "/rerank" in answer.json()["error"]["message"]
        else:
            found = answer.json()["data"][0]["embedding"]
            np.testing.assert_allclose(found, model.encode_query([QUERY])[0], atol=1e-6)


def test_a_cross_encoder_has_no_vectors(cross_encoder, serve):
    with serve(cross_encoder) as client:
        answer = client.post("/embed", json={"inputs": "a"})
    assert answer.status_code == 422
    assert "/score" in answer.json()["error"]


def test_contexts_of_one_text_keep_their_turns(poly_encoder, serve):
    """A separator inside a turn makes the text that two turns make, and is no boundary."""
    contexts, texts = [["a", "b"], [f"a{poly_encoder.turn_separator}b"]], ["tea", "tea"]
    with serve(poly_encoder) as client:
        data = client.post("/score", json={"queries": contexts, "documents": texts}).json()["data"]
    expected = [poly_encoder.rank(context, ["tea"])[0]["score"] for context in contexts]
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    assert [row["score"] for row in data] == pytest.approx(expected, abs=1e-5)


def test_cut_texts_are_cut_and_said(any_model, serve):
    long = "tea " * 500
    with serve(any_model) as client:
        answer = client.post("/rerank", json={"query": "hello", "texts": ["no", long], "raw_scores": True})
        assert answer.headers["x-truncated-texts"] == "1"
        expected = any_model.rank("hello", ["no", long])
        assert_ranking(
            [(row["index"], row["score"]) for row in answer.json()],
            [(row["corpus_id"], row["score"]) for row in expected],
        )
        refused = client.post("/rerank", json={"query": "hello", "texts": ["no", long], "truncate": False})
        assert refused.status_code == 422
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).headers["x-truncated-texts"] == "0"


def test_candidates_are_encoded_once(poly_encoder, serve, monkeypatch):
    with serve(poly_encoder) as client:
        body = {"query": "hello", "texts": TEXTS, "raw_scores": True}
        first = client.post("/rerank", json=body).json()
        monkeypatch.setattr(poly_encoder, "encode_document", None)  # would fail
        assert client.post("/rerank", json=body).json() == first
        other = client.post("/rerank", json={**body, "query": "what?", "texts": TEXTS[::-1]}).json()
        expected = sorted(row["score"] for row in other)
        metrics = client.get("/metrics").text
    monkeypatch.undo()
    assert expected == pytest.approx(sorted(row["score"] for row in poly_encoder.rank("what?", TEXTS)), abs=1e-5)
    assert "poly_encoders_cache_hits_total 8.0" in metrics  # "no" twice, which is one candidate
    assert "poly_encoders_cache_misses_total 4.0" in metrics


def test_many_clients_each_get_their_own(any_model, serve):
    """Batches mix their texts; no answer does."""
    chooser = torch.Generator().manual_seed(0)
    requests = []
    for number in range(60):
        picks = torch.randint(0, 26, (3,), generator=chooser).tolist()
        requests.append((f"context {number}", [f"{chr(97 + pick)} for {number}" for pick in picks]))
    with serve(any_model, max_batch_tokens=200) as client, ThreadPoolExecutor(12) as pool:

        def ask(request):
            return client.post("/similarity", json={"inputs": {"source_sentence": request[0], "sentences": request[1]}})

        answers = [*pool.map(ask, requests)]
    for (context, texts), answer in zip(requests, answers, strict=True):
        rows = sorted(any_model.rank(context, texts), key=lambda row: row["corpus_id"])
        assert answer.json() == pytest.approx([row["score"] for row in rows], abs=1e-5)


def test_prompts(sentence_transformer_folder, serve):
    model = PolyEncoder(
        sentence_transformer_folder, device="cpu", prompts={"query": "q: ", "document": "d: ", "x": "x "}
    )
    with serve(model) as client:
        inputs = {"source_sentence": "hello", "sentences": ["no", "yes"]}
        found = client.post("/similarity", json={"inputs": inputs}).json()
        other = client.post("/similarity", json={"inputs": inputs, "parameters": {"prompt_name": "x"}}).json()
        refused = client.post("/similarity", json={"inputs": inputs, "parameters": {"prompt_name": "y"}})
    for scores, options in ((found, {}), (other, {"prompt_name": "x"})):
        rows = sorted(model.rank("hello", ["no", "yes"], **options), key=lambda row: row["corpus_id"])
        assert scores == pytest.approx([row["score"] for row in rows], abs=1e-5)
    assert refused.status_code == 422


def test_status(any_model, serve):
    with serve(any_model, api_key="secret") as client:
        for path in ("/health", "/ready", "/live", "/ping"):
            assert client.get(path).status_code == client.head(path).status_code == 200
        assert client.get("/info").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        info = client.get("/info").json()
        assert info["model_type"].endswith("encoder")
        vectors = {PolyEncoder: 4, BiEncoder: 1, CrossEncoder: 0}  # the fixture's num_codes
        assert info["context_vectors"] == vectors[type(any_model)]
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/openapi.json").json()["paths"]["/rerank"]["post"]["requestBody"]
        assert "poly_encoders_requests_total" in client.get("/metrics").text
    assert not client.app.state.service.batcher.is_alive
