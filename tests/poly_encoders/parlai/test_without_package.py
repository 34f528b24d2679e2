"""Converted models where this package is not installed: the same vectors and scores from plain libraries."""

import json
import random

import numpy as np
import pytest

from parlai_original import Original, sample_text, write_checkpoint
from poly_encoders.parlai import convert_parlai_checkpoint
from without_package import run_without_package

LIBRARIES = "import json, numpy, torch; path, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])"
CODE = {
    "poly": """
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, trust_remote_code=True)
sides = [tokenizer(texts[side], padding=True, return_tensors="pt") for side in ("query", "document")]
with torch.no_grad():
    scores = model(**sides[0], **{f"candidate_{name}": value for name, value in sides[1].items()}).scores
numpy.save(out, scores.numpy())
""",
    "bi": """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(path, device="cpu")
numpy.save(out, model.similarity(model.encode_query(texts["query"]), model.encode_document(texts["document"])).numpy())
""",
    "cross": """
from sentence_transformers import CrossEncoder
pairs = [(query, document) for query in texts["query"] for document in texts["document"]]
numpy.save(out, CrossEncoder(path, device="cpu").predict(pairs).reshape(len(texts["query"]), -1))
""",
}


@pytest.mark.parametrize("kind", CODE)
def test_scores(kind, tmp_path):
    """Texts short enough for all of them: cutting long ones on the right is `ParlAITokenizer`'s alone."""
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", kind), tmp_path / "converted")
    rng, original = random.Random(0), Original(tmp_path / "parlai")
    texts = {
        "query": [sample_text(rng, 5) for _ in range(3)] + ["a_b to __start__"],
        "document": [sample_text(rng, 2) for _ in range(3)] + ["_ t"],
    }
    assert max(len(original.candidate_ids(text)) for text in texts["document"]) < 16
    arguments = [str(tmp_path / "converted"), str(tmp_path / "scores.npy"), json.dumps(texts)]
    run_without_package(LIBRARIES + CODE[kind], *arguments, cache=tmp_path)
    expected = [[original.score([query], document) for document in texts["document"]] for query in texts["query"]]
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, rtol=1e-5, atol=1e-5)
