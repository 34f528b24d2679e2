"""The three classes on generators, whose tokenizers come without a padding token and pad on the left."""

import numpy as np
import pytest
import sentence_transformers
import torch
from transformers import AutoModel, AutoModelForCausalLM

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.loading import load_model

CONTEXT = ["hi", "how are you?"]
CANDIDATES = ["yes", "no, not at all", "it is nine", "x"]


@pytest.fixture(params=[PolyEncoder, BiEncoder, CrossEncoder], ids=lambda model_class: model_class.__name__)
def model_class(request):
    return request.param


def in_order(ranking):
    """Scores in the order of the candidates."""
    return [entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])]


def folder_of_a_generator(family, path, auto_class=AutoModel, **tokenizer_options):
    """A generator's checkpoint, whose tokenizer pads on the left, if it can."""
    torch.manual_seed(3)
    tokenizer = tiny.make_tokenizer(left=True, **tokenizer_options)
    tokenizer.add_tokens(["yes", "no"])
    auto_class.from_config(tiny.family_config(family, vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_generator_pads_with_its_end_token(model_class, family, tmp_path):
    """A Bi-encoder could not encode a batch; a Cross-encoder took padding for the last word, whose score it gives."""
    folder = folder_of_a_generator(family, tmp_path / "generator", pad=False)
    model = model_class(folder, device="cpu")
    assert model.tokenizer.pad_token == model.tokenizer.eos_token == "</s>"
    together, texts = model.rank(CONTEXT, CANDIDATES), CANDIDATES
    assert in_order(together) == pytest.approx(in_order(model.rank(CONTEXT, CANDIDATES, batch_size=1)), abs=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    assert load_model(tmp_path / "saved", device="cpu").rank(CONTEXT, CANDIDATES) == together
    if model_class is CrossEncoder:
        plain = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu")
        pairs = [("hello " * (place % 2), text) for place, text in enumerate(texts)]
        np.testing.assert_array_equal(plain.predict(pairs), model.predict(pairs))
        assert model.predict(pairs) == pytest.approx([float(model.predict(pair)) for pair in pairs], abs=1e-5)
        return
    for encode in (model.encode_query, model.encode_document):
        np.testing.assert_allclose(encode(texts), [encode(text) for text in texts], atol=1e-5)
    if model_class is BiEncoder:
        plain = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        np.testing.assert_array_equal(plain.encode_document(texts), model.encode_document(texts))


def test_a_generator_without_an_end_token_is_refused_on_loading(model_class, tmp_path):
    folder = folder_of_a_generator("gpt2", tmp_path, pad=False, eos=False)
    with pytest.raises(ValueError, match="neither a padding token nor an end token"):
        model_class(folder, device="cpu")


def test_a_generator_that_scores_by_its_next_word(tmp_path):
    """sentence-transformers reads the score off the last position, so such a model's padding stays on the left."""
    folder = folder_of_a_generator("llama", tmp_path / "generator", AutoModelForCausalLM)
    model = CrossEncoder(folder, device="cpu")
    pairs = [("a", "b"), ("a longer context", "b"), ("a", "yes or no")]
    assert model.predict(pairs) == pytest.approx([float(model.predict(pair)) for pair in pairs], abs=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    plain = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(plain.predict(pairs), model.predict(pairs), atol=1e-6)
