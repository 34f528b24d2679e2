"""Examples and ranking sets from local files."""

import csv
import json

import pytest
from datasets import Dataset

from poly_encoders.training.data_sources import load_examples, load_ranking_sets, sample_examples

ROWS = [{"context": f"question {i}", "right": f"answer {i}", "wrong": f"mistake {i}"} for i in range(12)]


@pytest.fixture(params=["jsonl", "csv", "tsv", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"data.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if request.param == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return str(path)


def test_files(file):
    data = load_examples(file)
    assert data.column_names == ["context", "right", "wrong"]
    assert data[3] == ROWS[3]
    assert load_examples(file, columns=["right", "context"]).column_names == ["right", "context"]


def test_lists_of_turns_and_messages_in_jsonl(tmp_path):
    path = tmp_path / "turns.jsonl"
    path.write_text('{"context": ["a", "b"], "right": "c"}\n{"context": ["d"], "right": "e"}\n')
    assert load_examples(str(path))[0]["context"] == ["a", "b"]


def test_ranking_sets(file):
    sets = load_ranking_sets(file, "train", size=6, seed=0)
    assert len(sets) == 12
    for row, ranked in zip(ROWS, sets, strict=True):
        assert ranked["context"] == row["context"]
        assert ranked["candidates"][:2] == [row["right"], row["wrong"]]
        assert len(set(ranked["candidates"])) == 6
    assert sets == load_ranking_sets(file, "train", size=6, seed=0)
    assert len(load_ranking_sets(file, "train", size=2, seed=0, limit=5)) == 5


def test_what_is_wrong_is_named(file, tmp_path):
    with pytest.raises(ValueError, match=r"no column \['reply'\]"):
        load_examples(file, columns=["context", "reply"])
    with pytest.raises(ValueError, match="needs a context and a candidate"):
        load_examples(file, columns=["context"])
    with pytest.raises(ValueError, match="Lower eval_set_size"):
        load_ranking_sets(file, "train", size=99, seed=0)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_examples(str(tmp_path / "nothing.jsonl"))


def test_samples_are_seeded(file):
    data = load_examples(file)
    assert sample_examples(data, 5, seed=1)[:] == sample_examples(data, 5, seed=1)[:]
    assert len(sample_examples(data, 5, seed=1)) == 5
    assert sample_examples(data, 99, seed=1) is data
