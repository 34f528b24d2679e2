"""PolyEncoder: encoding both sides, scoring, and sentence-transformers' own evaluators."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, RerankingEvaluator

import tiny
from poly_encoders import PolyEncoder, poly_score
from poly_encoders.scoring import prepare

CONTEXTS = ["hello", ["a", "b c", "how are you?"], [{"role": "user", "content": "what time is it"}]]
CANDIDATES = ["yes", "no, not at all", "it is nine", "x"]


# --- encoding -------------------------------------------------------------------------------------------------------


def test_kinds_of_results(poly_encoder):
    assert poly_encoder.encode_query(CONTEXTS, convert_to_tensor=True).shape == torch.Size((3, 4, tiny.WIDTH))
    assert poly_encoder.encode_query("hello").shape == poly_encoder.encode_query(CONTEXTS[2]).shape == (4, tiny.WIDTH)
    assert poly_encoder.encode_document(CANDIDATES).shape == (4, tiny.WIDTH)
    assert poly_encoder.encode_document("yes").shape == (tiny.WIDTH,)
    as_list = poly_encoder.encode_query(CONTEXTS, convert_to_numpy=False, normalize_embeddings=True)
    assert [vectors.shape for vectors in as_list] == [(4, tiny.WIDTH)] * 3
    tokens = poly_encoder.encode_query(CONTEXTS, output_value="token_embeddings")
    assert [len(states) for states in tokens] == [len(poly_encoder.context_texts([c])[0]) + 2 for c in CONTEXTS]
    features = poly_encoder.encode_document(["yes"], output_value=None)
    assert features[0]["sentence_embedding"].shape == (tiny.WIDTH,)
    with pytest.raises(ValueError, match="output_value is"):
        poly_encoder.encode_document(["yes"], output_value="sentence")
    positional = poly_encoder.encode("yes", None, None, 1, False, "sentence_embedding", task="document")
    np.testing.assert_array_equal(positional, poly_encoder.encode_document("yes"))


@pytest.mark.parametrize("form", [tuple, np.array, lambda texts: Dataset.from_dict({"text": texts})["text"]])
def test_containers_order_and_batch_size_change_nothing(poly_encoder, form):
    texts = ["a", "a much longer text than that", "mid size", "", "zz"]
    for encode in (poly_encoder.encode_query, poly_encoder.encode_document):
        whole = encode(texts)
        np.testing.assert_allclose(encode(form(texts)), whole, atol=1e-6)
        np.testing.assert_allclose(encode(form(texts[::-1]), batch_size=2)[::-1], whole, atol=1e-5)


def test_the_sides_differ(codes_encoder):
    contexts, candidates = codes_encoder.encode_query(["yes"]), codes_encoder.encode_document(["yes"])
    tiny.shift(codes_encoder[0].model.candidate_encoder)
    assert not np.allclose(codes_encoder.encode_document(["yes"]), candidates)
    np.testing.assert_array_equal(codes_encoder.encode_query(["yes"]), contexts)


@pytest.mark.parametrize("kind", ["poly_encoder", "codes_encoder"])
def test_normalising_and_truncating_are_per_vector(kind, request):
    model = request.getfixturevalue(kind)
    for encode, texts in ((model.encode_query, CONTEXTS), (model.encode_document, CANDIDATES)):
        plain, unit = encode(texts), encode(texts, normalize_embeddings=True)
        lengths = np.linalg.norm(plain, axis=-1, keepdims=True)
        np.testing.assert_allclose(unit, plain / np.where(lengths == 0, 1, lengths), atol=1e-5)
        np.testing.assert_array_equal(encode(texts, truncate_dim=8), plain[..., :8])


def test_normalising_keeps_padding_vectors(checkpoints):
    model = PolyEncoder(checkpoints(), num_codes=9, context_vectors="first_m", device="cpu")
    vectors = model.encode_query(["abc"], normalize_embeddings=True)[0]
    assert (vectors != 0).any(axis=-1).tolist() == [True] * 5 + [False] * 4


def test_precision_is_for_candidates(poly_encoder):
    with pytest.raises(ValueError, match="context vectors"):
        poly_encoder.encode_query(CONTEXTS, precision="int8")
    stored = poly_encoder.encode_document(CANDIDATES, precision="binary")
    assert stored.shape == (4, tiny.WIDTH // 8)
    with pytest.raises(TypeError, match="quantised"):
        poly_encoder.similarity(poly_encoder.encode_query(CONTEXTS), stored)


def test_a_text_without_tokens_is_named(poly_encoder, checkpoints):
    assert poly_encoder.preprocess([""], task="query")["input_ids"].tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="no token"):
        PolyEncoder(checkpoints("qwen3"), num_codes=2, device="cpu").encode_query(["fine", ""])


def test_prompts_are_saved_and_go_before_their_side(codes_encoder, tmp_path):
    codes_encoder.prompts = {"query": "ask: ", "document": "say: "}
    codes_encoder.save_pretrained(str(tmp_path))
    again = PolyEncoder(str(tmp_path), device="cpu")
    assert again.prompts == codes_encoder.prompts
    codes_encoder.prompts = {"query": "", "document": ""}
    np.testing.assert_array_equal(codes_encoder.encode_query(["ask: hello"]), again.encode_query(["hello"]))
    np.testing.assert_array_equal(codes_encoder.encode_document(["hi"], prompt="say: "), again.encode_document(["hi"]))


def test_another_process(poly_encoder):
    pool = poly_encoder.start_multi_process_pool(["cpu"])
    try:
        found = poly_encoder.encode_query([*CONTEXTS, ["a\nb", "c"]] * 3, pool=pool, chunk_size=2)
    finally:
        poly_encoder.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, poly_encoder.encode_query([*CONTEXTS, ["a\nb", "c"]] * 3), atol=1e-5)
    assert (found[3] != 0).any(axis=-1).sum() == 2


@pytest.mark.parametrize("call", [lambda m: m.encode("x"), lambda m: m.encode(["x"]), lambda m: m.preprocess(["x"])])
def test_a_side_must_be_named(poly_encoder, call):
    with pytest.raises(ValueError, match=r"encode_query\(contexts\) or encode_document\(candidates\)"):
        call(poly_encoder)


@pytest.mark.parametrize("bad", [[None], [3], ["fine", None], None, ["\ud800"], [["turn", 5]], [[]], 3])
def test_bad_texts(poly_encoder, bad):
    for encode in (poly_encoder.encode_query, poly_encoder.encode_document):
        with pytest.raises((TypeError, ValueError)):
            encode(bad)


@pytest.mark.parametrize("options", [{}, {"precision": "binary"}, {"output_value": "token_embeddings"}])
def test_nan_is_an_error_in_every_form(poly_encoder, codes_encoder, options):
    with torch.no_grad():
        poly_encoder[0].model.candidate_encoder.embeddings.LayerNorm.weight.fill_(float("nan"))
        codes_encoder[0].model.codes[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        poly_encoder.encode_document(["a", "b"], **options)
    for model in (poly_encoder, codes_encoder):
        with pytest.raises(ValueError, match="NaN"):
            model.encode_query(["hi"])


# --- scoring --------------------------------------------------------------------------------------------------------


def test_similarity_is_the_engine_s_so_that_training_keeps_no_dots(poly_encoder):
    contexts, candidates = torch.randn(3, 4, tiny.WIDTH, requires_grad=True), torch.eye(3, tiny.WIDTH)
    for similarity in (poly_encoder.similarity, poly_encoder.similarity_pairwise):
        kinds, nodes = set(), [similarity(contexts, candidates).grad_fn]
        while nodes:
            node = nodes.pop()
            kinds.add(node.name())
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        assert any("poly_encoders" in kind for kind in kinds), kinds
        assert not any("Softmax" in kind for kind in kinds), kinds


@pytest.mark.parametrize(("kind", "temperature"), [("poly_encoder", 0.025), ("codes_encoder", 1.0)])
def test_similarity_is_the_model_s_score(kind, temperature, request):
    model = request.getfixturevalue(kind)
    contexts, candidates = model.encode_query(CONTEXTS), model.encode_document(CANDIDATES)
    expected = poly_score(torch.tensor(contexts), torch.tensor(candidates), 1 / temperature)
    torch.testing.assert_close(model.similarity(contexts, candidates), expected)
    torch.testing.assert_close(model.similarity(list(contexts), list(candidates)), expected)
    torch.testing.assert_close(model.similarity(contexts[0], candidates), expected[:1])
    torch.testing.assert_close(model.similarity(contexts, candidates[0]), expected[:, :1])
    torch.testing.assert_close(model.similarity_pairwise(contexts, candidates[:3]), expected.diagonal()[:3])
    torch.testing.assert_close(model.similarity_pairwise(contexts[0], candidates[0]), expected[0, :1])
    assert model.similarity(contexts, []).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"context_vectors": "learnt_codes", "normalize": False, "final_attention": "sqrt"}, tiny.WIDTH**-0.5),
        ({"context_vectors": "learnt_codes", "final_temperature": 0.5, "code_std": 1.0}, 2.0),
        ({"final_attention": "sqrt", "final_temperature": 0.5}, 2 * tiny.WIDTH**-0.5),
        ({"learn_final_temperature": True}, 40.0),
    ],
)
def test_attention_and_temperature_reach_similarity(checkpoints, options, scale):
    model = PolyEncoder(checkpoints(), num_codes=4, device="cpu", config_kwargs=options)
    contexts = model.encode_query(CONTEXTS, convert_to_tensor=True)
    candidates = model.encode_document(CANDIDATES, convert_to_tensor=True)
    assert isinstance(model.final_scale, float)
    torch.testing.assert_close(model.similarity(contexts, candidates), poly_score(contexts, candidates, scale))


@pytest.mark.parametrize("kind", ["poly_encoder", "codes_encoder"])
def test_ranking_by_vectors_that_are_there_is_ranking(kind, request):
    model = request.getfixturevalue(kind)
    texts = ["yes", "no", "maybe", "yes", "it is nine"]
    vectors = model.encode_document(texts)
    for context in CONTEXTS:
        expected = model.rank(context, texts, top_k=4, return_documents=True)
        for held in (
            vectors,
            torch.from_numpy(vectors),
            list(vectors),
            prepare(vectors),
            prepare(vectors, form="axes"),
        ):
            found = model.rank(context, texts, top_k=4, return_documents=True, candidate_vectors=held)
            assert [entry["text"] for entry in found] == [entry["text"] for entry in expected]
            assert [entry["score"] for entry in found] == pytest.approx(
                [entry["score"] for entry in expected], abs=1e-5
            )
        every = model.rank(context, texts, candidate_vectors=vectors)
        expected = model.rank(context, texts)
        assert [entry["corpus_id"] for entry in every] == [entry["corpus_id"] for entry in expected]
    assert len(model.rank("hello", texts, candidate_vectors=vectors, prompt="q: ")) == 5
    if kind == "poly_encoder":
        for wrong in (2 * vectors, prepare(2 * vectors)):
            with pytest.raises(ValueError, match="are of lengths from 2 to 2"):
                model.rank("hello", texts, top_k=2, candidate_vectors=wrong)
    assert model.rank("hello", [], candidate_vectors=vectors[:0]) == []
    with pytest.raises(ValueError, match="4 candidates have 5 vectors"):
        model.rank("hello", texts[:4], candidate_vectors=vectors)


def test_what_makes_no_scores(poly_encoder):
    contexts, candidates = poly_encoder.encode_query(CONTEXTS), poly_encoder.encode_document(CANDIDATES)
    with pytest.raises(ValueError, match="encode_query"):
        poly_encoder.similarity(candidates[:3], candidates)
    with pytest.raises(ValueError, match="no pairs"):
        poly_encoder.similarity_pairwise(contexts, candidates)
    with pytest.raises(ValueError, match="not by 'cosine'"):
        poly_encoder.similarity_fn_name = "cosine"
    assert poly_encoder.similarity_fn_name == "custom"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_candidate_vectors_of_another_length_or_width(poly_encoder, codes_encoder, dtype):
    """Vectors of an index that somebody has, taken for what they are not, would give other scores in silence."""
    contexts, index = poly_encoder.encode_query(CONTEXTS), poly_encoder.encode_document(CANDIDATES).astype(dtype)
    expected = poly_encoder.similarity(contexts, index.astype(np.float32))
    torch.testing.assert_close(poly_encoder.similarity(contexts, index), expected)
    for wrong in (2 * index, index * [[1], [1], [1], [1.1]], 0 * index, 2 * index[0]):
        with pytest.raises(ValueError, match=r"of lengths from .* Scale each to length 1"):
            poly_encoder.similarity(contexts, wrong.astype(dtype))
    with pytest.raises(ValueError, match="Scale each to length 1"):
        poly_encoder.similarity_pairwise(contexts, 2 * index[:3])
    assert codes_encoder.similarity(contexts, 2 * index).shape == (3, 4)
    for model in (poly_encoder, codes_encoder):
        with pytest.raises(ValueError, match="32 wide, candidate vectors 16; they must match"):
            model.similarity(contexts, np.eye(4, 16, dtype=dtype))


def test_information_retrieval_evaluator(poly_encoder):
    queries = {"q0": "hello there", "q1": "what time is it", "q2": "zzz"}
    corpus = {f"d{i}": text for i, text in enumerate([*CANDIDATES, "good day", "half past"])}
    relevant = {"q0": {"d4"}, "q1": {"d2", "d5"}, "q2": {"d0"}}
    found = InformationRetrievalEvaluator(
        queries, corpus, relevant, mrr_at_k=[10], accuracy_at_k=[1, 3], corpus_chunk_size=2, write_csv=False
    )(poly_encoder)
    rankings = [poly_encoder.rank(query, list(corpus.values())) for query in queries.values()]
    orders = [[f"d{entry['corpus_id']}" for entry in ranking] for ranking in rankings]
    firsts = [min(map(order.index, right)) for order, right in zip(orders, relevant.values(), strict=True)]
    assert found["custom_mrr@10"] == pytest.approx(np.mean([1 / (first + 1) for first in firsts]))
    for k in (1, 3):
        assert found[f"custom_accuracy@{k}"] == pytest.approx(np.mean([first < k for first in firsts]))


@pytest.mark.parametrize("batched", [True, False])
def test_reranking_evaluator(poly_encoder, batched):
    samples = [
        {"query": "hello", "positive": ["yes"], "negative": ["no", "it is nine"]},
        {"query": "what time", "positive": ["it is nine"], "negative": ["x", "no"]},
    ]
    options = {"similarity_fct": poly_encoder.similarity, "use_batched_encoding": batched, "write_csv": False}
    found = RerankingEvaluator(samples, **options)(poly_encoder)
    rankings = [poly_encoder.rank(sample["query"], sample["positive"] + sample["negative"]) for sample in samples]
    firsts = [[entry["corpus_id"] for entry in ranking].index(0) for ranking in rankings]
    assert found["mrr@10"] == pytest.approx(np.mean([1 / (first + 1) for first in firsts]))
