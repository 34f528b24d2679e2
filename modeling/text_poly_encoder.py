# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""From what a user passes to the tokens that a model reads.

Wherever one context goes in (`rank`, a cell of a data set), three forms are taken:

    "hello"                                                         a text
    ["hello", "hi, how are you?"]                                   turns, oldest first
    [{"role": "user", "content": "hello"}, {"role": ..., ...}]      chat messages, oldest first

Wherever a batch goes in (`encode_query`, `predict`), the outermost list is the batch, so `["hello", "hi"]` is two
contexts and `[["hello", "hi"]]` one of two turns. A list of chat messages is always one conversation.

Turns are joined by the model's `turn_separator`, roles are not written into the text, and messages without content
(tool calls) are left out. What is too long for the model is cut token by token, a context on the left, so that its
oldest goes first, a candidate on the right. Tokenizers are asked for plain tokens and never told how to cut or pad, so
that many threads can share one.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import BatchEncoding

Message: TypeAlias = Mapping[str, Any]
Context: TypeAlias = str | Sequence[str] | Sequence[Message]
Side: TypeAlias = Literal["left", "right"]

TURN_SEPARATOR = "\n"

_FORMS = "a string, a list of turns (strings), or a list of chat messages ({'role': ..., 'content': ...})"


class NoTokensError(ValueError):
    """A text that a tokenizer makes nothing of, not even special tokens."""


class CheckedText(str):
    """A text that was found readable, and need not be looked at again; a context knows where its turns are."""

    turns: tuple[tuple[int, int], ...] | None = None  # where each begins and ends


# --- texts -----------------------------------------------------------------------------------------------------------


def context_text(context: Any, separator: str = TURN_SEPARATOR, max_turns: int | None = None) -> CheckedText:
    """One context as one text.

    Args:
        context: A string, a sequence of turns, or a sequence of chat messages, oldest first. A string is taken for
            turns that were joined already, so its turns lie between separators; a separator inside a turn of a list is
            text of that turn.
        separator: Put between turns.
        max_turns: How many of the last turns to keep; all when left out. A string is kept whole.

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
        text = checked_text(context, "The context")
        if text.turns is None:
            text = CheckedText(text)  # what is given stays as it is
            mark = separator.strip() or separator  # spaces around it are no part of a turn either way
            text.turns = _spans(text.split(mark) if mark else [text], len(mark))
        return text
    if isinstance(context, Mapping):
        context = [context]
    is_array = hasattr(context, "__array__") and getattr(context, "ndim", 0) > 0
    if isinstance(context, (bytes, bytearray)) or not (isinstance(context, Sequence) or is_array):
        raise TypeError(f"A context is {_FORMS}, but this one is {described(context)}.")
    texts = [_turn_text(turn, place) for place, turn in enumerate(context) if not _is_without_content(turn)]
    if not texts:
        raise ValueError("The context is a conversation without a single turn. Pass at least one turn, or a string.")
    texts = texts if max_turns is None else texts[-max_turns:]
    text = CheckedText(separator.join(texts))
    text.turns = _spans(texts, len(separator))
    return text


def context_texts(
    contexts: Iterable[Any], separator: str = TURN_SEPARATOR, max_turns: int | None = None
) -> list[CheckedText]:
    """A batch of contexts as texts; an error names the position of the bad one."""
    return [_at(place, context_text, context, separator, max_turns) for place, context in enumerate(_batch(contexts))]


def candidate_texts(candidates: Iterable[Any]) -> list[CheckedText]:
    """Candidates as given, each checked to be a readable string.

    Raises:
        TypeError: `candidates` is not a batch, or one of them is not a string.
        ValueError: text that no tokenizer can read.
    """
    return [_at(place, checked_text, text, "The candidate") for place, text in enumerate(_batch(candidates))]


def checked_text(text: Any, what: str = "The text") -> CheckedText:
    """`text` itself, if it is a string that can be written as UTF-8.

    Raises:
        TypeError: it is not a string.
        ValueError: it holds a lone surrogate, half of a UTF-16 pair, which is no character.
    """
    if isinstance(text, CheckedText):
        return text
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, but it is {described(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds a lone surrogate ({text[error.start]!r}) at character {error.start}, which is no text. "
            "Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    return CheckedText(text)


def checked_count(value: Any, name: str, least: int = 1) -> int | None:
    """`value` as an `int`, if it is a whole number (numpy's will do) of at least `least`; `None` stays.

    Raises:
        ValueError: it is not.
    """
    try:
        number = None if value is None or isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if (number is None and value is not None) or (number is not None and number < least):
        raise ValueError(f"{name} must be a whole number, at least {least}, or None for no limit, got {value!r}.")
    return number


def _spans(parts: Sequence[str], between: int) -> tuple[tuple[int, int], ...]:
    """Where each of the parts begins and ends in all of them, with so many characters between two."""
    ends = accumulate(map(len, parts), lambda end, length: end + between + length)
    return tuple((end - len(part), end) for part, end in zip(parts, ends, strict=True))


def _batch(inputs: Any) -> Iterable[Any]:
    unordered = isinstance(inputs, (str, bytes, Mapping, set, frozenset))
    if inputs is None or unordered or not isinstance(inputs, Iterable) or getattr(inputs, "ndim", 1) == 0:
        raise TypeError(f"Expected a list of texts, but got {described(inputs)}. Put a single one into a list.")
    return inputs


def _is_without_content(turn: Any) -> bool:
    """Whether this is a chat message that says nothing, such as a call of a tool."""
    if not isinstance(turn, Mapping):
        return False
    calls = turn.get("tool_calls") is not None or turn.get("function_call") is not None
    content = turn.get("content")
    return (content is None and (calls or "content" in turn)) or (calls and isinstance(content, str) and not content)


def _turn_text(turn: Any, place: int) -> str:
    if isinstance(turn, str):
        return checked_text(turn, f"Turn {place}")
    if not isinstance(turn, Mapping):
        raise TypeError(f"Turn {place} of the context is {described(turn)}; a context is {_FORMS}.")
    if "content" not in turn:
        keys = sorted(map(str, turn))
        raise ValueError(f"Message {place} of the context has no 'content', only the keys {keys!s:.200}.")
    content = turn["content"]
    if isinstance(content, (list, tuple)):  # the parts of a multi-modal chat message
        if not content:
            raise ValueError(f"Message {place} of the context has no content at all. Leave it out.")
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return " ".join(checked_text(part, f"A part of message {place}") for part in parts)
    return checked_text(content, f"The content of message {place}")


def _at(place: int, function: Any, *arguments: Any) -> CheckedText:
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Item {place} of the list: {error}") from None


def described(value: Any) -> str:
    """A value and its type in a few words, for errors."""
    shown = repr(value)
    return f"{type(value).__name__}: {shown if len(shown) <= 60 else shown[:57] + '...'}"


# --- tokens ----------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts around one text, and the segment of each part."""

    before: list[int]
    after: list[int]
    segments: tuple[list[int], int, list[int]]  # of what is before, of the text, of what is after


class Cutting:
    """How a text that is too long is cut. A tokenizer with another rule has it in its attribute `cutting`."""

    def room(self, frame: Frame, limit: int, side: Side) -> int:
        """Tokens of the text itself that are kept of `limit` in all."""
        return limit - len(frame.before) - len(frame.after)

    def closing(self, after: list[int], kept: int, room: int, side: Side) -> list[int]:
        """Which of the special tokens `after` a text follow it where `kept` of its tokens are in the room."""
        return after


class Tokens(NamedTuple):
    """One text's tokens: which of its own were kept, and the row that a model reads."""

    head: int  # its first so many were kept
    tail: int  # and all from this one on
    ids: list[int]
    segments: list[int]
    special: list[bool]  # whether the tokenizer added it
    turns: list[int] | None  # 1, 2, ... where it is in a turn, else 0; unknown to a slow tokenizer


_PLAIN = Cutting()


def cutting_of(tokenizer: Any) -> Cutting:
    """The tokenizer's rule for texts that are too long."""
    return getattr(tokenizer, "cutting", _PLAIN)


def tokenized(
    tokenizer: Any, texts: Sequence[str], limit: int, side: Side, prompt: str | None = None, turns: bool = False
) -> BatchEncoding:
    """Token ids and masks, `(n, longest)` int64 each, of texts that are cut on this side; padding is on the right.

    Args:
        tokenizer: The tokenizer.
        texts: At least one.
        limit: Tokens kept of a text and its prompt, special tokens included.
        side: Where the rest is cut off. On the left the prompt stays, and the oldest of the text behind it goes.
        prompt: Put before each text.
        turns: Add `turn_ids`, the turn of each token, 0 for padding, special tokens and the prompt; a slow tokenizer,
            which cannot tell, adds none.

    Raises:
        NoTokensError: one of the texts has no token.
        ValueError: the prompt leaves no room.
    """
    rows = text_tokens(tokenizer, texts, limit, side, prompt)
    for place, row in enumerate(rows):
        if not row.ids:
            raise NoTokensError(f"Text {place} ({texts[place]!r:.80}) has no token for this tokenizer; leave it out.")
    features = {"input_ids": [row.ids for row in rows]}
    if "token_type_ids" in tokenizer.model_input_names:
        features["token_type_ids"] = [row.segments for row in rows]
    batch = padded(tokenizer, features)
    known = [torch.tensor(row.turns) for row in rows if row.turns is not None]
    if turns and known:
        batch["turn_ids"] = nn.utils.rnn.pad_sequence(known, batch_first=True)
    return batch


def text_tokens(
    tokenizer: Any, texts: Sequence[str], limit: int, side: Side, prompt: str | None = None
) -> list[Tokens]:
    """The tokens of each text, cut as `tokenized` says, not padded; one may have none."""
    frame, cutting = read_frame(tokenizer), cutting_of(tokenizer)
    room = cutting.room(frame, limit, side)
    openings = plain_tokens(tokenizer, [prompt, prompt.rstrip()])["input_ids"] if prompt else [[]]
    if len(openings[0]) >= room:
        what = f"The prompt {prompt!r} alone fills" if prompt else "Special tokens alone fill"
        raise ValueError(f"{what} the {limit} tokens kept of a text. Keep more tokens, or shorten the prompt.")
    encoded = plain_tokens(tokenizer, [prompt + text for text in texts] if prompt else list(texts))
    rows = []
    for place, ids in enumerate(encoded["input_ids"]):
        head, tail = len(ids), len(ids)
        if len(ids) > room:
            # The space that ends a prompt may be a token, or the beginning of the text's first one, which is to go.
            pairs = enumerate(zip(openings[0], ids, strict=False))
            shared = next((number for number, (own, found) in pairs if own != found), len(openings[0]))
            opening = max(len(openings[-1]), shared)
            head, tail = (room, len(ids)) if side == "right" else (opening, len(ids) - room + opening)
        kept = ids[:head] + ids[tail:]
        after = cutting.closing(frame.after, len(kept), room, side)
        first, own, last = frame.segments
        turns = None
        if encoded.encodings:
            turns = token_turns(texts[place], encoded.encodings[place].offsets, len(prompt or ""))
            turns = [*[0] * len(frame.before), *turns[:head], *turns[tail:], *[0] * len(after)]
        rows.append(
            Tokens(
                head,
                tail,
                [*frame.before, *kept, *after],
                [*first, *[own] * len(kept), *last[: len(after)]],
                [True] * len(frame.before) + [False] * len(kept) + [True] * len(after),
                turns,
            )
        )
    return rows


def token_turns(text: str, offsets: list[tuple[int, int]], before: int = 0) -> list[int]:
    """The turn of each token, 1, 2, ..., 0 for one in none: that which its last character is in, or its first.

    Args:
        text: A context. One that is no `CheckedText` is one turn.
        offsets: Where each token begins and ends.
        before: Characters of the prompt, which count in the offsets.
    """
    spans = getattr(text, "turns", None) or ((0, len(text)),)
    ends, found = [end for _, end in offsets], [0] * len(offsets)
    for number, (start, end) in enumerate(spans, start=1):
        first, stop = bisect_right(ends, before + start), bisect_right(ends, before + end)
        if stop < len(offsets) and before + start <= offsets[stop][0] < before + end:  # it ends in the separator
            stop += 1
        found[first:stop] = [number] * (stop - first)
    return found


def boundary_ids(tokenizer: Any, separator: str) -> list[int] | None:
    """Ids between which turns lie, of special tokens and the separator; `None` where that is not one token."""
    frame, texts = read_frame(tokenizer), [f"a{separator}a", separator, separator.strip() or separator]
    between, ids, stripped = plain_tokens(tokenizer, texts)["input_ids"]
    if len(ids) != 1 and not set(stripped) - set(tokenizer.all_special_ids):
        ids = stripped  # some write the spaces around a separator token as tokens, which are few beside a turn's
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or ids[0] not in between:
        return None
    return sorted({*frame.before, *frame.after, *ids})


def plain_tokens(tokenizer: Any, texts: list[str]) -> BatchEncoding:
    """All tokens of texts, without special ones. Changes nothing in the tokenizer, so threads may share it."""
    return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)


def padded(tokenizer: Any, features: dict[str, list[list[int]]], side: Side = "right") -> BatchEncoding:
    """Rows as tensors `(n, longest)` int64, with an attention mask, padded on the right whatever the tokenizer prefers.

    Few encoders count their positions from the first token that is no padding, so on the left it would move them.
    """
    options = {"padding": True, "padding_side": side, "return_attention_mask": True, "return_tensors": "pt"}
    return tokenizer.pad(features, **options, verbose=False)


def read_frame(tokenizer: Any) -> Frame:
    """The special tokens around one text, read off a short one."""
    if not tokenizer.is_fast:
        row = tokenizer.build_inputs_with_special_tokens([-1])
        place = row.index(-1)
        before, after = row[:place], row[place + 1 :]
        return Frame(before, after, ([0] * len(before), 0, [0] * len(after)))
    (encoding,) = plain_tokens(tokenizer, ["a"]).encodings
    row = tokenizer.backend_tokenizer.post_process(encoding, None, add_special_tokens=True)
    own = [place for place, special in enumerate(row.special_tokens_mask) if not special] or [len(row.ids)]
    start, end = own[0], own[-1] + 1
    segments = (row.type_ids[:start], row.type_ids[start] if start < len(row.ids) else 0, row.type_ids[end:])
    return Frame(row.ids[:start], row.ids[end:], segments)


def make_ready(tokenizer: Any) -> None:
    """Give a tokenizer what encoding needs: a padding token, and no orders of earlier calls to cut and pad.

    Those orders are kept in its backend, where they would be saved, and where another thread would meet them.

    Raises:
        ValueError: it has neither a padding token nor an end token to take its place.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a padding token nor an end token, so texts cannot be put into one batch. "
                "Add one with tokenizer.add_special_tokens({'pad_token': ...}) and save it beside the model."
            )
        tokenizer.pad_token = tokenizer.eos_token  # decoders come without one; the mask hides it anyway
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
