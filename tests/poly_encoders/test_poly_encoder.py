"""PolyEncoder: encoding both sides, scoring, ranking, saving, and what it refuses."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, RerankingEvaluator

import tiny
from poly_encoders import PolyEncoder, poly_score

CONTEXTS = ["hello", ["a", "b c", "how are you?"], [{"role": "user", "content": "what time is it"}]]
CANDIDATES = ["yes", "no, not at all", "it is nine", "x"]


# --- encoding -------------------------------------------------------------------------------------------------------


def test_shapes_of_both_sides(poly_encoder):
    assert poly_encoder.encode_query(CONTEXTS).shape == (3, 4, tiny.WIDTH)
    assert poly_encoder.encode_query("hello").shape == (4, tiny.WIDTH)
    assert poly_encoder.encode_query(CONTEXTS[2]).shape == (4, tiny.WIDTH)
    assert poly_encoder.encode_document(CANDIDATES).shape == (4, tiny.WIDTH)
    assert poly_encoder.encode_document("yes").shape == (tiny.WIDTH,)


def test_forms_of_a_context_are_one(poly_encoder):
    turns = ["hi", "how are you?"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "how are you?"}]
    vectors = poly_encoder.encode_query([turns, messages, "hi\nhow are you?"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    np.testing.assert_allclose(poly_encoder.encode_query(messages), vectors[0], atol=1e-5)


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda texts: Dataset.from_dict({"text": texts})["text"]])
def test_containers_of_texts(poly_encoder, form):
    texts = ["one", "two", "three words here"]
    np.testing.assert_allclose(poly_encoder.encode_query(form(texts)), poly_encoder.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(
        poly_encoder.encode_document(form(texts)), poly_encoder.encode_document(texts), atol=1e-6
    )


def test_order_and_batch_size_change_nothing(poly_encoder):
    texts = ["a", "a much longer text than that", "mid size", "", "zz"]
    whole = poly_encoder.encode_query(texts)
    np.testing.assert_allclose(poly_encoder.encode_query(texts, batch_size=1), whole, atol=1e-5)
    np.testing.assert_allclose(poly_encoder.encode_query(texts[::-1])[::-1], whole, atol=1e-5)


def test_the_sides_differ(poly_encoder):
    with torch.no_grad():
        poly_encoder[0].model.candidate_encoder.embeddings.word_embeddings.weight.mul_(2)
    changed = poly_encoder.encode_document(["yes"])
    with torch.no_grad():
        poly_encoder[0].model.candidate_encoder.embeddings.word_embeddings.weight.div_(2)
    contexts = poly_encoder.encode_query(["yes"])
    assert not np.allclose(poly_encoder.encode_document(["yes"]), changed)
    np.testing.assert_array_equal(poly_encoder.encode_query(["yes"]), contexts)


def test_kinds_of_results(poly_encoder):
    assert isinstance(poly_encoder.encode_query(CONTEXTS, convert_to_tensor=True), torch.Tensor)
    as_list = poly_encoder.encode_query(CONTEXTS, convert_to_numpy=False)
    assert isinstance(as_list, list)
    assert as_list[0].shape == (4, tiny.WIDTH)
    tokens = poly_encoder.encode_query(CONTEXTS, output_value="token_embeddings")
    assert [len(states) for states in tokens] == [len(poly_encoder.context_texts([c])[0]) + 2 for c in CONTEXTS]
    features = poly_encoder.encode_document(["yes"], output_value=None)
    assert features[0]["sentence_embedding"].shape == (tiny.WIDTH,)


def test_normalising_is_per_vector(poly_encoder):
    plain = poly_encoder.encode_query(CONTEXTS)
    unit = poly_encoder.encode_query(CONTEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=-1, keepdims=True), atol=1e-5)
    candidates = poly_encoder.encode_document(CANDIDATES, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=-1), 1, atol=1e-5)


def test_normalising_keeps_padding_vectors(checkpoints):
    model = PolyEncoder(checkpoints(), num_codes=9, context_vectors="first_m", device="cpu")
    vectors = model.encode_query(["abc"], normalize_embeddings=True)[0]
    assert (vectors[:5] != 0).any(axis=-1).all()
    assert (vectors[5:] == 0).all()


def test_truncating_the_width(poly_encoder):
    assert poly_encoder.encode_query(CONTEXTS, truncate_dim=8).shape == (3, 4, 8)
    np.testing.assert_array_equal(
        poly_encoder.encode_query(CONTEXTS, truncate_dim=8), poly_encoder.encode_query(CONTEXTS)[..., :8]
    )
    assert poly_encoder.encode_document(CANDIDATES, truncate_dim=8).shape == (4, 8)


def test_precision_is_for_candidates(poly_encoder):
    with pytest.raises(ValueError, match="precision='int8' is for candidates"):
        poly_encoder.encode_query(CONTEXTS, precision="int8")
    stored = poly_encoder.encode_document(CANDIDATES, precision="binary")
    assert stored.shape == (4, tiny.WIDTH // 8)
    with pytest.raises(TypeError, match="quantised"):
        poly_encoder.similarity(poly_encoder.encode_query(CONTEXTS), stored)


def test_nothing_to_encode_keeps_its_axes(poly_encoder):
    assert poly_encoder.encode_query([]).shape == (0, 4, tiny.WIDTH)
    assert poly_encoder.encode_document([]).shape == (0, tiny.WIDTH)
    assert poly_encoder.encode_query([], convert_to_tensor=True).shape == (0, 4, tiny.WIDTH)
    assert poly_encoder.encode_document([], convert_to_numpy=False) == []


def test_the_empty_string_is_its_special_tokens(poly_encoder):
    ids = poly_encoder.preprocess([""], task="query")["input_ids"]
    assert ids.tolist() == [[0, 2]]
    assert np.isfinite(poly_encoder.encode_query([""])).all()


def test_a_text_without_tokens_is_named(checkpoints):
    model = PolyEncoder(checkpoints("qwen3"), num_codes=2, device="cpu")
    with pytest.raises(ValueError, match="no token"):
        model.encode_query(["fine", ""])


def test_the_oldest_tokens_of_a_context_go_first_and_the_last_of_a_candidate(checkpoints):
    model = PolyEncoder(checkpoints(), num_codes=2, max_context_length=7, max_candidate_length=6, device="cpu")
    decode = model.tokenizer.decode
    context = model.preprocess([["abcdef", "ghij"]], task="query")["input_ids"][0]
    assert decode(context, skip_special_tokens=True).replace(" ", "") == "\nghij".replace(" ", "")
    candidate = model.preprocess(["abcdefgh"], task="document")["input_ids"][0]
    assert decode(candidate, skip_special_tokens=True).replace(" ", "") == "abcd"
    assert len(context) == 7
    assert len(candidate) == 6


def test_prompts(poly_encoder, tmp_path):
    poly_encoder.prompts = {"query": "ask: ", "document": "say: "}
    with_prompt = poly_encoder.encode_query(["hello"])
    poly_encoder.save_pretrained(str(tmp_path))
    again = PolyEncoder(str(tmp_path), device="cpu")
    assert again.prompts == poly_encoder.prompts
    np.testing.assert_array_equal(again.encode_query(["hello"]), with_prompt)
    poly_encoder.prompts = {"query": "", "document": ""}
    np.testing.assert_array_equal(poly_encoder.encode_query(["ask: hello"]), with_prompt)
    np.testing.assert_array_equal(poly_encoder.encode_document(["hi"], prompt="say: "), again.encode_document(["hi"]))


def test_a_prompt_survives_a_long_context(checkpoints):
    model = PolyEncoder(checkpoints(), num_codes=2, max_context_length=12, device="cpu")
    ids = model.preprocess(["abcdefghijklmnopqrstuvwxyz"], prompt="ask:", task="query")["input_ids"][0]
    assert model.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "ask:uvwxyz"
    with pytest.raises(ValueError, match="alone fills"):
        model.preprocess(["abc"], prompt="a prompt far too long", task="query")


def test_several_processes(poly_encoder):
    expected = poly_encoder.encode_query(CONTEXTS * 3)
    pool = poly_encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = poly_encoder.encode_query(CONTEXTS * 3, pool=pool, chunk_size=2)
        candidates = poly_encoder.encode_document(CANDIDATES, pool=pool)
    finally:
        poly_encoder.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(candidates, poly_encoder.encode_document(CANDIDATES), atol=1e-5)


@pytest.mark.parametrize("call", [lambda m: m.encode("x"), lambda m: m.encode(["x"]), lambda m: m.preprocess(["x"])])
def test_a_side_must_be_named(poly_encoder, call):
    with pytest.raises(ValueError, match=r"encode_query\(contexts\) or encode_document\(candidates\)"):
        call(poly_encoder)


@pytest.mark.parametrize("bad", [[None], [3], ["fine", None], [["turn", 5]], [[]], None, 3])
def test_bad_contexts(poly_encoder, bad):
    with pytest.raises((TypeError, ValueError)):
        poly_encoder.encode_query(bad)


@pytest.mark.parametrize("bad", [[None], [3], ["fine", ["a", "b"]], ["\ud800"], None])
def test_bad_candidates(poly_encoder, bad):
    with pytest.raises((TypeError, ValueError)):
        poly_encoder.encode_document(bad)


# --- scoring --------------------------------------------------------------------------------------------------------


def test_similarity_is_the_engine_s_so_that_training_keeps_no_dots(poly_encoder):
    contexts, candidates = torch.randn(3, 4, tiny.WIDTH, requires_grad=True), torch.randn(3, tiny.WIDTH)
    for scores in (
        poly_encoder.similarity(contexts, candidates),
        poly_encoder.similarity_pairwise(contexts, candidates),
    ):
        kinds, nodes = set(), [scores.grad_fn]
        while nodes:
            node = nodes.pop()
            kinds.add(node.name())
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        assert any("poly_encoders" in kind for kind in kinds), kinds
        assert not any("Softmax" in kind for kind in kinds), kinds


def test_similarity_is_the_model_s_score(poly_encoder):
    contexts = poly_encoder.encode_query(CONTEXTS)
    candidates = poly_encoder.encode_document(CANDIDATES)
    expected = poly_score(torch.tensor(contexts), torch.tensor(candidates))
    torch.testing.assert_close(poly_encoder.similarity(contexts, candidates), expected)
    torch.testing.assert_close(poly_encoder.similarity(list(contexts), list(candidates)), expected)
    torch.testing.assert_close(poly_encoder.similarity(contexts[0], candidates), expected[:1])
    torch.testing.assert_close(poly_encoder.similarity(contexts, candidates[0]), expected[:, :1])
    torch.testing.assert_close(poly_encoder.similarity_pairwise(contexts, candidates[:3]), expected.diagonal()[:3])


def test_sqrt_attention_reaches_similarity(checkpoints):
    model = PolyEncoder(
        checkpoints(), num_codes=4, device="cpu", config_kwargs={"final_attention": "sqrt", "code_std": 1.0}
    )
    contexts = model.encode_query(CONTEXTS, convert_to_tensor=True)
    candidates = model.encode_document(CANDIDATES, convert_to_tensor=True)
    torch.testing.assert_close(
        model.similarity(contexts, candidates), poly_score(contexts, candidates, tiny.WIDTH**-0.5)
    )


def test_two_sets_of_candidates_are_no_contexts(poly_encoder):
    candidates = poly_encoder.encode_document(CANDIDATES[:3])
    with pytest.raises(ValueError, match="encode_query"):
        poly_encoder.similarity(candidates, candidates)
    with pytest.raises(ValueError, match="no pairs"):
        poly_encoder.similarity_pairwise(poly_encoder.encode_query(CONTEXTS), poly_encoder.encode_document(CANDIDATES))


def test_rank(poly_encoder):
    ranking = poly_encoder.rank(CONTEXTS[1], CANDIDATES, return_documents=True)
    scores = poly_encoder.similarity(
        poly_encoder.encode_query([CONTEXTS[1]]), poly_encoder.encode_document(CANDIDATES)
    )[0]
    assert [entry["corpus_id"] for entry in ranking] == scores.argsort(descending=True).tolist()
    for entry in ranking:
        assert set(entry) == {"corpus_id", "score", "text"}
        assert entry["text"] == CANDIDATES[entry["corpus_id"]]
        assert entry["score"] == pytest.approx(scores[entry["corpus_id"]].item(), abs=1e-4)
    assert poly_encoder.rank(CONTEXTS[1], CANDIDATES, top_k=2, return_documents=True) == ranking[:2]


def test_rank_takes_a_list_of_strings_as_turns(poly_encoder):
    assert poly_encoder.rank(["hi", "you"], CANDIDATES) == poly_encoder.rank("hi\nyou", CANDIDATES)


def test_equal_scores_keep_the_order_given(poly_encoder):
    assert [entry["corpus_id"] for entry in poly_encoder.rank("hi", ["same", "same", "same"])] == [0, 1, 2]


def test_rank_of_few(poly_encoder):
    assert poly_encoder.rank("hi", []) == []
    assert poly_encoder.rank("hi", ["one"])[0]["corpus_id"] == 0
    assert poly_encoder.rank("hi", CANDIDATES, top_k=0) == []
    assert len(poly_encoder.rank("hi", CANDIDATES, top_k=99)) == 4


@pytest.mark.parametrize(
    ("context", "candidates"),
    [(None, ["a"]), ([], ["a"]), ("a", "b"), ("a", None), ("a", ["b", None]), (["a", 1], ["b"])],
)
def test_rank_of_nonsense(poly_encoder, context, candidates):
    with pytest.raises((TypeError, ValueError)):
        poly_encoder.rank(context, candidates)
    with pytest.raises(ValueError, match="top_k"):
        poly_encoder.rank("a", ["b"], top_k=-1)


def test_nan_in_the_weights_is_an_error(poly_encoder):
    with torch.no_grad():
        poly_encoder[0].model.codes[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        poly_encoder.rank("hi", CANDIDATES)
    with pytest.raises(ValueError, match="NaN"):
        poly_encoder.encode_query(["hi"])


# --- sentence-transformers' own evaluators --------------------------------------------------------------------------


def test_information_retrieval_evaluator(poly_encoder):
    queries = {"q0": "hello there", "q1": "what time is it", "q2": "zzz"}
    corpus = {f"d{i}": text for i, text in enumerate([*CANDIDATES, "good day", "half past"])}
    relevant = {"q0": {"d4"}, "q1": {"d2", "d5"}, "q2": {"d0"}}
    found = InformationRetrievalEvaluator(
        queries, corpus, relevant, mrr_at_k=[10], accuracy_at_k=[1, 3], corpus_chunk_size=2, write_csv=False
    )(poly_encoder)
    scores = poly_encoder.similarity(
        poly_encoder.encode_query(list(queries.values())), poly_encoder.encode_document(list(corpus.values()))
    )
    reciprocal, first, third = [], [], []
    for row, right in zip(scores, relevant.values(), strict=True):
        order = [f"d{i}" for i in row.argsort(descending=True).tolist()]
        rank = min(order.index(document) for document in right) + 1
        reciprocal.append(1 / rank)
        first.append(rank <= 1)
        third.append(rank <= 3)
    assert found["poly_mrr@10"] == pytest.approx(np.mean(reciprocal))
    assert found["poly_accuracy@1"] == pytest.approx(np.mean(first))
    assert found["poly_accuracy@3"] == pytest.approx(np.mean(third))


@pytest.mark.parametrize("batched", [True, False])
def test_reranking_evaluator(poly_encoder, batched):
    samples = [
        {"query": "hello", "positive": ["yes"], "negative": ["no", "it is nine"]},
        {"query": "what time", "positive": ["it is nine"], "negative": ["x", "no"]},
    ]
    found = RerankingEvaluator(
        samples, similarity_fct=poly_encoder.similarity, use_batched_encoding=batched, write_csv=False
    )(poly_encoder)
    reciprocal = []
    for sample in samples:
        ranking = poly_encoder.rank(sample["query"], sample["positive"] + sample["negative"])
        reciprocal.append(1 / (1 + [entry["corpus_id"] for entry in ranking].index(0)))
    assert found["mrr@10"] == pytest.approx(np.mean(reciprocal))


def test_a_prompt_that_leaves_no_room_for_a_candidate(poly_encoder):
    with pytest.raises(ValueError, match="alone fills"):
        poly_encoder.encode_document(["x"], prompt="Q" * 500)


@pytest.mark.parametrize(
    "options", [{"precision": "int8"}, {"output_value": "token_embeddings"}, {"output_value": None}]
)
def test_nan_is_an_error_in_every_form(poly_encoder, options):
    with torch.no_grad():
        poly_encoder[0].model.candidate_encoder.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        poly_encoder.encode_document(["a", "b"], **options)


def test_no_candidates_give_no_scores(poly_encoder):
    assert poly_encoder.similarity(poly_encoder.encode_query(["a", "b"]), []).shape == (2, 0)
    assert poly_encoder.encode_document([], truncate_dim=8).shape == (0, 8)


def test_upstream_s_positional_arguments(poly_encoder):
    found = poly_encoder.encode("yes", None, None, 1, False, "sentence_embedding", task="document")
    np.testing.assert_array_equal(found, poly_encoder.encode_document("yes"))
