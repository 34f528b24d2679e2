"""CrossEncoder: segments, limits of their own, and checkpoints that upstream reads."""

import numpy as np
import pytest
import sentence_transformers
import torch
from transformers import AutoModelForSequenceClassification

import tiny
from poly_encoders import BiEncoder, CrossEncoder

CANDIDATES = ["yes", "no, not at all", "it is nine"]


@pytest.fixture
def model(checkpoints):
    torch.manual_seed(0)
    return CrossEncoder(checkpoints(), device="cpu", max_context_length=6, max_candidate_length=4)


def test_segments_and_limits(model):
    features = model.preprocess([("abcdefghij", "uvwxyz"), ("ab", "u")])
    tokens = [model.tokenizer.convert_ids_to_tokens(row) for row in features["input_ids"]]
    assert tokens[0] == ["<s>", *"efghij", "</s>", *"uvwx", "</s>"]
    assert tokens[1] == ["<s>", *"ab", "</s>", "u", "</s>", *["<pad>"] * 7]
    assert features["token_type_ids"].tolist() == [[0] * 8 + [1] * 5, [0] * 4 + [1] * 2 + [0] * 7]
    assert features["attention_mask"].sum(dim=1).tolist() == [13, 6]


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("t5", "qwen3")])
def test_families(checkpoints, family):
    model = CrossEncoder(checkpoints(family), device="cpu")
    pairs = [(["hello", "you"], text) for text in CANDIDATES]
    np.testing.assert_allclose(model.predict(pairs), [model.predict(pair) for pair in pairs], atol=1e-5)
    assert model.predict([["x" * 10_000, "y" * 10_000], ["c", "d"]]).shape == (2,)
    knows_segments = getattr(model.config, "type_vocab_size", 0) > 1
    assert ("token_type_ids" in model.preprocess([("a", "b")])) == knows_segments


def test_scores_are_raw(model):
    with torch.no_grad():
        for parameter in model[0].model.classifier.parameters():
            parameter.mul_(1000)
    assert np.abs(model.predict([("hello", text) for text in CANDIDATES])).max() > 1


def test_upstreams_names_of_the_two_sides(model):
    ranking = model.rank("hi", CANDIDATES, return_documents=True)
    assert model.rank(query="hi", documents=CANDIDATES, return_documents=True) == ranking
    assert model.rank("hi", documents=CANDIDATES, return_documents=True) == ranking
    squashed = model.rank("hi", CANDIDATES, activation_fn=torch.nn.Sigmoid())
    assert [entry["score"] for entry in squashed] == pytest.approx([1 / (1 + np.exp(-e["score"])) for e in ranking])
    for given in ({}, {"query": "hi"}, {"context": "hi", "query": "hi", "documents": CANDIDATES}):
        with pytest.raises(TypeError, match="one context and one list of candidates"):
            model.rank(**given)


def test_upstream_loads_it(model, tmp_path):
    """A tokenizer that does not name token_type_ids once lost them on the way to upstream's CrossEncoder."""
    with torch.no_grad():
        model[0].model.bert.embeddings.token_type_embeddings.weight[1].add_(5)
    model.save_pretrained(str(tmp_path))
    pairs = [("hello", text[:4]) for text in CANDIDATES]
    plain = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    np.testing.assert_allclose(plain.predict(pairs), model.predict(pairs), atol=1e-7)
    bare = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    features = model.preprocess(pairs)
    features.pop("modality")
    with torch.no_grad():
        np.testing.assert_allclose(bare(**features).logits[:, 0].numpy(), model.predict(pairs), atol=1e-6)


@pytest.mark.parametrize(
    "bad", [[("a", None)], [(None, "a")], [("a",)], ["ab"], [("a", "\ud800")], [("a", ["b", "c"])], None]
)
def test_bad_pairs(model, bad):
    with pytest.raises((TypeError, ValueError)):
        model.predict(bad)


def test_limits_must_fit(checkpoints, tmp_path):
    for limits in ({"max_context_length": 63}, {"max_candidate_length": 63}):
        with pytest.raises(ValueError, match="must each be at most 62"):
            CrossEncoder(checkpoints(), device="cpu", **limits)
    model = CrossEncoder(checkpoints(), device="cpu", max_context_length=62, max_candidate_length=40)
    tokens = model.tokenizer.convert_ids_to_tokens(model.preprocess([("a" * 90, "b" * 90)])["input_ids"][0])
    assert tokens == ["<s>", *"a" * 23, "</s>", *"b" * 40, "</s>"]  # the context gives way
    with pytest.raises(ValueError, match="num_labels=3"):
        CrossEncoder(checkpoints(), device="cpu", num_labels=3)
    CrossEncoder(checkpoints(), device="cpu").save_pretrained(str(tmp_path))  # limits that nobody asked for stay open
    assert CrossEncoder(str(tmp_path), device="cpu", max_candidate_length=40).length_limits() == (23, 40)


def test_long_texts_take_time_in_their_length(model):
    """Cut-off parts were once paired up with each other: 10,000 characters took half a minute, a million all memory."""
    assert model.predict([("a" * 200_000, "b" * 200_000)]).shape == (1,)


def test_a_checkpoint_with_two_encoders_is_refused(checkpoints, tmp_path):
    BiEncoder(checkpoints(), device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="an encoder for each side"):
        CrossEncoder(str(tmp_path), device="cpu")


def test_predict_reads_what_rank_reads(checkpoints):
    """The prompt of the contexts' side too, so that who is evaluated by `predict` is who ranks."""
    model = CrossEncoder(checkpoints("bert"), device="cpu", prompts={"query": "ask: ", "other": "well: "})
    pairs = [("hello", "yes"), ("hello", "no")]
    ranked = sorted(model.rank("hello", ["yes", "no"]), key=lambda row: row["corpus_id"])
    assert model.predict(pairs).tolist() == pytest.approx([row["score"] for row in ranked])
    assert model.predict(pairs, prompt="").tolist() != pytest.approx(model.predict(pairs).tolist())
    assert model.predict(pairs, "other").tolist() == pytest.approx(model.predict(pairs, prompt="well: ").tolist())
