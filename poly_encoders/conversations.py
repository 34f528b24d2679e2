"""Contexts in all their forms. The code is in `modeling/`, because it travels to the Hub with every checkpoint."""

from poly_encoders.modeling.conversations import (
    TURN_SEPARATOR,
    Context,
    Message,
    candidate_texts,
    checked_max_turns,
    checked_text,
    context_and_candidates,
    context_text,
    context_texts,
    is_single_context,
)

__all__ = [
    "TURN_SEPARATOR",
    "Context",
    "Message",
    "candidate_texts",
    "checked_max_turns",
    "checked_text",
    "context_and_candidates",
    "context_text",
    "context_texts",
    "is_single_context",
]
