"""An index on the Hub: a data set repository of its table, with a card."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from poly_encoders.index.derived_files import FOLDER
from poly_encoders.index.lance_store import TABLE, LanceStore
from poly_encoders.saving import replace_file

CARD = "README.md"


def push(store: LanceStore, repo_id: str, private: bool | None, token: Any) -> str:
    """Upload the store's folder in one commit, but for what is made from it anew; returns the address."""
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    card = store.path / CARD
    if not card.is_file():
        replace_file(card, card_text(store, repository.repo_id))
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
    # Who reads it has no use for a folder of this machine.
    model = settings.model if settings.model and not Path(settings.model).exists() else None
    fields = "\n".join(
        f"| `{name}` | {kept.field(name).type} |" for name in ("id", "text", *store.metadata_columns, "vector")
    )
    return template.format(
        repo_id=repo_id,
        count=f"{len(store):,}",
        model=model or "not on the Hub: see who pushed the index",
        loads=model or "MODEL",
        dim=settings.dim,
        dtype=settings.dtype,
        fields=fields,
    )
