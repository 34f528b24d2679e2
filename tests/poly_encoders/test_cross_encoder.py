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


def test_families_without_segments_get_none(checkpoints):
    model = CrossEncoder(checkpoints("roberta"), device="cpu")
    assert "token_type_ids" not in model.preprocess([("a", "b")])
    assert len(model.rank("hello", CANDIDATES)) == 3


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("t5", "qwen3")])
def test_families(checkpoints, family):
    model = CrossEncoder(checkpoints(family), device="cpu")
    together = model.predict([("hello", text) for text in CANDIDATES])
    alone = [model.predict(("hello", text)) for text in CANDIDATES]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert model.predict([("x" * 10_000, "y" * 10_000)]).shape == (1,)


def test_scores_are_raw(model):
    with torch.no_grad():
        for parameter in model[0].model.classifier.parameters():
            parameter.mul_(1000)
    assert np.abs(model.predict([("hello", text) for text in CANDIDATES])).max() > 1


def test_a_pair_and_a_batch_of_pairs(model):
    single = model.predict((["hi", "you"], "yes"))
    assert single.shape == ()
    batch = model.predict([(["hi", "you"], "yes"), ("a", "b")])
    assert batch.shape == (2,)
    assert batch[0] == pytest.approx(float(single), abs=1e-5)
    assert model.predict([["a", "b"], ["c", "d"]]).shape == (2,)
    assert model.predict([]).shape == (0,)


def test_rank(model):
    ranking = model.rank(["hi", "you"], CANDIDATES, return_documents=True)
    scores = model.predict([("hi\nyou", text) for text in CANDIDATES])
    assert [entry["corpus_id"] for entry in ranking] == np.argsort(-scores, kind="stable").tolist()
    assert ranking[0]["text"] == CANDIDATES[ranking[0]["corpus_id"]]
    assert model.rank("hi", []) == []
    assert len(model.rank("hi", CANDIDATES, top_k=2)) == 2


def test_a_prompt_goes_before_the_context_and_stays(model):
    ids = model.preprocess([("abcdefghij", "u")], prompt="Q:")["input_ids"][0]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["<s>", *"Q:", *"ghij", "</s>", "u", "</s>"]
    with pytest.raises(ValueError, match="alone fills"):
        model.preprocess([("a", "b")], prompt="far too long")


def test_save_and_load(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), device="cpu")
    assert again.length_limits() == (6, 4)
    pairs = [("a longer context", text) for text in CANDIDATES]
    np.testing.assert_allclose(again.predict(pairs), model.predict(pairs), atol=1e-7)
    assert CrossEncoder(str(tmp_path), device="cpu", max_context_length=8).length_limits() == (8, 4)


def test_upstream_loads_it(model, tmp_path):
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
    ("bad", "error"),
    [
        ([("a", None)], TypeError),
        ([(None, "a")], TypeError),
        ([("a",)], ValueError),
        (["ab"], ValueError),
        ([("a", "\ud800")], ValueError),
        ([("a", ["b", "c"])], TypeError),
    ],
)
def test_bad_pairs(model, bad, error):
    with pytest.raises(error):
        model.predict(bad)


def test_limits_must_fit(checkpoints):
    with pytest.raises(ValueError, match="together at most 63"):
        CrossEncoder(checkpoints(), device="cpu", max_context_length=60, max_candidate_length=10)
    with pytest.raises(ValueError, match="num_labels=3"):
        CrossEncoder(checkpoints(), device="cpu", num_labels=3)


def test_nan_in_the_weights_is_an_error(model):
    with torch.no_grad():
        model[0].model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.rank("hi", CANDIDATES)


def test_truncated_weights(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="truncated or corrupted"):
        CrossEncoder(str(tmp_path), device="cpu")


def test_texts_of_a_million_characters_are_linear(model):
    """Cut-off parts were once paired up with each other: 10,000 characters took half a minute, a million all memory."""
    assert model.predict([("a" * 1_000_000, "b" * 1_000_000)]).shape == (1,)


def test_upstream_sees_the_segments_too(model, tmp_path):
    """A tokenizer that does not name token_type_ids once lost them on the way to upstream's CrossEncoder."""
    with torch.no_grad():
        model[0].model.bert.embeddings.token_type_embeddings.weight[1].add_(5)
    model.save_pretrained(str(tmp_path))
    plain = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    np.testing.assert_allclose(plain.predict([("ab", "cd")]), model.predict([("ab", "cd")]), atol=1e-6)


def test_limits_that_nobody_asked_for_are_not_saved(checkpoints, tmp_path):
    CrossEncoder(checkpoints(), device="cpu").save_pretrained(str(tmp_path))
    assert CrossEncoder(str(tmp_path), device="cpu", max_candidate_length=40).length_limits() == (23, 40)


def test_nan_is_an_error_in_predict(model):
    with torch.no_grad():
        model[0].model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.predict([("a", "b")])


def test_a_checkpoint_with_two_encoders_is_refused(checkpoints, tmp_path):
    BiEncoder(checkpoints(), device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="an encoder for each side"):
        CrossEncoder(str(tmp_path), device="cpu")
