"""Rows and contexts for an index, and the slow twin of searching it."""

import numpy as np
import pytest
import torch

from poly_encoders.modeling import poly_score

WORDS = ["hello", "there", "how", "are", "you", "fine", "weather", "nice", "today", "film", "music", "dinner", "work"]


def texts_of(n, seed=0):
    choose = np.random.default_rng(seed)
    return [f"{' '.join(choose.choice(WORDS, 4))} {number}" for number in range(n)]


def rows_of(n, seed=0):
    return [{"id": f"c{i}", "text": text, "year": 2000 + i % 7} for i, text in enumerate(texts_of(n, seed))]


CONTEXTS = [["hello there", "how are you"], ["what about dinner"], ["nice weather", "is it", "music today"]]


def expected(model, rows, k=5, dtype=torch.float16):
    """The slow, obvious twin: encode all, round as they are stored, score all, sort."""
    vectors = model.encode_document([row["text"] for row in rows], convert_to_tensor=True).to(dtype).double()
    scores = poly_score(model.encode_query(CONTEXTS, convert_to_tensor=True).double(), vectors, model.final_scale)
    best = scores.sort(descending=True, stable=True)
    return [
        [(rows[i]["id"], score) for i, score in zip(places[:k].tolist(), values[:k].tolist(), strict=True)]
        for places, values in zip(best.indices, best.values, strict=True)
    ]


def assert_found(answers, wanted, proven=True):
    for hits, pairs in zip(answers, wanted, strict=True):
        assert hits.proven == proven
        assert [hit["id"] for hit in hits] == [id_ for id_, _ in pairs]
        assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in pairs], abs=2e-6)
