"""The fixed ChitChat protocol, on small conversations made here and on the packaged ones."""

import hashlib
import json

import pytest

from poly_encoders.training.data import chitchat
from poly_encoders.training.data.chitchat import (
    chitchat_examples,
    chitchat_ranking_sets,
    examples_of,
    load_chitchat,
    split_of,
)


def message(sender, text):
    return {"sender": sender, "text": text}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [[("a", "hi"), ("a", "there")], [("b", "yo")], [("a", "how")], [("a", "are")]],
            [(["hi there"], "yo"), (["hi there", "yo"], "how are")],
        ),
        ([[("a", " ")], [("b", "x")], [("a", "")], [("b", "y")]], [(["x"], "y")]),  # an empty side is dropped
    ],
)
def test_turns_positives_and_contexts(messages, expected):
    groups = [[message(*said) for said in group] for group in messages]
    assert [(example.context, example.response) for example in examples_of("c", groups)] == expected


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
    said, own = {}, {}
    for example in chitchat_examples("test"):
        said.setdefault(example.response, set()).add(example.conversation)
        own.setdefault((*example.context, example.response), set()).add(example.conversation)
    for ranked in sets:
        positive, *others = ranked["candidates"]
        assert len(set(ranked["candidates"])) == 20
        assert all(said[other] - own[(*ranked["context"], positive)] for other in others)


def test_every_positive_has_its_set():
    positives = [ranked["candidates"][0] for ranked in chitchat_ranking_sets("validation", size=2)]
    assert positives == [example.response for example in chitchat_examples("validation")]
    assert all(len(ranked["candidates"]) == 1 for ranked in chitchat_ranking_sets("test", size=1, limit=5))


def test_sets_that_want_more_than_there_are(monkeypatch):
    """The draw went on for ever. Two talks of three responses each: a set has its positive and three foreign ones."""
    talks = {name: {"messages": [[message("ab"[i % 2], f"{name}{i}") for i in range(4)]]} for name in ("x", "y")}
    monkeypatch.setattr(chitchat, "_conversations", lambda: talks)
    split = split_of("x")
    monkeypatch.setattr(chitchat, "split_of", lambda name: split)
    assert {len(ranked["candidates"]) for ranked in chitchat_ranking_sets(split, size=4)} == {4}
    with pytest.raises(ValueError, match="sets of 4, not of 5"):
        chitchat_ranking_sets(split, size=5)
    with pytest.raises(ValueError, match="sets of 1, not of 2"):
        chitchat_ranking_sets("no such split", size=2)


def test_the_protocol_stays():
    """Figures are compared across versions."""
    sets = json.dumps(chitchat_ranking_sets("test", size=20, seed=0)).encode()
    assert hashlib.sha256(sets).hexdigest()[:12] == "3cae41a6bd37"
