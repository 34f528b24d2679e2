# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Contexts: a text, the turns of a conversation, or chat messages, each made into the one text a model reads.

Wherever one context goes in (`rank`, a cell of a data set), all three forms are taken:

    "hello"                                                         a text
    ["hello", "hi, how are you?"]                                   turns, oldest first
    [{"role": "user", "content": "hello"}, {"role": ..., ...}]      chat messages, oldest first

Wherever a batch goes in (`encode_query`, `predict`), the outermost list is the batch, so `["hello", "hi"]` is two
contexts and `[["hello", "hi"]]` one of two turns. A list of chat messages is always one conversation.

Turns are joined by the model's `turn_separator`, roles are not written into the text, and what is too long for the
model is cut token by token from the left: the oldest goes first. Where the model has `max_turns`, only that many of the
last turns are read at all.

This file travels to the Hub beside the weights, so it imports the standard library only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Context: TypeAlias = str | Sequence[str] | Sequence[Message]

TURN_SEPARATOR = "\n"

# The two sides of an input: ours, the Hub's for the task sentence-similarity, and those of rerankers.
_NAMES = (("context", "candidates"), ("source_sentence", "sentences"), ("query", "texts"))
_INPUTS = " or ".join(f'{{"{context}": ..., "{candidates}": [...]}}' for context, candidates in _NAMES)
_FORMS = "a string, a list of turns (strings), or a list of chat messages ({'role': ..., 'content': ...})"


def context_text(context: Any, separator: str = TURN_SEPARATOR, max_turns: int | None = None) -> str:
    """One context as one text.

    Args:
        context: A string, a list of turns, or a list of chat messages, oldest first.
        separator: Put between turns.
        max_turns: How many of the last turns to keep; all when left out. A string is one turn.

    Raises:
        TypeError: `context`, or an item of it, is none of these.
        ValueError: a conversation without turns, or text that no tokenizer can read.

    Example:
        >>> context_text(["hello", "hi, how are you?"], separator=" | ")
        'hello | hi, how are you?'
        >>> context_text([{"role": "user", "content": "hello"}])
        'hello'
    """
    if isinstance(context, str):
        return checked_text(context, "The context")
    if isinstance(context, Mapping):
        context = [context]
    if not isinstance(context, (list, tuple)) and not _is_array(context):
        raise TypeError(f"A context is {_FORMS}, but this one is {_described(context)}.")
    if len(context) == 0:
        raise ValueError("The context is a conversation without a single turn. Pass at least one turn, or a string.")
    texts = [_turn_text(turn, position) for position, turn in enumerate(context)]
    return separator.join(texts if max_turns is None else texts[-max_turns:])


def is_single_context(inputs: Any) -> bool:
    """Whether `inputs` to a batch method is one context: a string, a chat message, or a list of chat messages."""
    if isinstance(inputs, (str, Mapping)):
        return True
    return isinstance(inputs, (list, tuple)) and len(inputs) > 0 and isinstance(inputs[0], Mapping)


def context_texts(contexts: Iterable[Any], separator: str = TURN_SEPARATOR, max_turns: int | None = None) -> list[str]:
    """A batch of contexts as texts; an error names the position of the bad one."""
    return [
        _at(position, context_text, context, separator, max_turns) for position, context in enumerate(_batch(contexts))
    ]


def candidate_texts(candidates: Iterable[Any]) -> list[str]:
    """Candidates as given, each checked to be a readable string.

    Raises:
        TypeError: `candidates` is not a batch, or one of them is not a string.
        ValueError: text that no tokenizer can read.
    """
    return [_at(position, checked_text, text, "The candidate") for position, text in enumerate(_batch(candidates))]


def context_and_candidates(inputs: Any) -> tuple[Any, Any]:
    """The context and the candidates of one input, under whichever names they come.

    Args:
        inputs: `{"context": ..., "candidates": [...]}`, or the names of the Hub's sentence-similarity task,
            `{"source_sentence": ..., "sentences": [...]}`, or those of rerankers, `{"query": ..., "texts": [...]}`.

    Raises:
        TypeError: it is no mapping.
        ValueError: a side is missing, or there are other names in it.

    Example:
        >>> context_and_candidates({"query": "hello", "texts": ["hi", "bye"]})
        ('hello', ['hi', 'bye'])
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"An input is {_INPUTS}, but this one is {_described(inputs)}.")
    for names in _NAMES:
        if inputs.keys() == set(names):
            return inputs[names[0]], inputs[names[1]]
    raise ValueError(f"An input is {_INPUTS}, but this one has the keys {sorted(map(str, inputs))!s:.200}.")


def checked_max_turns(value: int | None) -> int | None:
    """`value` itself, if it is a number of turns that can be kept.

    Raises:
        ValueError: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"max_turns must be at least 1, or None for all turns, got {value!r}.")
    return value


def checked_text(text: Any, what: str = "The text") -> str:
    """`text` itself, if it is a string that can be written as UTF-8.

    Raises:
        TypeError: it is not a string.
        ValueError: it holds a lone surrogate, half of a UTF-16 pair, which is no character.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, but it is {_described(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds a lone surrogate ({text[error.start]!r}) at character {error.start}, which is no text. "
            "Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    return str(text)


def _batch(inputs: Any) -> Iterable[Any]:
    unordered = isinstance(inputs, (str, bytes, Mapping, set, frozenset))
    if inputs is None or unordered or not isinstance(inputs, Iterable) or getattr(inputs, "ndim", 1) == 0:
        raise TypeError(f"Expected a list of texts, but got {_described(inputs)}. Put a single one into a list.")
    return inputs


def _is_array(value: Any) -> bool:
    """Whether this is an array of numpy, or of its kind, with at least one axis."""
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _turn_text(turn: Any, position: int) -> str:
    if isinstance(turn, str):
        return checked_text(turn, f"Turn {position}")
    if not isinstance(turn, Mapping):
        raise TypeError(f"Turn {position} of the context is {_described(turn)}; a context is {_FORMS}.")
    if "content" not in turn:
        keys = sorted(map(str, turn))
        raise ValueError(f"Message {position} of the context has no 'content', only the keys {keys!s:.200}.")
    content = turn["content"]
    if isinstance(content, (list, tuple)):  # the parts of a multi-modal chat message
        if not content:
            raise ValueError(f"Message {position} of the context has no content at all. Leave it out.")
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return " ".join(checked_text(part, f"A part of message {position}") for part in parts)
    return checked_text(content, f"The content of message {position}")


def _at(position: int, function: Any, *arguments: Any) -> str:
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Item {position} of the list: {error}") from None


def _described(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__}: {shown if len(shown) <= 60 else shown[:57] + '...'}"
