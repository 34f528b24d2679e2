"""The benchmarks run, at toy size: their figures are for people, but they must not rot."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import forks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _plots():
    pytest.importorskip("matplotlib")


def test_scoring_writes_its_table_and_its_plot(tmp_path):
    sizes = ["--n", "50", "2000", "--m", "2", "64", "--dim", "8", "--rounds", "1"]
    forks.run([str(BENCHMARKS / "scoring.py"), *sizes, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scoring.json").read_text())["rows"]
    assert {(row["n"], row["m"], row["dim"]) for row in rows} == {(n, m, 8) for n in (50, 2000) for m in (2, 64)}
    assert all(row["median_ms"] > 0 for row in rows)
    assert (tmp_path / "scoring.png").read_bytes().startswith(b"\x89PNG")


def test_scoring_of_real_texts(tmp_path, sentence_transformer_folder):
    options = ["--texts", "--model", str(sentence_transformer_folder), "--n", "50", "300", "--encoded", "40"]
    forks.run([str(BENCHMARKS / "scoring.py"), *options, "--rounds", "1", "--no_bfloat16", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scoring-texts.json").read_text())["rows"]
    assert {(row["vectors"], row["n"]) for row in rows} == {(kind, n) for kind in ("turns", "codes") for n in (50, 300)}


def test_index_writes_its_table_and_its_plot(tmp_path, sentence_transformer_folder):
    pytest.importorskip("lance")
    options = ["--model", str(sentence_transformer_folder), "--n", "60", "300", "--encoded", "40", "--rounds", "1"]
    options += ["--built", "30", "--kept", str(tmp_path / "vectors.npy")]
    forks.run([str(BENCHMARKS / "index.py"), *options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "index.json").read_text())
    assert [build["n"] for build in found["builds"]] == [60, 300]
    assert found["from_texts"]["build_over_encoder"] > 0
    assert {(row["vectors"], row["n"]) for row in found["rows"]} == {
        (kind, n) for kind in ("turns", "codes") for n in (60, 300)
    }
    assert (tmp_path / "index.png").read_bytes().startswith(b"\x89PNG")


def test_encoding_is_as_sentence_transformers_and_has_less_padding(tmp_path, sentence_transformer_folder):
    options = ["--model", str(sentence_transformer_folder), "--texts", "70", "--rounds", "2"]
    forks.run([str(BENCHMARKS / "encoding.py"), *options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "encoding.json").read_text())
    assert found["largest_difference"] < 1e-5
    assert 1 <= found["padding_by_tokens"] <= found["padding_by_characters"]
    assert found["times_as_fast"] > 0


STARTS = {"bi-mean-dot", "bi-last-turn-dot", "poly-turns", "late-interaction"}  # what is not random
ROWS = {*STARTS, "poly-codes-16", "poly-turns-codes", "cross", "poly-turns-frozen"}


def run_quality(results: Path, *options: object) -> dict[str, Any]:
    """What a run of the benchmark adds up to, by set, "untrained" or "trained", and row."""
    forks.run([str(BENCHMARKS / "quality.py"), "--results", str(results), *map(str, options)])
    assert (results / "quality.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((results / "quality.json").read_text())["sets"]


def test_quality_trains_and_ranks_every_kind_of_row(tmp_path, sentence_transformer_folder):
    turns = ["hi", "hello there", "any plans?", "no."]
    examples = [{"context": turns[: 1 + row % 4], "response": f"number {row}"} for row in range(8)]
    tests = [{"context": row["context"], "candidates": [row["response"], "x", "why?"], "label": 0} for row in examples]
    sets = {"one": [{**row, "negative_1": "never"} for row in examples], "two": examples}
    for name, rows in sets.items():
        (tmp_path / name).mkdir()
        for kind, lines in (("train", rows), ("test", tests)):
            text = "\n".join(map(json.dumps, lines)).encode()
            (tmp_path / name / f"{kind}.jsonl").write_bytes(text)
            (tmp_path / name / f"{kind}.jsonl.gz").write_bytes(gzip.compress(text))
    one = ["--train", tmp_path / "one" / "train.jsonl.gz", "--test", tmp_path / "one" / "test.jsonl.gz"]
    two = ["--train", tmp_path / "two" / "train.jsonl", "--test", tmp_path / "two" / "test.jsonl"]
    options = ["--rows", *ROWS, "--backbone", sentence_transformer_folder, "--layers", "0", "--batch", "4"]
    options += ["--context_length", "24", "--limit", "5", "--pair_limit", "2", "--work", tmp_path / "work"]
    results = tmp_path / "results"
    found = run_quality(results, *one, *two, *options, "--steps", "0")
    assert {name: kinds["untrained"].keys() for name, kinds in found.items()} == {"one": STARTS, "two": STARTS}
    there = json.loads((results / "quality" / "one.poly-turns.untrained.json").read_text())
    there |= {"row": "poly-codes-16", "seed": 0, "steps": 1, "seconds": 1.0, "examples": 4, "ranks": [1, 1, 2, 2, 2]}
    there["settings"]["steps"] = 1
    (results / "quality" / "one.poly-codes-16.0.json").write_text(json.dumps(there))  # is not run again
    trained = run_quality(results, *one, *options, "--steps", "1")["one"]["trained"]
    assert trained.keys() == ROWS
    assert trained["poly-codes-16"]["recall@1"] == 40
    for row, figures in trained.items():
        assert figures["contexts"] == (2 if row in ("cross", "late-interaction") else 5)
        assert figures["examples"] == (2 if row == "cross" else 4)
        assert figures["step_seconds"] > 0
    with pytest.raises(AssertionError, match="Name other --results"):
        run_quality(results, *one, *options, "--steps", "2")


def test_quality_makes_its_tables_from_runs(tmp_path):
    """Paired: of 100 contexts the Poly-encoder is right where the best Bi-encoder is, and in ten more."""
    (tmp_path / "quality").mkdir()
    shared = {"set": "a", "settings": {}, "machine": {}, "seconds": 6.0, "steps": 2, "examples": 64}
    runs = [("bi-mean-cosine", seed, right) for seed, right in ((0, 42), (1, 30))]  # the best with one seed alone
    runs += [
        ("bi-last-turn-cosine", 0, 40),
        ("bi-last-turn-cosine", 1, 40),
        ("poly-turns", 0, 50),
        ("poly-turns", 1, 50),
    ]
    runs += [("bi-mean-cosine", "untrained", 20), ("bi-last-turn-cosine", "untrained", 10), ("late-interaction", 0, 40)]
    runs += [("bi-mean-cosine-frozen", 0, 60), ("poly-turns-frozen", 0, 60)]
    for row, seed, right in runs:
        found = {**shared, "row": row, "seed": seed, "ranks": [1] * right + [3] * (100 - right)}
        (tmp_path / "quality" / f"a.{row}.{seed}.json").write_text(json.dumps(found))
    found = run_quality(tmp_path, "--tables")["a"]
    lead = found["trained"]["poly-turns"]
    assert (lead["lead"], lead["over"], lead["seeds"]) == (pytest.approx(10.0), "bi-last-turn-cosine", 2)
    low, high = lead["interval"]
    assert 3.5 < low < 6 < 14 < high < 17  # 10 +- 1.96 standard errors of 3 points: the contexts are 100, not 200
    assert found["trained"]["late-interaction"]["interval"] == [0.0, 0.0]  # one seed against two
    assert found["untrained"]["bi-last-turn-cosine"]["over"] == "bi-mean-cosine"
    assert found["trained"]["poly-turns-frozen"]["over"] == "bi-mean-cosine-frozen"
    assert found["trained"]["bi-mean-cosine-frozen"]["over"] == "bi-mean-cosine-frozen"
    assert found["trained"]["poly-turns"]["mrr"] == pytest.approx(50 + 50 / 3)


def test_serving_writes_its_table_and_its_plot(tmp_path, sentence_transformer_folder):
    pytest.importorskip("uvicorn")
    options = ["--model", str(sentence_transformer_folder), "--candidates", "3", "5", "--clients", "1", "2"]
    forks.run([str(BENCHMARKS / "serving.py"), *options, "--seconds", "0.2", "--soak", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serving.json").read_text())
    assert len(found["rows"]) == 3 * 2 * 2 * 2
    assert all(row["statuses"].keys() == {"200"} for row in (*found["rows"], found["soak"]))
    assert found["soak"]["memory_mib"]
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
