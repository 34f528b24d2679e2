"""Data sets that a user gives from Python: what is wrong is named, labels are honoured, transforms stay."""

import json

import pytest
from datasets import Dataset, DatasetDict

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.data.checks import cells, checked_examples, settled, text_columns
from poly_encoders.training.data.collators import row_lengths
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.methods.mining import mine_negatives
from poly_encoders.training.methods.negative_rules import MiningOptions
from poly_encoders.training.methods.teaching import add_teacher_scores
from poly_encoders.training.runs.arguments import TRAINING_ARGUMENTS
from poly_encoders.training.train import TRAINERS

PAIRS = {"context": ["a", "b", "c", "d"], "reply": ["e", "f", "g", "h"]}
CLASSES = {"poly-encoder": PolyEncoder, "bi-encoder": BiEncoder, "cross-encoder": CrossEncoder}


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"context": ["a", None], "reply": ["b", "c"]}, "Row 2 of the data: the column 'context' is null"),
        ({"context": ["a", "b"], "reply": ["c", None]}, "Row 2 of the data: the column 'reply' is null"),
        ({"context": ["a", "b"], "reply": ["c", " "]}, "Row 2 of the data: the column 'reply' is empty"),
        ({"context": [["a"], []], "reply": ["c", "d"]}, "Row 2 .*'context'.*without a single turn"),
        ({"context": [["a"], ["b", None]], "reply": ["c", "d"]}, "Row 2 .*'context'.*Turn 1"),
        ({"context": ["a", "b"], "reply": [1, 2]}, "Row 1 .*'reply'.*int: 1"),
        ({"context": ["a", "b"], "reply": ["c", "d"], "more": ["e", None]}, "Row 2 .*'more' is null"),
        ({"context": ["a", "b"]}, r"the data has the columns \['context'\].*needs a context and a candidate"),
        ({"context": ["a"], "label": ["b"]}, r"the columns \['context', 'label'\].*named label.*are neither"),
        ({"context": [], "reply": []}, "the data has no rows"),
        ({"context": ["a"], "reply": ["b"], "scores": [0.5]}, r"Row 1 .*scores 0.5; expected 1 finite"),
    ],
)
def test_what_is_wrong_is_named(columns, match):
    for form in (lambda data: data, lambda data: data.with_format("numpy"), lambda data: data.with_transform(dict)):
        with pytest.raises(ValueError, match=match):
            checked_examples(form(Dataset.from_dict(columns)), "the data")
    with pytest.raises(ValueError, match=match.replace("the data", r"the data\['one'\]")):
        checked_examples(DatasetDict(one=Dataset.from_dict(columns)), "the data")


def test_what_is_right_comes_back_as_it_is():
    data = Dataset.from_dict({**PAIRS, "context": ["a", "", "c", "d"]})
    kept = data.filter(lambda row: row["context"])  # the bad row is still in the table beneath
    assert checked_examples(kept, "it")[:] == kept[:]
    streamed = Dataset.from_dict(PAIRS).to_iterable_dataset()
    assert checked_examples(streamed, "it") is streamed
    assert checked_examples(None, "it") is None
    with pytest.raises(ValueError, match=r"it has the columns \['context'\]"):
        checked_examples(streamed.remove_columns("reply"), "it")
    numbers = Dataset.from_dict({**PAIRS, "id": [1, 2, 3, 4]})
    for chosen in (numbers.with_format("torch", columns=["context", "reply"]), numbers.select_columns(list(PAIRS))):
        assert checked_examples(chosen, "it")[:] == PAIRS


@pytest.mark.parametrize("name", ["label", "labels", "score"])
@pytest.mark.parametrize("values", [[1, 0, 1, 0], [True, False, True, False], [1.0, 0.0, 1.0, 0.0]])
def test_rows_labelled_0_are_left_out(name, values, caplog):
    data = Dataset.from_dict({**PAIRS, name: values})
    found = checked_examples(data, "it")
    assert found[:] == {"context": ["a", "c"], "reply": ["e", "g"]}
    assert f"it: leaving out 2 rows of 4, whose {name} is 0" in caplog.text
    assert checked_examples(data, "it", keep_labels=True)[:] == data[:]
    caplog.clear()
    assert checked_examples(data.select([0, 2]), "it")[:] == found[:]
    assert not caplog.text
    with pytest.raises(ValueError, match="no positive"):
        checked_examples(data.select([1, 3]), "it")
    bad = Dataset.from_dict({**PAIRS, "reply": ["e", "f", None, "h"], name: values})
    with pytest.raises(ValueError, match="Row 3 of it"):  # whatever is left out before it
        checked_examples(bad, "it")


@pytest.mark.parametrize(
    "more",
    [
        {"label": [1, 0, 2, 0]},
        {"score": [0.9, 0.1, 0.5, 1.0]},
        {"labels": ["1", "0", "1", "0"]},
        {"label": [1, 0, None, 0]},
        {"labels": [[1], [0], [1], [0]]},
        {"wrong": ["w", "x", "y", "z"], "label": [1, 0, 1, 0]},
    ],
)
def test_labels_that_say_no_positives_are_refused(more, tmp_path):
    data = Dataset.from_dict({**PAIRS, **more})
    name = list(more)[-1]
    match = rf"column '{name}'.*positive.*data.filter.*--columns"
    with pytest.raises(ValueError, match=match):
        checked_examples(data, "it")
    data.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=match):
        DataSource(str(tmp_path / "saved")).examples()
    asked_for = DataSource(str(tmp_path / "saved"), columns=[*PAIRS]).examples()
    assert asked_for.column_names == [*PAIRS]
    assert len(asked_for) == (2 if "wrong" in more else 4)  # 0 and 1 beside one candidate are always honoured


def test_labels_of_streamed_and_transformed_data_are_refused():
    data = Dataset.from_dict({**PAIRS, "label": [1, 0, 1, 0]})
    for given in (data.to_iterable_dataset(), data.with_transform(dict)):
        with pytest.raises(ValueError, match="column 'label'"):
            checked_examples(given, "it")


def test_labels_in_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"label": i % 2, "context": f"q{i}", "reply": f"a{i}"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for columns in (None, ["context", "reply"], ["context", "reply", "label"]):
        source = DataSource(str(path), columns=columns)
        assert source.examples()[:] == {"context": ["q1", "q3", "q5"], "reply": ["a1", "a3", "a5"]}
        assert [ranked["candidates"][0] for ranked in source.ranking_sets(2)] == ["a1", "a3", "a5"]


def renamed(batch):
    return {"context": [text.upper() for text in batch["q"]], "reply": batch["a"]}


@pytest.fixture
def transformed():
    data = Dataset.from_dict({"id": list(range(8)), "q": list("abcdefgh"), "a": [f"to {x}" for x in "abcdefgh"]})
    return data.with_transform(renamed)


def test_transforms_make_the_columns(transformed):
    data = checked_examples(transformed, "it")
    assert data[0] == {"context": "A", "reply": "to a"}
    assert text_columns(data) == ["context", "reply"]
    assert list(cells(data, "context")) == list("ABCDEFGH")
    assert row_lengths(data, (5, 5)) == [5] * 8
    assert settled(data.select([1]))[:] == {"context": ["B"], "reply": ["to b"]}


@pytest.mark.parametrize("kind", CLASSES)
def test_transformed_and_labelled_data_train(kind, transformed, checkpoints, tmp_path):
    """The transform is asked anew for each batch; rows labelled 0 are seen by no trainer."""
    seen = []

    def watched(batch):
        seen.extend(batch["q"])
        return renamed(batch)

    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    args = TRAINING_ARGUMENTS[kind](str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, **options)
    model = CLASSES[kind](checkpoints(), device="cpu")
    trainer = TRAINERS[kind](model=model, args=args, train_dataset=transformed.with_transform(watched))
    seen.clear()
    trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(seen[-16:]) == sorted("abcdefgh" * 2)
    labelled = Dataset.from_dict({**PAIRS, "label": [1, 0, 1, 1]})
    trainer = TRAINERS[kind](model=model, args=args, train_dataset=labelled, eval_dataset=labelled)
    for data in (trainer.train_dataset, trainer.eval_dataset):
        assert data[:] == {"context": ["a", "c", "d"], "reply": ["e", "g", "h"]}


def test_mining_and_teaching_look_first(poly_encoder, transformed):
    mined, _ = mine_negatives(poly_encoder, transformed, MiningOptions(1, too_few="fill"), show_progress_bar=False)
    assert mined["context"][:] == list("ABCDEFGH")
    scored = add_teacher_scores(poly_encoder, transformed, 1, show_progress_bar=False)
    assert scored.column_names == ["context", "reply", "negative_1", "scores"]
    labelled = Dataset.from_dict({**PAIRS, "label": [1, 0, 1, 1]})
    mined, _ = mine_negatives(poly_encoder, labelled, MiningOptions(1), show_progress_bar=False)
    assert mined["reply"][:] == ["e", "g", "h"]
    assert set(mined["negative_1"]) <= {"e", "g", "h"}
    bad = Dataset.from_dict({"context": ["a", None], "reply": ["b", "c"]})
    for call in (
        lambda: mine_negatives(poly_encoder, bad, MiningOptions(1)),
        lambda: add_teacher_scores(poly_encoder, bad, 1),
    ):
        with pytest.raises(ValueError, match=r"Row 2 .*'context' is null"):
            call()
