"""load_model finds the class of a saved model by itself."""

import json

import pytest
from sentence_transformers import MultiVectorEncoder
from transformers import AutoModelForSequenceClassification

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.loading import load_model


@pytest.mark.parametrize("model_class", [PolyEncoder, BiEncoder, CrossEncoder])
def test_a_saved_model(model_class, checkpoints, tmp_path):
    model = model_class(checkpoints(), device="cpu", max_context_length=7)
    model.save_pretrained(str(tmp_path / "model"))
    again = load_model(str(tmp_path / "model"), device="cpu")
    assert type(again) is model_class
    scores = [
        {entry["corpus_id"]: entry["score"] for entry in each.rank("hello", ["a", "b"])} for each in (again, model)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-6)


def test_a_sentence_transformer_is_a_bi_encoder(sentence_transformer_folder):
    assert type(load_model(sentence_transformer_folder, device="cpu")) is BiEncoder


def test_what_transformers_saved(poly_encoder, checkpoints, tmp_path):
    poly_encoder[0].save(str(tmp_path / "poly"))
    assert not (tmp_path / "poly" / "config_sentence_transformers.json").exists()
    assert type(load_model(str(tmp_path / "poly"), device="cpu")) is PolyEncoder
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoints(), num_labels=1)
    classifier.save_pretrained(tmp_path / "cross")
    poly_encoder.tokenizer.save_pretrained(tmp_path / "cross")
    assert type(load_model(str(tmp_path / "cross"), device="cpu")) is CrossEncoder


def test_what_cannot_rank_is_named(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="bert encoder that was not trained to rank"):
        load_model(checkpoints())
    with pytest.raises(OSError, match="no saved model"):
        load_model(str(tmp_path))
    settings = {"model_type": MultiVectorEncoder.model_type}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="MultiVectorEncoder; expected one of PolyEncoder"):
        load_model(str(tmp_path))
