"""CandidateRankingEvaluator against counting by hand."""

import csv

import numpy as np
import pytest

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder

SAMPLES = [
    {"context": "hello", "candidates": ["yes", "no", "maybe", "x"], "label": 2},
    {"context": ["a", "b"], "candidates": ["one", "two"]},
    {"context": [{"role": "user", "content": "what time is it"}], "candidates": ["nine", "yes", "ten"], "label": 1},
    {"context": "alone", "candidates": ["only"]},
]


def ranks_by_hand(model):
    ranks = []
    for sample in SAMPLES:
        order = [entry["corpus_id"] for entry in model.rank(sample["context"], sample["candidates"])]
        ranks.append(1 + order.index(sample.get("label", 0)))
    return np.array(ranks)


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
    ranks = ranks_by_hand(model)
    assert found == pytest.approx(
        {
            "dev_recall@1": (ranks <= 1).mean(),
            "dev_recall@2": (ranks <= 2).mean(),
            "dev_mrr": (1 / ranks).mean(),
        }
    )
    assert evaluator.primary_metric == "dev_recall@1"
    evaluator(model, output_path=str(tmp_path), epoch=2, steps=9)
    rows = list(csv.DictReader((tmp_path / "candidate_ranking_dev.csv").open()))
    assert [row["steps"] for row in rows] == ["7", "9"]
    assert float(rows[0]["mrr"]) == pytest.approx(found["dev_mrr"])


class Constant:
    """A model that gives every pair the same score."""

    def __init__(self, value):
        self.value = value
        self.model_card_data = self

    def set_evaluation_metrics(self, *args):
        pass

    def predict(self, pairs, **options):
        import torch

        return torch.full((len(pairs),), self.value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_cannot_tell_gains_nothing(value):
    evaluator = CandidateRankingEvaluator(SAMPLES, show_progress_bar=False, write_csv=False)
    assert evaluator.ranks(Constant(value)).tolist()[:3] == [4, 2, 3]


@pytest.mark.parametrize(
    ("samples", "error", "said"),
    [
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


def test_bad_k():
    with pytest.raises(ValueError, match="at_k"):
        CandidateRankingEvaluator(SAMPLES, at_k=[0])


@pytest.mark.parametrize("label", ["0", 0.0, True, None])
def test_a_label_is_a_position(label):
    with pytest.raises(TypeError, match="Sample 0 has the label"):
        CandidateRankingEvaluator([{"context": "a", "candidates": ["b", "c"], "label": label}])


def test_shared_candidates_are_as_if_each_set_listed_them(model):
    shared = ["yes", "eleven", "nobody knows"]
    spelt_out = [{**sample, "candidates": [*sample["candidates"], *shared]} for sample in SAMPLES]
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "show_progress_bar": False}
        found = CandidateRankingEvaluator(SAMPLES, shared_candidates=shared, **options).ranks(model)
        expected = CandidateRankingEvaluator(spelt_out, **options).ranks(model)
        np.testing.assert_array_equal(found, expected)


def test_the_right_candidate_is_no_rival_of_itself(model):
    """A set may hold the right text twice, and shared candidates may hold it too: it is the right one each time."""
    once = [{"context": "hello", "candidates": ["yes", "no"], "label": 0}]
    twice = [{"context": "hello", "candidates": ["yes", "no", "yes"], "label": 0}]
    options = {"show_progress_bar": False}
    expected = CandidateRankingEvaluator(once, **options).ranks(model)
    np.testing.assert_array_equal(CandidateRankingEvaluator(twice, **options).ranks(model), expected)
    found = CandidateRankingEvaluator(once, shared_candidates=["yes", "yes"], **options).ranks(model)
    np.testing.assert_array_equal(found, expected)


def test_contexts_are_read_as_the_model_reads_them(model):
    """With max_turns, the turns before the last ones are nothing to the evaluator either."""
    turns = ["what", "time", "is", "it"]
    candidates = ["nine", "ten", "eleven", "no"]
    if isinstance(model, (BiEncoder, CrossEncoder)):
        model._max_turns = 2
    else:
        model[0].config.max_turns = 2
    evaluator = CandidateRankingEvaluator([{"context": turns, "candidates": candidates}], show_progress_bar=False)
    order = [entry["corpus_id"] for entry in model.rank(turns[-2:], candidates)]
    assert evaluator.ranks(model).tolist() == [1 + order.index(0)]
