"""load_model finds the class of a saved model by itself, and leaves another's model as it is."""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoModelForSequenceClassification

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.loading import load_model

QUERIES = ["hello", "a text that is far too long for the little that is kept of it, " * 2, "x"]
DOCUMENTS = ["yes", "no, not at all", "another text that is far too long for what is kept", "yes"]
PROMPTS = {"query": "ask: ", "document": "say: ", "other": "well: "}
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


def test_what_transformers_saved(poly_encoder, tmp_path):
    poly_encoder[0].save(str(tmp_path))
    assert not (tmp_path / "config_sentence_transformers.json").exists()
    assert type(load_model(str(tmp_path), device="cpu")) is PolyEncoder


def test_what_cannot_rank_is_named(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="bert encoder that was not trained to rank"):
        load_model(checkpoints())
    with pytest.raises(OSError, match="no saved model"):
        load_model(str(tmp_path))
    settings = {"model_type": MultiVectorEncoder.model_type}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="MultiVectorEncoder; expected one of PolyEncoder"):
        load_model(str(tmp_path))
    (tmp_path / "config_sentence_transformers.json").unlink()
    (tmp_path / "model.opt").write_text("{}")
    with pytest.raises(ValueError, match="convert-parlai"):
        load_model(tmp_path)


class Shifted(Normalize):
    """A module of a stranger's own, which is told the task in every call, as its entry in modules.json says."""

    forward_kwargs = {"task"}  # noqa: RUF012

    def forward(self, features, task=None, **kwargs):
        features["sentence_embedding"] = features["sentence_embedding"] + {"query": 1.0, "document": 2.0}[task]
        return features


def strangers_model(checkpoint, kind, **options):
    """A SentenceTransformer that nothing of ours has seen."""
    encoder = Transformer(checkpoint)
    encoder.max_seq_length = 14 if kind == "cut" else 66
    side = [encoder, Pooling(tiny.WIDTH, "cls" if kind == "cls" else "mean", include_prompt=kind != "prompts")]
    if kind in ("normalised", "prompts", "truncated"):
        side.append(Normalize())
    if kind == "routed":
        other = [Transformer(checkpoint), Pooling(tiny.WIDTH, "cls")]
        side = [Router.for_query_document(side, other), Normalize()]
    return SentenceTransformer(modules=side, device="cpu", **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("normalised", {}),
        ("cls", {"similarity_fn_name": "dot"}),
        ("mean", {"similarity_fn_name": "euclidean"}),
        ("cut", {"prompts": PROMPTS}),
        ("prompts", {"prompts": PROMPTS}),
        ("default prompt", {"prompts": PROMPTS, "default_prompt_name": "other"}),
        ("truncated", {"truncate_dim": 8}),
        ("routed", {}),
    ],
)
def test_a_strangers_sentence_transformer_stays_what_it_is(kind, options, checkpoints, tmp_path, caplog):
    """Normalize and the cosine were dropped, so that evaluating any model of the Hub gave figures that were not its."""
    strangers_model(checkpoints(), kind, **options).save(str(tmp_path / "theirs"))
    plain = SentenceTransformer(str(tmp_path / "theirs"), device="cpu")

    def assert_gives_the_same(model):
        vectors = plain.encode_query(QUERIES), plain.encode_document(DOCUMENTS)
        np.testing.assert_array_equal(model.encode_query(QUERIES), vectors[0])
        np.testing.assert_array_equal(model.encode_document(DOCUMENTS), vectors[1])
        assert torch.equal(model.similarity(*vectors), plain.similarity(*vectors))
        assert (model.similarity_fn_name, model.truncate_dim) == (plain.similarity_fn_name, plain.truncate_dim)
        assert (model.prompts, model.max_seq_length) == (plain.prompts, plain.max_seq_length)

    model = load_model(tmp_path / "theirs", device="cpu")
    assert type(model) is BiEncoder
    assert_gives_the_same(model)
    expected = plain.similarity(plain.encode_query(QUERIES[1]), plain.encode_document(DOCUMENTS))[0]
    ranking = model.rank(QUERIES[1], DOCUMENTS, return_documents=True)
    assert {entry["corpus_id"]: entry["score"] for entry in ranking} == pytest.approx(
        dict(enumerate(expected.tolist())), abs=1e-5
    )
    assert model.rank(["a", "b"], DOCUMENTS) == model.rank("a\nb", DOCUMENTS)
    with pytest.raises(ValueError, match="encode_query"):
        model.encode(["x"])

    model.save_pretrained(str(tmp_path / "again"))
    assert "poly_encoders" not in json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert_gives_the_same(SentenceTransformer(str(tmp_path / "again"), device="cpu"))
    assert_gives_the_same(load_model(tmp_path / "again", device="cpu"))
    with caplog.at_level(logging.WARNING, "poly_encoders"):
        caplog.clear()
        built = BiEncoder(tmp_path / "theirs", device="cpu")
    assert caplog.text == ""  # nothing is dropped
    assert built.similarity_fn_name == plain.similarity_fn_name
    assert BiEncoder(tmp_path / "theirs", device="cpu", similarity_fn_name="dot").similarity_fn_name == "dot"


def test_a_strangers_model_without_settings_and_with_its_own_modules(checkpoints, tmp_path):
    """Models such as thenlper/gte-base have modules.json alone."""
    model = strangers_model(checkpoints(), "plain")
    model.append(Shifted())
    model.module_kwargs = {"2": ["task"]}
    model.save(str(tmp_path))
    (tmp_path / "config_sentence_transformers.json").unlink()
    plain = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    model = load_model(tmp_path, device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(model.encode_query(QUERIES), plain.encode_query(QUERIES))
    np.testing.assert_array_equal(model.encode_document(QUERIES), plain.encode_document(QUERIES))


def test_options_for_a_strangers_model(sentence_transformer_folder):
    model = load_model(sentence_transformer_folder, device="cpu", max_turns=2, turn_separator=" | ")
    assert model.context_texts([["a", "b", "c"]]) == ["b | c"]
    with pytest.raises(ValueError, match=r"loaded as it is, so there is no max_context_length.*BiEncoder\(path"):
        load_model(sentence_transformer_folder, device="cpu", max_context_length=5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_fn": torch.nn.Tanh(), "max_length": 20},
        {"prompts": {"query": "ask: "}},
        {"prompts": PROMPTS, "default_prompt_name": "other"},
        {"keep_in_fp32_modules": ["0.model.classifier"]},
        None,
    ],
)
def test_a_strangers_cross_encoder_stays_what_it_is(options, checkpoints, tmp_path, caplog):
    """`None` is a sequence classifier that transformers saved."""
    torch.manual_seed(2)
    if options is None:
        classifier = AutoModelForSequenceClassification.from_pretrained(checkpoints(), num_labels=1)
        classifier.save_pretrained(tmp_path / "theirs")
        tiny.make_tokenizer().save_pretrained(tmp_path / "theirs")
    else:
        theirs = sentence_transformers.CrossEncoder(checkpoints(), device="cpu", num_labels=1, **options)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    plain = sentence_transformers.CrossEncoder(str(tmp_path / "theirs"), device="cpu")

    def assert_gives_the_same(model):
        np.testing.assert_array_equal(model.predict(PAIRS), plain.predict(PAIRS))
        assert type(model.activation_fn) is type(plain.activation_fn)
        assert (model.max_seq_length, model.prompts) == (plain.max_seq_length, plain.prompts)
        assert model.keep_in_fp32_modules == plain.keep_in_fp32_modules

    model = load_model(tmp_path / "theirs", device="cpu")
    assert type(model) is CrossEncoder
    assert_gives_the_same(model)
    expected = {entry["corpus_id"]: entry["score"] for entry in plain.rank(QUERIES[0], DOCUMENTS)}
    ranking = model.rank(query=QUERIES[0], documents=DOCUMENTS)
    assert {entry["corpus_id"]: entry["score"] for entry in ranking} == pytest.approx(expected, abs=1e-6)
    model.save_pretrained(str(tmp_path / "again"))
    assert "poly_encoders" not in json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert_gives_the_same(sentence_transformers.CrossEncoder(str(tmp_path / "again"), device="cpu"))
    assert_gives_the_same(load_model(tmp_path / "again", device="cpu"))
    with caplog.at_level(logging.WARNING, "poly_encoders"):
        CrossEncoder(tmp_path / "theirs", device="cpu")
    assert "This is a new Cross-encoder" in caplog.text


@pytest.mark.parametrize("kind", ["mean", "cross"])
def test_threads_share_a_strangers_model(kind, checkpoints, tmp_path):
    """Upstream tells the one tokenizer how to cut, for each side anew, which threads did to one another."""
    if kind == "cross":
        sentence_transformers.CrossEncoder(checkpoints(), device="cpu", num_labels=1).save_pretrained(str(tmp_path))
    else:
        theirs = strangers_model(checkpoints(), kind)
        theirs[0].query_length, theirs[0].document_length = 13, 7
        theirs.save(str(tmp_path))
    model = load_model(tmp_path, device="cpu")
    contexts = ["x" * (7 * number % 23 + 1) for number in range(24)]
    expected = [model.rank(context, DOCUMENTS) for context in contexts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda context: model.rank(context, DOCUMENTS), contexts * 4))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected * 4


def test_a_classifier_of_several_classes_cannot_rank(checkpoints, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoints(), num_labels=3)
    classifier.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 3 values for a pair"):
        load_model(tmp_path, device="cpu")
