"""Cutting texts to what a model can read. The code is in `modeling/`, because it travels to the Hub."""

from poly_encoders.modeling.lengths import (
    NoTokensError,
    by_length,
    cuts_as_parlai,
    last_tokens,
    position_limit,
    room_beside_prompt,
    token_limit,
    tokenized,
    truncating,
)

__all__ = [
    "NoTokensError",
    "by_length",
    "cuts_as_parlai",
    "last_tokens",
    "position_limit",
    "room_beside_prompt",
    "token_limit",
    "tokenized",
    "truncating",
]
