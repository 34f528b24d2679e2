"""ChitChat: 7,168 real conversations from the package chitchat-dataset (BYU Chit-Chat Challenge, MIT licence).

The protocol is fixed so that figures compare. Consecutive messages of one speaker, joined by a space, make a turn;
every turn after the first is a positive, the turns before it its context; examples with an empty side are dropped.
Conversations are split by `int(sha256(conversation_id).hexdigest(), 16) % 20`: 0 is test, 1 validation, the rest train.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset


class Example(NamedTuple):
    conversation: str  # its id
    context: list[str]  # turns, oldest first
    response: str


def load_chitchat(split: str) -> Dataset:
    """The examples of `"train"`, `"validation"` or `"test"`: columns `context` (a list of turns) and `response`.

    Raises:
        ImportError: the package chitchat-dataset is not installed.
    """
    return Dataset.from_list([{"context": turns, "response": text} for _, turns, text in chitchat_examples(split)])


def chitchat_examples(split: str) -> list[Example]:
    """The examples of a split, with their conversations."""
    found = ((identity, talk["messages"]) for identity, talk in _conversations().items() if split_of(identity) == split)
    return [example for identity, messages in found for example in examples_of(identity, messages)]


def split_of(conversation_id: str) -> str:
    """The split that a conversation belongs to."""
    bucket = int(hashlib.sha256(conversation_id.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def examples_of(conversation_id: str, messages: list[list[dict[str, Any]]]) -> Iterator[Example]:
    """Every turn after the first, with the turns before it."""
    flat = [message for group in messages for message in group]
    by_speaker = groupby(flat, lambda message: message["sender"])
    turns = [" ".join(message["text"] for message in group).strip() for _, group in by_speaker]
    for end in range(1, len(turns)):
        context = [turn for turn in turns[:end] if turn]
        if context and turns[end]:
            yield Example(conversation_id, context, turns[end])


def chitchat_ranking_sets(split: str, size: int = 20, seed: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """Ranking sets for `CandidateRankingEvaluator`: the positive first, then `size - 1` responses of the split.

    They are drawn without replacement from other conversations, and none equals the positive. With a `limit`, the sets
    are a sample of so many.

    Raises:
        ValueError: there are too few different responses outside a conversation for a set of that size.
    """
    examples = chitchat_examples(split)
    own = Counter(
        conversation for conversation, _ in {(example.conversation, example.response) for example in examples}
    )
    if size - 1 > (most := len({example.response for example in examples}) - max(own.values(), default=0)):
        raise ValueError(f"The {split} split of ChitChat has responses for sets of {most + 1}, not of {size}.")
    draw = random.Random(seed)
    sets = []
    for example in examples if limit is None or limit >= len(examples) else draw.sample(examples, limit):
        candidates = [example.response]
        while len(candidates) < size:
            other = draw.choice(examples)
            if other.conversation != example.conversation and other.response not in candidates:
                candidates.append(other.response)
        sets.append({"context": example.context, "candidates": candidates, "label": 0})
    return sets


@cache  # a run wants several splits
def _conversations() -> Any:
    try:
        import chitchat_dataset
    except ImportError as error:
        raise ImportError("ChitChat needs its package: pip install 'poly-encoders[examples]'") from error
    return chitchat_dataset.Dataset()
