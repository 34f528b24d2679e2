"""BiEncoder: the paper's reductions, and checkpoints that plain sentence-transformers reads to the same bits."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import tiny
from poly_encoders import BiEncoder
from without_package import run_without_package

CONTEXTS = ["hello", ["a", "b c"], "a long text that goes on and on, far beyond the limit of tokens"]
CANDIDATES = ["yes", "no, not at all", "another long text that goes on and on, far beyond the limit"]
KINDS = [
    {"reduction": reduction, "share_encoders": shared, **({"m": 3} if reduction == "first_m_mean" else {})}
    for reduction in ("first", "mean", "first_m_mean")
    for shared in (False, True)
]

WITHOUT_PACKAGE = """
import json, numpy as np
from sentence_transformers import SentenceTransformer
path, trust, out, texts = sys.argv[1], sys.argv[2] == "True", sys.argv[3], json.loads(sys.argv[4])
model = SentenceTransformer(path, trust_remote_code=trust, device="cpu")
query, document = model.encode_query(texts["query"]), model.encode_document(texts["document"])
np.savez(out, query=query, document=document, scores=model.similarity(query, document))
"""


def make(checkpoints, **options):
    return BiEncoder(checkpoints(), device="cpu", **{"max_context_length": 20, "max_candidate_length": 12, **options})


@pytest.mark.parametrize("options", KINDS)
def test_vectors_follow_the_paper(checkpoints, options):
    model = make(checkpoints, **options)
    contexts, candidates = model.encode_query(CONTEXTS), model.encode_document(CANDIDATES)
    assert contexts.shape == candidates.shape == (3, tiny.WIDTH)
    encoders = model._transformers()
    for task, encoder, vectors, texts in (
        ("query", encoders[0], contexts, model.context_texts(CONTEXTS)),
        ("document", encoders[-1], candidates, CANDIDATES),
    ):
        for text, vector in zip(texts, vectors, strict=True):
            features = model.preprocess([text], task=task)
            with torch.no_grad():
                hidden = encoder.model(
                    input_ids=features["input_ids"], attention_mask=features["attention_mask"]
                ).last_hidden_state[0]
            kind = options["reduction"]
            expected = hidden[0] if kind == "first" else (hidden if kind == "mean" else hidden[:3]).mean(0)
            np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    torch.testing.assert_close(
        model.similarity(contexts, candidates), torch.tensor(contexts) @ torch.tensor(candidates).T
    )


@pytest.mark.parametrize("options", KINDS)
def test_plain_sentence_transformers_gives_the_same_bits(checkpoints, tmp_path, options):
    model = make(checkpoints, **options)
    folder, out = tmp_path / "model", tmp_path / "vectors.npz"
    model.save_pretrained(str(folder))
    trust = options["reduction"] == "first_m_mean"
    texts = {"query": model.context_texts(CONTEXTS), "document": CANDIDATES}
    run_without_package(WITHOUT_PACKAGE, str(folder), str(trust), str(out), json.dumps(texts), cache=tmp_path)
    found = np.load(out)
    np.testing.assert_array_equal(found["query"], model.encode_query(CONTEXTS))
    np.testing.assert_array_equal(found["document"], model.encode_document(CANDIDATES))
    scores = model.similarity(model.encode_query(CONTEXTS), model.encode_document(CANDIDATES))
    np.testing.assert_array_equal(found["scores"], scores.numpy())


@pytest.mark.parametrize("options", KINDS)
def test_save_and_load(checkpoints, tmp_path, options):
    model = make(checkpoints, turn_separator=" | ", **options)
    model.save_pretrained(str(tmp_path))
    again = BiEncoder(str(tmp_path), device="cpu")
    assert again.share_encoders == options["share_encoders"]
    assert again.turn_separator == " | "
    np.testing.assert_array_equal(again.encode_query(CONTEXTS), model.encode_query(CONTEXTS))
    np.testing.assert_array_equal(again.encode_document(CANDIDATES), model.encode_document(CANDIDATES))
    with pytest.raises(ValueError, match="would need training anew"):
        BiEncoder(str(tmp_path), share_encoders=not options["share_encoders"], device="cpu")


def test_separate_encoders_cut_each_on_its_side(checkpoints):
    model = make(checkpoints, max_context_length=6, max_candidate_length=6)
    decode = model._transformers()[0].tokenizer.decode
    context = model.preprocess(["abcdefgh"], task="query")["input_ids"][0]
    candidate = model.preprocess(["abcdefgh"], task="document")["input_ids"][0]
    assert decode(context, skip_special_tokens=True).replace(" ", "") == "efgh"
    assert decode(candidate, skip_special_tokens=True).replace(" ", "") == "abcd"


def test_a_shared_encoder_has_a_limit_for_each_side(checkpoints):
    model = make(checkpoints, share_encoders=True, max_context_length=9, max_candidate_length=5)
    assert model.preprocess(["x" * 30], task="query")["input_ids"].shape == (1, 9)
    assert model.preprocess(["x" * 30], task="document")["input_ids"].shape == (1, 5)


def test_separate_encoders_start_equal_and_apart(checkpoints):
    model = make(checkpoints)
    context, candidate = model._transformers()
    for ours, theirs in zip(context.parameters(), candidate.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_a_sentence_transformer_keeps_its_pooling_but_not_its_norm(sentence_transformer_folder):
    model = BiEncoder(sentence_transformer_folder, device="cpu")
    unit = SentenceTransformer(sentence_transformer_folder, device="cpu").encode(CANDIDATES[:2])
    vectors = model.encode_document(CANDIDATES[:2])
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), unit, atol=1e-5)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    assert model.similarity_fn_name == "dot"


def test_rank_and_conversations(checkpoints):
    model = make(checkpoints)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    assert model.rank(messages, CANDIDATES) == model.rank(["a", "b c"], CANDIDATES)
    ranking = model.rank("hello", CANDIDATES, top_k=2, return_documents=True)
    scores = model.similarity(model.encode_query(["hello"]), model.encode_document(CANDIDATES))[0]
    assert [entry["corpus_id"] for entry in ranking] == scores.argsort(descending=True).tolist()[:2]
    assert model.rank("hello", []) == []


def test_nothing_to_encode_keeps_its_axes(checkpoints):
    assert make(checkpoints).encode_query([]).shape == (0, tiny.WIDTH)


def test_a_side_must_be_named(checkpoints, tmp_path):
    model = make(checkpoints)
    with pytest.raises(ValueError, match="encode_query"):
        model.encode(["x"])
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="route"):
        SentenceTransformer(str(tmp_path), device="cpu").encode(["x"])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"reduction": "max"}, "'first', 'mean'"), ({"m": 4}, "belongs to"), ({"max_context_length": 2}, "no room")],
)
def test_bad_options(checkpoints, options, said):
    with pytest.raises(ValueError, match=said):
        make(checkpoints, **options)


def test_nan_in_the_weights_is_an_error(checkpoints):
    model = make(checkpoints)
    with torch.no_grad():
        model._transformers()[0].model.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.encode_query(["x"])


def test_truncated_weights(checkpoints, tmp_path):
    make(checkpoints).save_pretrained(str(tmp_path))
    weights = tmp_path / "query_0_Transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="truncated or corrupted"):
        BiEncoder(str(tmp_path), device="cpu")


def test_a_failed_save_leaves_the_old_folder(checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = make(checkpoints)
    model.save_pretrained(str(folder))
    before = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(model._transformers()[1].model, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(str(folder))
    assert {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_m_of_zero_is_refused(checkpoints):
    with pytest.raises(ValueError, match="at least 1"):
        make(checkpoints, reduction="first_m_mean", m=0)


def test_a_prompt_stays_before_a_long_context(checkpoints):
    model = make(checkpoints, max_context_length=8)
    ids = model.preprocess(["abcdefghijklmnop"], prompt="Q:", task="query")["input_ids"][0]
    assert model._transformers()[0].tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "Q:mnop"
    with pytest.raises(ValueError, match="alone fills"):
        model.encode_query(["a"], prompt="far too long a prompt")


def test_a_router_of_another_s_is_arranged_as_well(sentence_transformer_folder, tmp_path):
    from copy import deepcopy

    from sentence_transformers.base.modules import Router

    side = list(SentenceTransformer(sentence_transformer_folder, device="cpu"))
    router = Router.for_query_document(side, deepcopy(side))
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path))
    model = BiEncoder(str(tmp_path), reduction="first", device="cpu")
    kinds = [type(module).__name__ for module in model[0].sub_modules["query"]]
    assert kinds == ["Transformer", "Pooling"]
    assert model[0].sub_modules["document"][1].pooling_mode == "cls"
    with pytest.raises(ValueError, match="share_encoders"):
        BiEncoder(str(tmp_path), share_encoders=True, device="cpu")


def test_nan_is_an_error_before_it_is_quantised(checkpoints):
    model = make(checkpoints)
    with torch.no_grad():
        model._transformers()[1].model.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.encode_document(["x", "y"], precision="binary")
