"""How many tokens a model can read, and cutting texts to it on the right side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

# A tokenizer has one side at a time, and a server ranks in many threads. One lock for all of them, not one with each
# tokenizer, because a tokenizer with a lock could be neither copied nor pickled.
_SIDE_OF_ONE_THREAD = threading.RLock()

# transformers gives this many to a tokenizer that knows no limit.
_NO_LIMIT = 10**9


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
