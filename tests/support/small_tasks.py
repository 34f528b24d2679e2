"""Small public-benchmark tasks, made here and offline: of MTEB's two kinds that rank, and a stand-in for NanoBEIR."""

import json
from math import log2

from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

QUERIES = {"q0": "hello there", "q1": "good day\nwhat time is it", "q2": "zzz", "q3": "a plan for tonight?"}
CORPUS = dict(zip("abcdefgh", ["yes", "no", "it is nine", "x", "good day", "half past", "a film", "zz"], strict=True))
RELEVANT = {"q0": {"e"}, "q1": {"c", "f"}, "q2": {"h"}, "q3": {"g", "a"}}
TOP_RANKED = {"q0": ["a", "e", "b", "h"], "q1": ["c", "d", "f"], "q2": ["b", "a", "h", "g"], "q3": ["a", "c", "g"]}


def mteb_task(kind, queries=QUERIES):
    """A task of MTEB of this kind, `"Retrieval"` from all of the corpus or `"Reranking"` of what was found before."""

    class Small(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Small{kind}",
            description="Made for a test.",
            type=kind,
            dataset={"path": "made/here", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_3",
        )

    task = Small()
    split = {
        "corpus": Dataset.from_list([{"id": name, "text": text} for name, text in CORPUS.items()]),
        "queries": Dataset.from_list([{"id": name, "text": text} for name, text in queries.items()]),
        "relevant_docs": {name: dict.fromkeys(right, 1) for name, right in RELEVANT.items()},
        "top_ranked": TOP_RANKED if kind == "Reranking" else None,
    }
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return task


def write_nano_beir(folder):
    """A data set of NanoBEIR's form in this folder: one half of the queries in each of two of its parts."""
    names = sorted(QUERIES)
    configs: dict[str, list] = {}
    for split, own in (("NanoMSMARCO", names[:2]), ("NanoNQ", names[2:])):
        subsets = {
            "corpus": [{"_id": name, "text": text} for name, text in CORPUS.items()],
            "queries": [{"_id": name, "text": QUERIES[name]} for name in own],
            "qrels": [{"query-id": name, "corpus-id": right} for name in own for right in sorted(RELEVANT[name])],
            "bm25": [{"query-id": name, "corpus-ids": TOP_RANKED[name]} for name in own],
        }
        for subset, rows in subsets.items():
            file = f"{subset}-{split}.jsonl"
            folder.joinpath(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
            configs.setdefault(subset, []).append({"split": split, "path": file})
    card = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    folder.joinpath("README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


def figures(order, right, k):
    """nDCG, MRR and MAP of one ranking, from their definitions, over its first k."""
    hits = [place for place, name in enumerate(order[:k], start=1) if name in right]
    best = sum(1 / log2(place + 1) for place in range(1, min(k, len(right)) + 1))
    return {
        "ndcg": sum(1 / log2(place + 1) for place in hits) / best,
        "mrr": 1 / hits[0] if hits else 0.0,
        "map": sum(number / place for number, place in enumerate(hits, start=1)) / len(right),
    }
