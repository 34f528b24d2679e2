"""The fixed ChitChat protocol, on small conversations made here and on the packaged ones."""

import hashlib

import pytest

from poly_encoders.training.chitchat import (
    chitchat_examples,
    chitchat_ranking_sets,
    examples_of,
    load_chitchat,
    split_of,
)


def message(sender, text):
    return {"sender": sender, "text": text}


def test_turns_labels_and_contexts():
    messages = [
        [message("a", "hi"), message("a", "there")],
        [message("b", "yo")],
        [message("a", "how")],
        [message("a", "are")],
    ]
    assert [(example.context, example.response) for example in examples_of("c", messages)] == [
        (["hi there"], "yo"),
        (["hi there", "yo"], "how are"),
    ]


def test_examples_with_an_empty_side_are_dropped():
    messages = [[message("a", " ")], [message("b", "x")], [message("a", "")], [message("b", "y")]]
    assert [(example.context, example.response) for example in examples_of("c", messages)] == [(["x"], "y")]


def test_the_split_is_by_the_hash_of_the_conversation():
    for identity in ("one", "two", "three"):
        bucket = int(hashlib.sha256(identity.encode()).hexdigest(), 16) % 20
        assert split_of(identity) == {0: "test", 1: "validation"}.get(bucket, "train")


def test_the_packaged_data():
    sizes = {split: len(chitchat_examples(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 117916, "validation": 6868, "test": 6773}
    data = load_chitchat("validation")
    assert data.column_names == ["context", "response"]
    assert len(data) == sizes["validation"]


def test_ranking_sets_are_foreign_distinct_and_repeatable():
    sets = chitchat_ranking_sets("test", size=20, seed=3, limit=50)
    assert sets == chitchat_ranking_sets("test", size=20, seed=3, limit=50)
    assert sets != chitchat_ranking_sets("test", size=20, seed=4, limit=50)
    where = {}
    for example in chitchat_examples("test"):
        where.setdefault(example.response, set()).add(example.conversation)
    for ranked in sets:
        label, *others = ranked["candidates"]
        assert len(others) == 19
        assert len(set(ranked["candidates"])) == 20
        assert label not in others
        assert all(other in where for other in others)


def test_every_label_has_its_set():
    labels = [ranked["candidates"][0] for ranked in chitchat_ranking_sets("validation", size=2)]
    assert labels == [example.response for example in chitchat_examples("validation")]


@pytest.mark.parametrize("size", [1, 2])
def test_small_sets(size):
    assert all(len(ranked["candidates"]) == size for ranked in chitchat_ranking_sets("test", size=size, limit=5))
