"""A model's card on its way to the Hub: the id that its snippets load, and what somebody edited in the one there."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from poly_encoders.cards.data import PLACEHOLDER
from poly_encoders.cards.user_text import PARTS, Card, Part, with_user_text
from poly_encoders.model_files import CARD


def card_with_id(text: str, repo_id: str) -> str:
    """A saved card whose snippets load `repo_id`, where they knew no id before; a card that is a user's as it is."""
    notes = _notes(text)
    if notes is None or PLACEHOLDER not in text:
        return text
    return with_user_text(text.replace(PLACEHOLDER, repo_id), text, trained=False, notes={**notes, "id": repo_id})


def merged_card(text: str, on_hub: str | None) -> str:
    """A saved card, with what somebody edited by hand in the one on the Hub, which else it would replace.

    What was edited in both is as it is on the Hub.
    """
    notes = _notes(text)
    if notes is None or on_hub is None:
        return text
    ours, theirs = Card.parse(text), Card.parse(on_hub)
    if not any(theirs.is_users(part, name) for part in PARTS for name in _names(theirs, part)):
        return text
    merged = Card.parse(with_user_text(text, on_hub, trained=True, notes=notes))
    record: dict[str, Any] = merged.record or {}
    for part in PARTS:
        for name in _names(ours, part):
            if not ours.is_users(part, name) or theirs.is_users(part, name):
                continue
            known = ours.fingerprints(part)  # an edit made here is still to be found to be one
            record[part].pop(name, None)
            record[part] |= {name: known[name]} if name in known else {}
    return merged.render()


def _names(card: Card, part: Part) -> set[str]:
    return {*getattr(card, part), *card.fingerprints(part)}


def card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The card in a repository, if there is one and it is one of ours.

    Raises:
        Exception: one of `REQUEST_ERRORS`, where the Hub does not tell.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
            text = Path(file).read_text(encoding="utf-8")
    except LocalEntryNotFoundError as error:  # a kind of the next, but it says that the Hub did not answer
        raise error.__cause__ or error from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return None if _notes(text) is None else text


def _notes(text: str) -> dict[str, object] | None:
    """What a card of ours notes beside its text; None for another's."""
    try:
        record = Card.parse(text).record
    except ValueError:
        return None
    return None if record is None else {key: value for key, value in record.items() if key not in Card.__annotations__}
