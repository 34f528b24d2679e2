"""Checkpoints of every kind that can be converted rank as the original's plain restatement says."""

import random

import numpy as np
import pytest
import torch

from parlai_original import Original, sample_text, write_checkpoint
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.loading import load_model
from poly_encoders.parlai import convert_parlai_checkpoint

CLASSES = {"poly": PolyEncoder, "bi": BiEncoder, "cross": CrossEncoder}

SIZES = {"embedding_size": 24, "ffn_size": 40, "n_layers": 3, "n_heads": 3, "n_positions": 50}
# So that a number of turns, not of tokens, decides what is read of the longest conversation.
LONG = {"text_truncate": -1, "n_positions": 2000}
VARIANTS = {
    "one code, relu": ("poly", {"poly_n_codes": 1, "activation": "relu"}),
    "first-m vectors, unread code attention": (
        "poly",
        {"polyencoder_type": "n_first", "poly_n_codes": 3, "codes_attention_type": "multihead"},
    ),
    "first-m vectors, more than tokens": (
        "poly",
        {"polyencoder_type": "n_first", "poly_n_codes": 100, "output_scaling": 1.0, "dict_lower": False},
    ),
    "sqrt code attention": ("poly", {"codes_attention_type": "sqrt"}),
    "sqrt final attention, scaled embeddings": ("poly", {"poly_attention_type": "sqrt", "embeddings_scale": True}),
    "sqrt attention, first-m": (
        "poly",
        {"poly_attention_type": "sqrt", "polyencoder_type": "n_first", "poly_n_codes": 4},
    ),
    "first output of the candidate": ("poly", {"reduction_type": "first"}),
    "other sizes": ("poly", SIZES | {"poly_n_codes": 3}),
    "one layer, one head": ("poly", {"n_layers": 1, "n_heads": 1, "n_encoder_layers": None, "n_segments": 0}),
    "three turns": ("poly", LONG | {"history_size": 3}),
    "all turns and candidates": ("poly", LONG | {"history_size": -1, "label_truncate": -1}),
    "all turns, written as 0": ("poly", LONG | {"history_size": 0}),
    "short truncation": ("poly", {"text_truncate": 3, "label_truncate": 3}),
    "truncation by the common option": ("poly", {"text_truncate": None, "label_truncate": None, "truncate": 12}),
    "padding rows, a word as delimiter": ("poly", {"rows": 120, "fp16": True, "delimiter": "and"}),
    "bi, first output, scaled embeddings": ("bi", {"reduction_type": "first", "embeddings_scale": True}),
    "bi, shared word embeddings": ("bi", {"share_word_embeddings": True}),
    "bi, no segments": ("bi", SIZES | {"n_segments": 0}),
    "bi, four turns": ("bi", LONG | {"history_size": 4, "delimiter": " | "}),
    "cross, mean": ("cross", {"reduction_type": "mean", "model": "transformer/crossencoder:CrossencoderAgent"}),
    "cross, other sizes": ("cross", SIZES | {"text_truncate": 20, "label_truncate": 8}),
    "cross, short truncation": ("cross", {"text_truncate": 3, "label_truncate": 3}),
    "cross, two turns": ("cross", LONG | {"history_size": 2}),
}


def assert_ranks_as(model, original: Original) -> None:
    """For contexts of one turn and of many, short ones and long ones."""
    rng = random.Random(0)
    for sizes in [(1, 1), (1, 3), (2, 2), (7, 2), (24, 3)]:
        turns, candidates = ([sample_text(rng, 12) for _ in range(size)] for size in sizes)
        scores = {entry["corpus_id"]: entry["score"] for entry in model.rank(turns, candidates)}
        expected = [original.score(turns, candidate) for candidate in candidates]
        np.testing.assert_allclose([scores[i] for i in range(len(candidates))], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_converted_model_ranks_as_the_original(name, tmp_path):
    kind, options = VARIANTS[name]
    model_file = write_checkpoint(tmp_path / "parlai", kind, **options)
    converted = convert_parlai_checkpoint(model_file, tmp_path / "converted")
    assert type(converted) is CLASSES[kind]
    assert not converted.training
    assert_ranks_as(load_model(str(tmp_path / "converted"), device="cpu"), Original(tmp_path / "parlai"))


@pytest.mark.parametrize(("kind", "zipped"), [("poly", False), ("bi", True), ("cross", False)])
def test_half_precision_weights_in_either_file_format(kind, zipped, tmp_path):
    """The released models hold float16; the numbers are those of the same weights in float32."""
    model_file = write_checkpoint(tmp_path / "parlai", kind, dtype=torch.float16, fp16=True)
    saved = torch.load(model_file, weights_only=True)
    torch.save(saved, model_file, _use_new_zipfile_serialization=zipped)
    convert_parlai_checkpoint(model_file.parent, tmp_path / "converted")  # the folder will do for the file
    model = load_model(str(tmp_path / "converted"), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_ranks_as(model, Original(tmp_path / "parlai"))


def test_a_pre_trained_checkpoint_gets_new_codes_and_says_so(tmp_path, caplog):
    model_file = write_checkpoint(tmp_path / "parlai")
    saved = torch.load(model_file, weights_only=True)
    del saved["model"]["codes"]
    torch.save(saved, model_file)
    model = convert_parlai_checkpoint(model_file, tmp_path / "converted")
    assert "fine-tune" in caplog.text
    assert model[0].model.codes.shape == (8, 32)
    assert 0 < model[0].model.codes.std() < 1
    expected = Original(tmp_path / "parlai").hidden("encoder_cand", [1, 5, 1]).mean(dim=0)
    vectors = model[0].model.get_candidate_features(torch.tensor([[1, 5, 1]]))
    torch.testing.assert_close(vectors[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text_truncate", "label_truncate"), [(1024, 20), (-1, -1), (36, -1), (None, None), (1024, 1024), (-1, 16)]
)
def test_a_pair_that_fits_is_read_whole(text_truncate, label_truncate, tmp_path):
    """The limits of the two sides may together be more than there are positions: 64, here."""
    options = {"text_truncate": text_truncate, "label_truncate": label_truncate, "truncate": 1024}
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", "cross", **options), tmp_path / "converted")
    model, original = CrossEncoder(str(tmp_path / "converted"), device="cpu"), Original(tmp_path / "parlai")
    sizes = []
    for context, candidate in [(1, 1), (40, 2), (2, 40), (14, 20), (25, 9), (30, 12)]:
        text, answer = " ".join(["tea"] * context), " ".join(["sea"] * candidate)
        size = len(original.context_ids([text])) + len(original.candidate_ids(answer))
        if size <= 64:
            sizes.append(size)
            assert model.rank([text], [answer])[0]["score"] == pytest.approx(original.score([text], answer), abs=1e-5)
    assert len(sizes) >= 3
    assert max(sizes) > 44


def test_of_a_pair_that_does_not_fit_the_context_gives_way(tmp_path):
    """The original fails on it."""
    model_file = write_checkpoint(tmp_path / "parlai", "cross", text_truncate=1024, label_truncate=20)
    model = convert_parlai_checkpoint(model_file, tmp_path / "converted")
    assert model.length_limits() == (64 - 4 - 1, 19)
    original = Original(tmp_path / "parlai")
    features = model.preprocess([(["tea you . " * 60], "the sea . " * 60)])
    candidate = original.candidate_ids("the sea . " * 60)
    context = original.text_ids("tea you . " * 60)[-(64 - 2 - len(candidate)) :]
    # The frame leaves room for an end token that this candidate has lost.
    assert features["input_ids"][0].tolist() == [original.start, *context[1:], original.end, *candidate]
    assert features["token_type_ids"][0].tolist() == [0] * (len(context) + 1) + [1] * len(candidate)
    assert model.predict([(["tea " * 200], "no " * 200)], prompt="hello : ").shape == (1,)
    with pytest.raises(ValueError, match="alone fills"):
        model.predict([("hi", "no")], prompt="tea " * 60)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_trainable_weight_is_trained(kind, tmp_path):
    """A trainable weight without a gradient stops distributed training."""
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", kind), tmp_path / "converted")
    model = load_model(str(tmp_path / "converted"), device="cpu").train()
    if kind == "cross":
        scores = model(model.preprocess([("hi", "tea"), ("hi", "you")]))["scores"]
    else:
        sides = {"query": ["hi", "you"], "document": ["tea", "."]}
        vectors = {task: model.preprocess(texts, task=task) for task, texts in sides.items()}
        vectors = {task: model(features, task=task)["sentence_embedding"] for task, features in vectors.items()}
        scores = model.similarity(vectors["query"], vectors["document"])
    scores.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert sum(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None) > 30
