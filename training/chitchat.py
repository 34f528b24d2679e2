"""ChitChat: 7,168 real conversations from the package chitchat-dataset (BYU Chit-Chat Challenge, MIT licence).

The protocol is fixed so that figures compare. Consecutive messages of one speaker, joined by a space, make a turn;
every turn after the first is a label, the turns before it its context; examples with an empty side are dropped.
Conversations are split by `int(sha256(conversation_id).hexdigest(), 16) % 20`: 0 is test, 1 validation, the rest train.
"""

import hashlib
import random
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal, NamedTuple

from datasets import Dataset

Split = Literal["train", "validation", "test"]


class Example(NamedTuple):
    conversation: str  # its id
    context: list[str]  # turns, oldest first
    response: str


def load_chitchat(split: Split) -> Dataset:
    """The examples of a split: columns `context` (a list of turns) and `response`.

    Raises:
        ImportError: the package chitchat-dataset is not installed.
    """
    examples = chitchat_examples(split)
    return Dataset.from_dict(
        {"context": [example.context for example in examples], "response": [example.response for example in examples]}
    )


def chitchat_examples(split: Split) -> list[Example]:
    """The examples of a split, with their conversations."""
    return [
        example
        for identity, conversation in _conversations().items()
        if split_of(identity) == split
        for example in examples_of(identity, conversation["messages"])
    ]


def split_of(conversation_id: str) -> Split:
    """The split that a conversation belongs to."""
    bucket = int(hashlib.sha256(conversation_id.encode()).hexdigest(), 16) % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def examples_of(conversation_id: str, messages: list[list[dict[str, Any]]]) -> Iterator[Example]:
    """Every turn after the first, with the turns before it."""
    flat = [message for group in messages for message in group]
    turns = [
        " ".join(message["text"] for message in group).strip()
        for _, group in groupby(flat, lambda message: message["sender"])
    ]
    for end in range(1, len(turns)):
        context = [turn for turn in turns[:end] if turn]
        if context and turns[end]:
            yield Example(conversation_id, context, turns[end])


def chitchat_ranking_sets(
    split: Split, size: int = 20, seed: int = 0, limit: int | None = None
) -> list[dict[str, Any]]:
    """Ranking sets of a split for `CandidateRankingEvaluator`: the label first, then `size - 1` other responses.

    The others are drawn without replacement from other conversations of the split, and none equals the label.

    Args:
        split: Which split.
        size: C, the number of candidates in a set.
        seed: Of the draw.
        limit: How many sets, a seeded sample of all; every one when left out.
    """
    examples = chitchat_examples(split)
    draw = random.Random(seed)
    chosen = examples if limit is None or limit >= len(examples) else draw.sample(examples, limit)
    sets = []
    for example in chosen:
        others: list[str] = []
        while len(others) < size - 1:
            other = draw.choice(examples)
            is_foreign = other.conversation != example.conversation
            if is_foreign and other.response != example.response and other.response not in others:
                others.append(other.response)
        sets.append({"context": example.context, "candidates": [example.response, *others], "label": 0})
    return sets


def _conversations() -> dict[str, dict[str, Any]]:
    try:
        import chitchat_dataset
    except ImportError as error:
        raise ImportError("ChitChat needs its package: pip install 'poly-encoders[examples]'") from error
    return chitchat_dataset.Dataset()
