# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How many tokens a model can read, and cutting texts to it on the right side.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import BatchEncoding, PreTrainedModel

# A tokenizer has one side at a time, and a server ranks in many threads. One lock for all of them, not one with each
# tokenizer, because a tokenizer with a lock could be neither copied nor pickled.
_SIDE_OF_ONE_THREAD = threading.RLock()

# transformers gives this many to a tokenizer that knows no limit.
_NO_LIMIT = 10**9


class NoTokensError(ValueError):
    """A text that a tokenizer makes nothing of, not even special tokens."""


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


@contextmanager
def truncating(tokenizer: Any, side: Literal["left", "right"]) -> Iterator[None]:
    """Let `tokenizer` cut long texts on this side within the block, while no other thread is in one."""
    with _SIDE_OF_ONE_THREAD:
        before = tokenizer.truncation_side
        tokenizer.truncation_side = side
        try:
            yield
        finally:
            tokenizer.truncation_side = before


def tokenized(
    tokenizer: Any, texts: list[str], limit: int, side: Literal["left", "right"], prompt: str | None = None
) -> tuple[list[str], BatchEncoding]:
    """Token ids and masks, `(n, longest)` int64 each, of texts that are cut on this side.

    Args:
        tokenizer: The tokenizer.
        texts: At least one.
        limit: Tokens kept of a text and its prompt, special tokens included.
        side: Where the rest is cut off. On the left the prompt stays, and the oldest of the text behind it goes.
        prompt: Put before each text.

    Returns:
        The texts that the tokenizer is given, prompt included, and what it makes of them.

    Raises:
        NoTokensError: one of the texts has no token.
        ValueError: the prompt leaves no room.
    """
    if prompt:
        room = room_beside_prompt(prompt, tokenizer, limit)
        texts = [prompt + (last_tokens(text, tokenizer, room) if side == "left" else text) for text in texts]
    with truncating(tokenizer, side):
        if _stands_in_for_parlai(tokenizer):
            encoding = _cut_as_parlai(tokenizer, texts, limit, side)
        else:
            encoding = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    empty = (encoding["attention_mask"].sum(dim=-1) == 0).nonzero().flatten().tolist()
    if empty:
        raise NoTokensError(f"Text {empty[0]} ({texts[empty[0]]!r}) has no token for this tokenizer; leave it out.")
    return texts, encoding


def cuts_as_parlai(tokenizer: Any) -> bool:
    """Whether this is the tokenizer of a checkpoint that was converted from ParlAI, loaded with whichever class.

    A text that is too long is cut on the right after its special tokens are there, and so loses the last one.
    """
    return getattr(tokenizer, "cuts_as_parlai", False) or _stands_in_for_parlai(tokenizer)


def _stands_in_for_parlai(tokenizer: Any) -> bool:
    """Whether a plain fast tokenizer was loaded in place of poly_encoders' own, which is not installed."""
    return not hasattr(tokenizer, "cuts_as_parlai") and "num_aliases" in getattr(tokenizer, "init_kwargs", {})


def _cut_as_parlai(tokenizer: Any, texts: list[str], limit: int, side: Literal["left", "right"]) -> BatchEncoding:
    # `tokenizers` skips an empty text's special tokens.
    readable = [text or " " for text in texts]
    extra = tokenizer.num_special_tokens_to_add() if side == "right" else 0
    rows = tokenizer(readable, truncation=True, max_length=limit + extra)
    cut = {name: [row[:limit] for row in values] for name, values in rows.items()}
    return tokenizer.pad(cut, padding=True, return_tensors="pt", verbose=False)


def room_beside_prompt(prompt: str, tokenizer: Any, limit: int) -> int:
    """Tokens left for a text after its prompt, of the `limit` kept in all.

    Raises:
        ValueError: none is left.
    """
    room = limit - len(tokenizer(prompt)["input_ids"])
    if room < 1:
        raise ValueError(f"The prompt {prompt!r} alone fills the {limit} tokens kept of a text. Shorten it.")
    return room


def last_tokens(text: str, tokenizer: Any, count: int) -> str:
    """The end of `text` that holds its last `count` tokens."""
    if len(text.encode()) < count:  # a token is at least a byte, not a character: byte-level ones split an emoji
        return text
    if not tokenizer.is_fast:
        raise ValueError("A prompt before long contexts needs a fast tokenizer, which knows where each token stands.")
    starts = [
        start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ]
    return text if len(starts) <= count else text[starts[-count] :]


def by_length(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Positions of texts in batches of texts of like length, the longest first, so that little padding is computed."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
