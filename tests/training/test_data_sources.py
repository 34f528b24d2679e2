"""Examples and ranking sets from local files."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict

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


GOOD = '{"context": ["a"], "right": "b"}\n'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (GOOD + "\n{broken\n", r"Line 3 of .*bad.jsonl is no JSON"),
        (GOOD + '["a", "b"]\n', r"Line 2 .*no JSON object"),
        (GOOD + '{"context": ["c"]}\n', r"Line 2 .*lacks the column 'right'.*has \['context'\]"),
        ('{"context": ["c"]}\n' + GOOD, r"Line 1 .*lacks the column 'right'"),
        (GOOD + '{"context": ["c"], "right": null}\n', r"Line 2 .*'right' that cannot be read.*NoneType"),
        (GOOD + '{"context": ["c"], "right": " "}\n', r"Line 2 .*empty column 'right'"),
        (GOOD + '{"context": [], "right": "d"}\n', r"Line 2 .*'context'.*without a single turn"),
        (GOOD + '{"context": ["x", null], "right": "d"}\n', r"Line 2 .*'context'.*Turn 1"),
        (GOOD + '{"context": ["c"], "right": 3}\n', r"Line 2 .*'right'.*int: 3"),
        (GOOD + '{"context": 5, "right": "d"}\n', r"Line 2 .*'context'.*int: 5"),
        ('{"context": 5, "right": "d"}\n', r"Line 1 .*'context'.*int: 5"),
        ('{"context": "a", "right": ["d"]}\n', r"Line 1 .*'right'.*list"),
        ("", "has no rows.*--eval_split null"),
        ("\n\n", "has no rows.*--eval_split null"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        load_examples(str(path))


def test_a_column_that_is_not_used_may_hold_anything(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1, "context": "a", "right": "b"}\n{"context": ["c", "d"], "right": "e", "id": null}\n')
    with pytest.raises(ValueError, match="'id'"):
        load_examples(str(path))
    data = load_examples(str(path), columns=["context", "right"])
    assert data["context"][:] == ["a", ["c", "d"]]


def test_messages(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"context": [{"role": "user", "content": "a"}], "right": "b"}\n')
    assert load_examples(str(path))[0]["context"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_a_bad_row_is_named(tmp_path, kind):
    path = tmp_path / f"bad.{kind}"
    if kind == "csv":
        path.write_text("context,right\na,b\nc,\n")
    elif kind == "json":
        path.write_text('[{"context": "a", "right": "b"}, {"context": "c", "right": null}]')
    else:
        Dataset.from_dict({"context": ["a", "c"], "right": ["b", None]}).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"Row 2 of .*'right' is (empty|null or missing)"):
        load_examples(str(path))


def test_csv_words_that_look_like_nothing(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("context,right\nanything?,None\nwhich one?,NA\n")
    assert load_examples(str(path))["right"][:] == ["None", "NA"]


@pytest.mark.parametrize("text", ["", "context,right\n"])
def test_a_csv_without_rows(tmp_path, text):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="--eval_split null"):
        load_ranking_sets(str(path), "validation", 20, 0)


def test_saved_data_sets(tmp_path):
    data = Dataset.from_list(ROWS)
    data.select([4, 2]).save_to_disk(str(tmp_path / "one"))
    assert list(load_examples(str(tmp_path / "one"), max_negatives=0)) == [
        {"context": ROWS[i]["context"], "right": ROWS[i]["right"]} for i in (4, 2)
    ]
    DatasetDict(train=data, validation=data.select(range(3))).save_to_disk(str(tmp_path / "both"))
    assert len(load_examples(str(tmp_path / "both"), "validation")) == 3
    with pytest.raises(ValueError, match="splits train, validation, but not 'test'"):
        load_examples(str(tmp_path / "both"), "test")
    DatasetDict(train=data, test=data.select([])).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no rows in split 'test'.*--eval_split null"):
        load_ranking_sets(str(tmp_path / "empty"), "test", 2, 0)
    data.add_column("bad", [None] * 12).save_to_disk(str(tmp_path / "nulls"))
    with pytest.raises(ValueError, match=r"Row 1 of .*'bad' is null or missing"):
        load_examples(str(tmp_path / "nulls"))


SCORED = [
    {"context": f"q{i}", "right": f"a{i}", "n1": f"b{i}", "n2": f"c{i}", "scores": [3.0, 2.0, 1.0]} for i in range(4)
]


def test_scores_go_with_their_columns(tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SCORED))
    assert load_examples(str(path))["scores"][0] == [3.0, 2.0, 1.0]
    swapped = load_examples(str(path), columns=["context", "right", "n2", "n1", "scores"])
    assert swapped[0]["scores"] == [3.0, 1.0, 2.0]
    assert load_examples(str(path), columns=["context", "right", "n2", "scores"])[0]["scores"] == [3.0, 1.0]
    fewer = load_examples(str(path), max_negatives=1)
    assert fewer.column_names == ["context", "right", "n1", "scores"]
    assert fewer[0]["scores"] == [3.0, 2.0]
    assert "scores" not in load_examples(str(path), columns=["context", "right", "n1"]).column_names
    assert load_ranking_sets(str(path), "train", size=3, seed=0)[0]["candidates"] == ["a0", "b0", "c0"]


@pytest.mark.parametrize("scores", [None, [1.0, 2.0], [1.0, 2.0, None], [1.0, 2.0, float("inf")]])
def test_scores_that_are_wrong_are_named(tmp_path, scores):
    path = tmp_path / "scored.parquet"
    Dataset.from_list([SCORED[0], {**SCORED[1], "scores": scores}]).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"Row 2 .*3 finite numbers"):
        load_examples(str(path))


@pytest.mark.parametrize(
    "context",
    [[{"role": "user", "content": None}], [{"role": "user"}], [["a", "b"]], ["", " "]],
    ids=["content null", "no content", "nested", "blank"],
)
def test_conversations_that_cannot_be_read_are_named_before_training(tmp_path, context):
    path = tmp_path / "talk.jsonl"
    good = [{"role": "user", "content": "hi"}] if isinstance(context[0], dict) else ["hi"]
    good = [["hi"]] if isinstance(context[0], list) else good
    rows = [{"context": good, "right": "b"}, {"context": context, "right": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"Line [12] of "):
        load_examples(str(path))
