"""Converted models where this package is not installed: the same vectors and scores from plain libraries."""

import json
import random

import numpy as np
import pytest

from parlai_original import Original, sample_text, write_checkpoint
from poly_encoders.parlai import convert_parlai_checkpoint
from without_package import run_without_package

POLY = """
import json, numpy, torch
from transformers import AutoModel, AutoTokenizer
path, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
def features(texts):
    return tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    context, candidates = features(texts["query"]), features(texts["document"])
    names = {f"candidate_{name}": value for name, value in candidates.items()}
    scores = model(**context, **names).scores
numpy.save(out, scores.numpy())
"""
BI = """
import json, numpy
from sentence_transformers import SentenceTransformer
path, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = SentenceTransformer(path, device="cpu")
scores = model.similarity(model.encode_query(texts["query"]), model.encode_document(texts["document"]))
numpy.save(out, scores.numpy())
"""
CROSS = """
import json, numpy
from sentence_transformers import CrossEncoder
path, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = CrossEncoder(path, device="cpu")
pairs = [(query, document) for query in texts["query"] for document in texts["document"]]
numpy.save(out, model.predict(pairs).reshape(len(texts["query"]), -1))
"""


@pytest.mark.parametrize(("kind", "code"), [("poly", POLY), ("bi", BI), ("cross", CROSS)])
def test_scores(kind, code, tmp_path):
    """Texts short enough for all of them: cutting long ones on the right is `ParlAITokenizer`'s alone."""
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", kind), tmp_path / "converted")
    rng = random.Random(0)
    texts = {
        "query": [sample_text(rng, 5) for _ in range(3)] + ["a_b to __start__"],
        "document": [sample_text(rng, 2) for _ in range(3)] + ["_ t"],
    }
    original = Original(tmp_path / "parlai")
    assert max(len(original.candidate_ids(text)) for text in texts["document"]) < 16
    run_without_package(
        code, str(tmp_path / "converted"), str(tmp_path / "scores.npy"), json.dumps(texts), cache=tmp_path
    )
    expected = [[original.score([query], document) for document in texts["document"]] for query in texts["query"]]
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, rtol=1e-5, atol=1e-5)
