"""MTEB and NanoBEIR run on the models themselves, and measure what `rank` gives."""

import json

import datasets
import mteb
import numpy as np
import pytest
from sentence_transformers.cross_encoder.evaluation import CrossEncoderNanoBEIREvaluator
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from small_tasks import CORPUS, QUERIES, RELEVANT, TOP_RANKED, figures, mteb_task, write_nano_beir

PROMPTS = {"query": "ask: ", "passage": "say: "}
pytestmark = [
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning:mteb" for kind in ("Deprecation", "Future", "User"))),
    pytest.mark.filterwarnings("ignore:Conversations are a list of strings"),
]
MODELS = ["turns", "codes", "turns with prompts", "bi", "bi with prompts", "cross"]


@pytest.fixture
def model(request, poly_encoder, codes_encoder, checkpoints):
    kind, _, has_prompts = request.param.partition(" with ")
    prompts = PROMPTS if has_prompts else None
    if kind in ("bi", "cross"):
        return (BiEncoder if kind == "bi" else CrossEncoder)(checkpoints(), device="cpu", prompts=prompts)
    if has_prompts:
        return PolyEncoder(checkpoints(), num_codes=4, device="cpu", prompts=prompts)
    return poly_encoder if kind == "turns" else codes_encoder


def ranked(model, query, names):
    """Documents with their scores, best first."""
    return {names[found["corpus_id"]]: found["score"] for found in model.rank(query, [CORPUS[name] for name in names])}


def means(orders, k):
    """Figures by hand, meaned over the queries."""
    each = [figures([*order], RELEVANT[name], k) for name, order in orders.items()]
    return {metric: np.mean([own[metric] for own in each]) for metric in each[0]}


def mteb_run(model, task, folder):
    """What MTEB measured, and the scores that it kept."""
    results = mteb.evaluate(model, [task], cache=None, prediction_folder=folder, show_progress_bar=False)
    kept = json.loads((folder / f"{task.metadata.name}_predictions.json").read_text())
    return results.task_results[0].scores["test"][0], kept["default"]["test"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [(name, kind) for name in MODELS for kind in ("Retrieval", "Reranking") if (name, kind) != ("cross", "Retrieval")],
    indirect=["model"],
)
def test_mteb(model, kind, tmp_path):
    found, scores = mteb_run(model, mteb_task(kind), tmp_path)
    names = {query: TOP_RANKED[query] if kind == "Reranking" else [*CORPUS] for query in QUERIES}
    expected = {query: ranked(model, text, names[query]) for query, text in QUERIES.items()}
    assert scores.keys() == expected.keys()
    for query, own in expected.items():
        assert scores[query] == pytest.approx(own, rel=1e-4, abs=1e-6)
    for metric, value in means(expected, 3).items():
        assert found[f"{metric}_at_3"] == pytest.approx(value, abs=1e-5)
    assert 0 < found["main_score"] < 1
    assert found["main_score"] == found["ndcg_at_3"]


@pytest.mark.parametrize("model", ["turns", "bi", "cross"], indirect=True)
def test_mteb_hands_over_a_conversation_as_one_text(model, tmp_path):
    """Its own: a model that has a vector for each turn gets one."""
    turns = {query: ["hi", text] for query, text in QUERIES.items()}
    messages = {
        query: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        for query, text in QUERIES.items()
    }
    for queries, form in ((turns, "hi; {}"), (messages, "user: hi; assistant: {}")):
        _, scores = mteb_run(model, mteb_task("Reranking", queries), tmp_path)
        for query, text in QUERIES.items():
            expected = ranked(model, form.format(text), TOP_RANKED[query])
            assert scores[query] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_mteb_cannot_measure_says_why(poly_encoder, checkpoints):
    """A task that names no side of its texts, and a Cross-encoder that would have to read the whole corpus."""
    with pytest.raises(ValueError, match="requires top_ranked"):
        mteb.evaluate(CrossEncoder(checkpoints(), device="cpu"), [mteb_task("Retrieval")], cache=None)
    task = mteb.get_task("STS12")
    rows = [{"sentence1": text, "sentence2": text, "score": 1.0} for text in CORPUS.values()]
    task.dataset, task.data_loaded = datasets.DatasetDict(test=datasets.Dataset.from_list(rows)), True
    with pytest.raises(ValueError, match="Contexts and candidates are read differently"):
        mteb.evaluate(poly_encoder, [task], cache=None, show_progress_bar=False)


@pytest.fixture
def nano_beir(tmp_path, monkeypatch):
    """A data set's folder, and the name of each of its parts with its queries."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(write_nano_beir(tmp_path)), {"NanoMSMARCO": ["q0", "q1"], "NanoNQ": ["q2", "q3"]}


@pytest.mark.parametrize(
    ("model", "score"), [("turns", "custom"), ("codes", "custom"), ("bi", "dot")], indirect=["model"]
)
def test_nano_beir(model, score, nano_beir):
    folder, parts = nano_beir
    at_3 = {"ndcg_at_k": [3], "mrr_at_k": [3], "map_at_k": [3], "accuracy_at_k": [3], "precision_recall_at_k": [3]}
    evaluator = NanoBEIREvaluator(["msmarco", "nq"], dataset_id=folder, write_csv=False, **at_3)
    found = evaluator(model)
    expected = {}
    for part, queries in parts.items():
        orders = {query: ranked(model, QUERIES[query], [*CORPUS]) for query in queries}
        expected |= {f"{part}_{score}_{metric}@3": value for metric, value in means(orders, 3).items()}
    for metric in ("ndcg", "mrr", "map"):
        each = [expected[f"{part}_{score}_{metric}@3"] for part in parts]
        expected[f"NanoBEIR_mean_{score}_{metric}@3"] = np.mean(each)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert evaluator.primary_metric == f"NanoBEIR_mean_{score}_ndcg@3"
    assert 0 < found[evaluator.primary_metric] < 1


@pytest.mark.parametrize("model", ["cross"], indirect=True)
def test_nano_beir_of_a_cross_encoder(model, nano_beir):
    """It reads the first of what BM25 found, and whatever is relevant."""
    folder, parts = nano_beir
    evaluator = CrossEncoderNanoBEIREvaluator(["msmarco", "nq"], dataset_id=folder, rerank_k=3, at_k=3, write_csv=False)
    found = evaluator(model)
    expected = {}
    for part, queries in parts.items():
        read = {query: sorted({*RELEVANT[query], *TOP_RANKED[query][:3]}) for query in queries}
        orders = {query: ranked(model, QUERIES[query], read[query]) for query in queries}
        expected |= {f"{part}_R3_{metric}@3": means(orders, 3)[metric] for metric in ("ndcg", "mrr")}
        expected[f"{part}_R3_map"] = means(orders, 99)["map"]
    for metric in ("ndcg@3", "mrr@3", "map"):
        expected[f"NanoBEIR_R3_mean_{metric}"] = np.mean([expected[f"{part}_R3_{metric}"] for part in parts])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0 < found[evaluator.primary_metric] < 1
