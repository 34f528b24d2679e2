"""Models saved before the modules got their present names and files: they load, and give the numbers that they gave."""

import json
from pathlib import Path

import numpy as np
import pytest

import poly_encoders
from poly_encoders.loading import load_model

OLD_MODELS = Path(__file__).parents[1] / "fixtures" / "old_models"
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def assert_gives(model, expected):
    for context, scores in zip(expected["contexts"], expected["scores"], strict=True):
        ranking = model.rank(context, expected["candidates"])
        found = [entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])]
        np.testing.assert_allclose(found, scores, **EXACT)
        order = sorted(range(len(scores)), key=lambda index: -found[index])
        assert [entry["corpus_id"] for entry in ranking] == order
    if "context_vectors" in expected:
        for encode, side in ((model.encode_query, "context"), (model.encode_document, "candidate")):
            np.testing.assert_allclose(encode(expected[f"{side}s"]), expected[f"{side}_vectors"], **EXACT)


@pytest.mark.parametrize("name", sorted(folder.name for folder in OLD_MODELS.iterdir()))
def test_an_old_model_gives_the_same_numbers(name, tmp_path):
    expected = json.loads((OLD_MODELS / name / "expected.json").read_text())
    model_class = getattr(poly_encoders, expected["class"])
    model = model_class(str(OLD_MODELS / name), device="cpu")
    assert_gives(model, expected)
    model.save_pretrained(str(tmp_path))
    for path in (OLD_MODELS / name, tmp_path):
        loaded = load_model(path, device="cpu")
        assert type(loaded) is model_class
        assert (loaded.turn_separator, loaded.max_turns) == (model.turn_separator, model.max_turns)
        assert loaded.length_limits() == model.length_limits()
        assert_gives(loaded, expected)
