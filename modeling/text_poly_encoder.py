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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn
from transformers import BatchEncoding, PreTrainedModel

Message: TypeAlias = Mapping[str, Any]
Context: TypeAlias = str | Sequence[str] | Sequence[Message]
Side: TypeAlias = Literal["left", "right"]

TURN_SEPARATOR = "\n"

# The two sides of an input: ours, the Hub's for the task sentence-similarity, and those of rerankers.
_NAMES = (("context", "candidates"), ("source_sentence", "sentences"), ("query", "texts"))
_INPUTS = " or ".join(f'{{"{context}": ..., "{candidates}": [...]}}' for context, candidates in _NAMES)
_FORMS = "a string, a list of turns (strings), or a list of chat messages ({'role': ..., 'content': ...})"
_NO_LIMIT = 10**9  # transformers gives more than this to a tokenizer that knows no limit


class NoTokensError(ValueError):
    """A text that a tokenizer makes nothing of, not even special tokens."""


class CheckedText(str):
    """A text that was found readable, and need not be looked at again."""

    __slots__ = ()


# --- texts -----------------------------------------------------------------------------------------------------------


def context_text(context: Any, separator: str = TURN_SEPARATOR, max_turns: int | None = None) -> CheckedText:
    """One context as one text.

    Args:
        context: A string, a sequence of turns, or a sequence of chat messages, oldest first.
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
    is_array = hasattr(context, "__array__") and getattr(context, "ndim", 0) > 0
    if isinstance(context, (bytes, bytearray)) or not (isinstance(context, Sequence) or is_array):
        raise TypeError(f"A context is {_FORMS}, but this one is {_described(context)}.")
    texts = [_turn_text(turn, place) for place, turn in enumerate(context) if not _is_without_content(turn)]
    if not texts:
        raise ValueError("The context is a conversation without a single turn. Pass at least one turn, or a string.")
    return CheckedText(separator.join(texts if max_turns is None else texts[-max_turns:]))


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
        raise TypeError(f"{what} must be a string, but it is {_described(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds a lone surrogate ({text[error.start]!r}) at character {error.start}, which is no text. "
            "Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    return CheckedText(text)


def is_single_context(inputs: Any) -> bool:
    """Whether `inputs` to a batch method is one context: a string, a chat message, or a list of chat messages."""
    if isinstance(inputs, (str, Mapping)):
        return True
    return isinstance(inputs, Sequence) and len(inputs) > 0 and isinstance(inputs[0], Mapping)


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


def _batch(inputs: Any) -> Iterable[Any]:
    unordered = isinstance(inputs, (str, bytes, Mapping, set, frozenset))
    if inputs is None or unordered or not isinstance(inputs, Iterable) or getattr(inputs, "ndim", 1) == 0:
        raise TypeError(f"Expected a list of texts, but got {_described(inputs)}. Put a single one into a list.")
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
        raise TypeError(f"Turn {place} of the context is {_described(turn)}; a context is {_FORMS}.")
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


def _described(value: Any) -> str:
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


_PLAIN = Cutting()


def cutting_of(tokenizer: Any) -> Cutting:
    """The tokenizer's rule for texts that are too long."""
    return getattr(tokenizer, "cutting", _PLAIN)


def tokenized(tokenizer: Any, texts: Sequence[str], limit: int, side: Side, prompt: str | None = None) -> BatchEncoding:
    """Token ids and masks, `(n, longest)` int64 each, of texts that are cut on this side; padding is on the right.

    Args:
        tokenizer: The tokenizer.
        texts: At least one.
        limit: Tokens kept of a text and its prompt, special tokens included.
        side: Where the rest is cut off. On the left the prompt stays, and the oldest of the text behind it goes.
        prompt: Put before each text.

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
    return padded(tokenizer, features)


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
    encoded = plain_tokens(tokenizer, [prompt + text for text in texts] if prompt else list(texts))["input_ids"]
    rows = []
    for ids in encoded:
        head, tail = len(ids), len(ids)
        if len(ids) > room:
            # The space that ends a prompt may be a token, or the beginning of the text's first one, which is to go.
            pairs = enumerate(zip(openings[0], ids, strict=False))
            shared = next((place for place, (own, found) in pairs if own != found), len(openings[0]))
            opening = max(len(openings[-1]), shared)
            head, tail = (room, len(ids)) if side == "right" else (opening, len(ids) - room + opening)
        kept = ids[:head] + ids[tail:]
        after = cutting.closing(frame.after, len(kept), room, side)
        first, own, last = frame.segments
        rows.append(
            Tokens(
                head,
                tail,
                [*frame.before, *kept, *after],
                [*first, *[own] * len(kept), *last[: len(after)]],
                [True] * len(frame.before) + [False] * len(kept) + [True] * len(after),
            )
        )
    return rows


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


def position_limit(encoder: PreTrainedModel) -> int | None:
    """The longest input the backbone has positions for, special tokens included; `None` where there is no limit.

    RoBERTa and its kin count positions from `padding_idx + 1`, so 514 rows of embeddings hold 512 positions.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def token_limit(tokenizer: Any, encoder: PreTrainedModel, wanted: int | None = None) -> int:
    """Tokens to keep of a text: the smallest of the wishes and limits, special tokens included.

    Raises:
        ValueError: what is left does not even hold the special tokens.
    """
    limits = [wanted, tokenizer.model_max_length, position_limit(encoder), _NO_LIMIT]
    limit = min(limit for limit in limits if limit is not None)
    special = tokenizer.num_special_tokens_to_add()
    if limit <= special:
        raise ValueError(
            f"At most {limit} tokens are kept of a text, but the tokenizer adds {special} special tokens, which leaves "
            "no room for the text. Raise max_context_length or max_candidate_length."
        )
    return int(limit)


def by_length(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Positions of texts in batches of texts of like length, the longest first, so that little padding is computed."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
