"""CandidateRankingEvaluator against counting by hand."""

import csv

import numpy as np
import pytest
import sentence_transformers
import torch

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder

SAMPLES = [
    {"context": "hello", "candidates": ["yes", "no", "maybe", "x"], "label": 2},
    {"context": ["a", "b"], "candidates": ["one", "two"]},
    {"context": [{"role": "user", "content": "what time is it"}], "candidates": ["nine", "yes", "ten"], "label": 1},
    {"context": "alone", "candidates": ["only"]},
]


def rank_by_hand(model, context, candidates, label=0):
    return 1 + [entry["corpus_id"] for entry in model.rank(context, candidates)].index(label)


@pytest.fixture(params=["poly", "bi", "cross"])
def model(request, poly_encoder, checkpoints):
    if request.param == "poly":
        return poly_encoder
    return (BiEncoder if request.param == "bi" else CrossEncoder)(checkpoints(), device="cpu")


@pytest.mark.parametrize("batch_size", [1, 64])
def test_metrics(model, tmp_path, batch_size):
    evaluator = CandidateRankingEvaluator(
        SAMPLES, name="dev", at_k=[2, 1], batch_size=batch_size, show_progress_bar=False
    )
    found = evaluator(model, output_path=str(tmp_path), epoch=1, steps=7)
    ranks = np.array([rank_by_hand(model, **sample) for sample in SAMPLES])
    shares = {"dev_recall@1": (ranks <= 1).mean(), "dev_recall@2": (ranks <= 2).mean()}
    assert found == pytest.approx({**shares, "dev_mrr": (1 / ranks).mean()})
    assert evaluator.primary_metric == "dev_recall@1"
    evaluator(model, output_path=str(tmp_path), epoch=2, steps=9)
    rows = list(csv.DictReader((tmp_path / "candidate_ranking_dev.csv").open()))
    assert [row["steps"] for row in rows] == ["7", "9"]
    assert float(rows[0]["mrr"]) == pytest.approx(found["dev_mrr"])


class Constant:
    """A model that gives every pair the same score."""

    def __init__(self, value):
        self.value = value

    def predict(self, pairs, **options):
        return torch.full((len(pairs),), self.value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_cannot_tell_gains_nothing(value):
    evaluator = CandidateRankingEvaluator(SAMPLES, show_progress_bar=False)
    assert evaluator.ranks(Constant(value)).tolist() == [4, 2, 3, 1]


def test_upstream_s_models_are_ranked_as_they_are(sentence_transformer_folder, checkpoints):
    """They have no way of their own to join turns, and may normalise, score by cosine, and cut as they like."""
    evaluator = CandidateRankingEvaluator(SAMPLES, show_progress_bar=False)
    bi = sentence_transformers.SentenceTransformer(sentence_transformer_folder, device="cpu")
    cross = sentence_transformers.CrossEncoder(checkpoints(), device="cpu", num_labels=1)
    texts = ["hello", "a\nb", "what time is it", "alone"]
    for model in (bi, cross):
        ranks = []
        for text, sample in zip(texts, SAMPLES, strict=True):
            pairs = [(text, candidate) for candidate in sample["candidates"]]
            scores = cross.predict(pairs)
            if model is bi:
                scores = bi.similarity(bi.encode_query([text]), bi.encode_document(sample["candidates"]))[0].numpy()
            ranks.append(1 + int((scores > scores[sample.get("label", 0)]).sum()))
        assert evaluator.ranks(model).tolist() == ranks


@pytest.mark.parametrize(
    ("samples", "error", "said"),
    [
        ([{"context": "a", "candidates": ["b", "c"], "label": "0"}], TypeError, "Sample 0 has the label '0'"),
        ([{"context": "a", "candidates": ["b", "c"], "label": 0.0}], TypeError, "Sample 0 has the label 0.0"),
        ([{"context": "a", "candidates": ["b", "c"], "label": True}], TypeError, "Sample 0 has the label True"),
        ([{"context": "a", "candidates": ["b", "c"], "label": None}], TypeError, "Sample 0 has the label None"),
        ([], ValueError, "no samples"),
        ([{"context": "a", "candidates": []}], ValueError, "0 candidates"),
        ([{"context": "a", "candidates": ["b"], "label": 1}], ValueError, "label is 1"),
        ([{"context": "a"}], ValueError, "candidates"),
        ([SAMPLES[0], {"context": None, "candidates": ["a"]}], TypeError, "Sample 1"),
        ([{"context": "a", "candidates": ["b", 3]}], TypeError, "Sample 0"),
    ],
)
def test_bad_samples_are_named(samples, error, said):
    with pytest.raises(error, match=said):
        CandidateRankingEvaluator(samples)
    with pytest.raises(ValueError, match="at_k"):
        CandidateRankingEvaluator(SAMPLES, at_k=[0])


def test_the_positive_is_no_rival_of_itself(model):
    """A set may hold the positive's text twice: it is the positive each time."""
    once = [{"context": "hello", "candidates": ["yes", "no"], "label": 0}]
    twice = [{"context": "hello", "candidates": ["yes", "no", "yes"], "label": label} for label in (0, 2)]
    expected = CandidateRankingEvaluator(once, show_progress_bar=False).ranks(model).tolist()
    assert CandidateRankingEvaluator(twice, show_progress_bar=False).ranks(model).tolist() == expected * 2


def test_contexts_are_read_as_the_model_reads_them(model):
    """With max_turns, the turns before the last ones are nothing to the evaluator either."""
    turns = ["what", "time", "is", "it"]
    candidates = ["nine", "ten", "eleven", "no"]
    if isinstance(model, PolyEncoder):
        model[0].config.max_turns = 2
    else:
        model._text.max_turns = 2
    evaluator = CandidateRankingEvaluator([{"context": turns, "candidates": candidates}], show_progress_bar=False)
    assert evaluator.ranks(model).tolist() == [rank_by_hand(model, turns[-2:], candidates)]


def test_what_a_card_says():
    evaluator = CandidateRankingEvaluator(SAMPLES, at_k=(5, 1, 2))
    assert evaluator.metric_labels == {"recall@1": "R@1", "recall@2": "R@2", "mrr": "MRR"}
    assert "4 contexts, each with 1 to 4 candidates" in evaluator.about
    evaluator = CandidateRankingEvaluator(SAMPLES[:1], at_k=(1,))
    assert evaluator.metric_labels == {"recall@1": "R@1/4", "mrr": "MRR"}
    assert "1 contexts, each with 4 candidates" in evaluator.about
    assert evaluator.get_config_dict() == {"sets": 1, "at_k": [1]}
