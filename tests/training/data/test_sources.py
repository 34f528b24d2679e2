"""Examples and ranking sets from local files."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict

from poly_encoders.training.data import sources
from poly_encoders.training.data.sources import DataSource

ROWS = [{"context": f"question {i}", "right": f"answer {i}", "wrong": f"mistake {i}"} for i in range(12)]
SCORED = [
    {"context": f"q{i}", "right": f"a{i}", "n1": f"b{i}", "n2": f"c{i}", "scores": [3.0, 2.0, 1.0]} for i in range(4)
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(params=["jsonl", "csv", "tsv", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"data.{request.param}"
    if request.param == "jsonl":
        return lines(path, ROWS)
    if request.param == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
        return str(path)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if request.param == "tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
    return str(path)


def test_files(file, tmp_path):
    data = DataSource(file).examples()
    assert data.column_names == ["context", "right", "wrong"]
    assert data[3] == ROWS[3]
    assert DataSource(file, columns=["right", "context"]).examples().column_names == ["right", "context"]
    with pytest.raises(ValueError, match=r"no column \['reply'\]"):
        DataSource(file, columns=["context", "reply"]).examples()
    with pytest.raises(ValueError, match="needs a context and a candidate"):
        DataSource(file, columns=["context"]).examples()
    with pytest.raises(FileNotFoundError, match="no file"):
        DataSource(str(tmp_path / "nothing.jsonl")).examples()


def test_ranking_sets_and_samples(file):
    source = DataSource(file)
    sets = source.ranking_sets(6)
    assert len(sets) == 12
    for row, ranked in zip(ROWS, sets, strict=True):
        assert ranked["context"] == row["context"]
        assert ranked["candidates"][:2] == [row["right"], row["wrong"]]
        assert len(set(ranked["candidates"])) == 6
    assert sets == source.ranking_sets(6) == DataSource(file, max_negatives=0).ranking_sets(6)
    assert sets != DataSource(file, seed=1).ranking_sets(6)
    assert len(source.ranking_sets(2, limit=5)) == 5
    with pytest.raises(ValueError, match=r"12 different candidates.*Lower eval_set_size"):
        source.ranking_sets(99)
    sample = DataSource(file, max_examples=5, seed=1)
    assert len(sample.examples()) == 5
    assert sample.examples()[:] == DataSource(file, max_examples=5, seed=1).examples()[:]
    assert len(DataSource(file, max_examples=99).examples()) == 12
    for option in ("max_negatives", "max_examples"):
        with pytest.raises(ValueError, match=f"{option} must be"):
            DataSource(file, **{option: -1})


def test_a_source_is_read_once(tmp_path, monkeypatch):
    loaded = []

    def counted(*arguments, **options):
        loaded.append(arguments)
        return load_dataset(*arguments, **options)

    load_dataset = sources.load_dataset
    monkeypatch.setattr(sources, "load_dataset", counted)
    source = DataSource(lines(tmp_path / "data.jsonl", ROWS), max_negatives=0)
    assert source.examples() is source.examples()
    assert len(source.ranking_sets(3)) == len(source.ranking_sets(4)) == 12
    assert len(loaded) == 1


GOOD = '{"context": ["a"], "right": "b"}\n'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (GOOD + "\n{broken\n", r"Line 3 of .*bad.jsonl should be a JSON object"),
        (GOOD + '["a", "b"]\n', r"Line 2 .*JSON object"),
        (GOOD + '{"context": ["c"]}\n', r"Line 2 .*'right' is null or missing"),
        ('{"context": ["c"]}\n' + GOOD, r"Line 1 .*'right' is null or missing"),
        (GOOD + '\n{"context": ["c"], "right": null}\n', r"Line 3 .*'right' is null or missing"),
        (GOOD + '{"context": ["c"], "right": " "}\n', r"Line 2 .*'right' is empty"),
        (GOOD + '{"context": [], "right": "d"}\n', r"Line 2 .*'context'.*without a single turn"),
        (GOOD + '{"context": ["x", null], "right": "d"}\n', r"Line 2 .*'context'.*Turn 1"),
        (GOOD + '{"context": ["c"], "right": 3}\n', r"Line 2 .*'right'.*int: 3"),
        (GOOD + '{"context": 5, "right": "d"}\n', r"Line 2 .*'context'.*int: 5"),
        ('{"context": 5, "right": "d"}\n', r"Line 1 .*'context'.*int: 5"),
        ('{"context": "a", "right": ["d"]}\n', r"Line 1 .*'right'.*list"),
        ('{"context": [{"role": "user", "content": null}], "right": "d"}\n', "Line 1 .*without a single turn"),
        ('{"context": [{"role": "user"}], "right": "d"}\n', r"Line 1 .*no 'content'"),
        (GOOD + '{"context": [["a", "b"]], "right": "d"}\n', r"Line 2 .*Turn 0"),
        (GOOD + '{"context": ["", " "], "right": "d"}\n', "Line 2 .*'context' is empty"),
        ("", "has no rows.*--eval_split null"),
        ("\n\n", "has no rows.*--eval_split null"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        DataSource(str(path)).examples()


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_a_bad_row_is_named(tmp_path, kind):
    path = tmp_path / f"bad{{}}.{kind}"
    if kind == "csv":
        path.write_text("context,right\na,b\nc,\n")
    elif kind == "json":
        path.write_text('[{"context": "a", "right": "b"}, {"context": "c", "right": null}]')
    else:
        Dataset.from_dict({"context": ["a", "c"], "right": ["b", None]}).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"Row 2 of .*'right' is (empty|null or missing)"):
        DataSource(str(path)).examples()


def test_contexts_of_all_forms_and_columns_that_are_not_used(tmp_path):
    talk = [{"role": "user", "content": "a"}]
    path = lines(tmp_path / "chat.jsonl", [{"context": talk, "right": "b"}])
    assert DataSource(path).examples()[0]["context"] == talk
    rows = [{"id": 1, "context": "a", "right": "b"}, {"context": ["c", "d"], "right": "e", "id": None}]
    path = lines(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match="'id'"):
        DataSource(path).examples()
    assert DataSource(path, columns=["context", "right"]).examples()["context"][:] == ["a", ["c", "d"]]


def test_csv_words_that_look_like_nothing(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("context,right\nanything?,None\nwhich one?,NA\n")
    assert DataSource(str(path)).examples()["right"][:] == ["None", "NA"]


@pytest.mark.parametrize("text", ["", "context,right\n"])
def test_a_csv_without_rows(tmp_path, text):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no rows.*--eval_split null"):
        DataSource(str(path), "validation").ranking_sets(20)


def test_saved_data_sets(tmp_path):
    data = Dataset.from_list(ROWS)
    data.select([4, 2]).save_to_disk(str(tmp_path / "one"))
    assert list(DataSource(str(tmp_path / "one"), max_negatives=0).examples()) == [
        {"context": ROWS[i]["context"], "right": ROWS[i]["right"]} for i in (4, 2)
    ]
    DatasetDict(train=data, validation=data.select(range(3))).save_to_disk(str(tmp_path / "both"))
    assert len(DataSource(str(tmp_path / "both"), "validation").examples()) == 3
    with pytest.raises(ValueError, match="splits train, validation, but not 'test'"):
        DataSource(str(tmp_path / "both"), "test").examples()
    DatasetDict(train=data, test=data.select([])).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no rows in split 'test'.*--eval_split null"):
        DataSource(str(tmp_path / "empty"), "test").ranking_sets(2)
    data.add_column("bad", [None] * 12).save_to_disk(str(tmp_path / "nulls"))
    with pytest.raises(ValueError, match=r"Row 1 of .*'bad' is null or missing"):
        DataSource(str(tmp_path / "nulls")).examples()


def test_scores_go_with_their_columns(tmp_path):
    path = lines(tmp_path / "scored.jsonl", SCORED)
    assert DataSource(path).examples()["scores"][0] == [3.0, 2.0, 1.0]
    for columns, scores in ((["n2", "n1"], [3.0, 1.0, 2.0]), (["n2"], [3.0, 1.0])):
        some = DataSource(path, columns=["context", "right", *columns, "scores"]).examples()
        assert some[0]["scores"] == scores
    fewer = DataSource(path, max_negatives=1).examples()
    assert fewer.column_names == ["context", "right", "n1", "scores"]
    assert fewer[0]["scores"] == [3.0, 2.0]
    assert "scores" not in DataSource(path, columns=["context", "right", "n1"]).examples().column_names
    assert DataSource(path).ranking_sets(3)[0]["candidates"] == ["a0", "b0", "c0"]
    with pytest.raises(ValueError, match=r"no teacher's scores of the columns \['context'\]"):
        DataSource(path, columns=["right", "context", "scores"]).examples()


@pytest.mark.parametrize("scores", [None, [1.0, 2.0], [1.0, 2.0, None], [1.0, 2.0, float("inf")]])
@pytest.mark.parametrize("max_negatives", [None, 1])
def test_scores_that_are_wrong_are_named(tmp_path, scores, max_negatives):
    path = tmp_path / "scored.parquet"
    Dataset.from_list([SCORED[0], {**SCORED[1], "scores": scores}]).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"Row 2 .*3 finite numbers"):
        DataSource(str(path), max_negatives=max_negatives).examples()
