"""An index on the Hub: a data set repository of its table, with a card."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from poly_encoders.cards.card_text import is_generated, signed
from poly_encoders.hub.pushing import clear_hub_errors
from poly_encoders.index.derived_files import FOLDER
from poly_encoders.index.lance_store import TABLE, LanceStore
from poly_encoders.saving import replace_file

CARD = "README.md"


def push(store: LanceStore, repo_id: str, private: bool | None, token: Any) -> str:
    """Upload the store's folder, but for what is made from it anew; returns the address.

    A card that somebody has edited stays.

    Raises:
        PushError: nobody is logged in, the token may not write there, or the connection failed; says what to do.
    """
    api, card = HfApi(token=token), store.path / CARD
    with clear_hub_errors(api, repo_id):
        repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if not card.is_file() or is_generated(card.read_text(encoding="utf-8")):
            replace_file(card, signed(card_text(store, repository.repo_id)))
        api.upload_folder(
            repo_id=repository.repo_id,
            repo_type="dataset",
            folder_path=store.path,
            allow_patterns=[CARD, f"{TABLE}/**"],
            delete_patterns=[f"{TABLE}/**"],  # files that a compaction has replaced
            commit_message=f"An index of {len(store):,} candidates",
        )
    return str(repository)


def download(repo_id: str, revision: str | None, token: Any) -> Path:
    """The folder of a pushed index, in the Hub's cache; Lance and what is derived may write beside it there."""
    found = snapshot_download(
        repo_id, repo_type="dataset", revision=revision, token=token, ignore_patterns=[f"{FOLDER}/**"]
    )
    return Path(found)


def card_text(store: LanceStore, repo_id: str) -> str:
    """The card of a pushed index."""
    template = files("poly_encoders").joinpath("hub_cards", "candidate_index.md").read_text(encoding="utf-8")
    settings, kept = store.settings, store.dataset.schema
    fields = "\n".join(
        f"| `{name}` | {kept.field(name).type} |" for name in ("id", "text", *store.metadata_columns, "vector")
    )
    return template.format(
        repo_id=repo_id,
        count=f"{len(store):,}",
        model=settings.model or "not on the Hub: see who pushed the index",
        loads=settings.model or "MODEL",
        dim=settings.dim,
        dtype=settings.dtype,
        fields=fields,
    )
