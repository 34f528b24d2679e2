"""A model's card on its way to the Hub: the id that its snippets load, and what somebody edited in the one there."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from poly_encoders.cards.data import PLACEHOLDER
from poly_encoders.cards.user_text import Card, with_user_text
from poly_encoders.model_files import CARD
from poly_encoders.push_errors import REQUEST_ERRORS


def card_with_id(text: str, repo_id: str) -> str:
    """A saved card whose snippets load `repo_id`, where they knew no id before; a card that is a user's as it is."""
    notes = _notes(text)
    if notes is None or PLACEHOLDER not in text:
        return text
    return with_user_text(text.replace(PLACEHOLDER, repo_id), text, trained=False, notes={**notes, "id": repo_id})


def card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The card in a repository, if it is one of ours; None also where it cannot be read."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
            text = Path(file).read_text(encoding="utf-8")
    except REQUEST_ERRORS:  # the push that follows will tell
        return None
    return None if _notes(text) is None else text


def _notes(text: str) -> dict[str, object] | None:
    """What a card of ours notes beside its text; None for another's."""
    try:
        record = Card.parse(text).record
    except ValueError:
        return None
    return None if record is None else {key: value for key, value in record.items() if key not in Card.__annotations__}
