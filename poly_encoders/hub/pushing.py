"""Pushing a model to the Hub: one complete folder in one commit, or nothing.

The large files go first, to the Hub's storage, where they change nothing that anyone sees; then a single commit puts
all files in place, and takes away what an earlier model left behind. So what fails leaves the files on the Hub as they
were, and the same call can be repeated. Errors are huggingface_hub's own, but for the four that people meet.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from poly_encoders.cards import CARD
from poly_encoders.cards.card_text import is_generated, with_id
from poly_encoders.hub.model_files import is_code, model_files, stale_files
from poly_encoders.saving import is_our_code

logger = logging.getLogger(__name__)

# The HTTP client's own error, of which the Hub's is a kind: huggingface_hub has changed clients before.
_CLIENT_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


class PushError(OSError):
    """A model did not get to the Hub; the message says what to do."""


class HubPushing:
    """`push_to_hub` of a sentence-transformers model; mixed in before it."""

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save this model and upload all of it in one commit, making the repository if there is none.

        Args:
            repo_id: `organisation/name`, or `name` for one of your own.
            token, commit_message, local_model_path, train_datasets: As upstream's.
            private: Make a new repository private, and refuse one that is public; your default when left out.
            safe_serialization: Must stay True: weights are saved as safetensors only.
            exist_ok: Replace the model in a repository that has files already.
            replace_model_card: Replace also a card that a person wrote or edited.
            revision: Branch to push to, made where it is missing; also `refs/pr/1`.
            create_pr: Propose the change as a pull request, which needs no right to write.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            PushError: no token, no right, exists already, or no network.
            HfHubHTTPError: another answer of the Hub's.
            ValueError: an argument that makes no sense, or no complete model at `local_model_path`.
        """
        model: Any = self
        if not safe_serialization:
            raise ValueError("Models are pushed as safetensors only: leave safe_serialization at True.")
        options: dict[str, Any] = {
            "token": token,
            "private": private,
            "exist_ok": exist_ok,
            "replace_model_card": replace_model_card,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message or f"Add new {type(self).__name__} model",
        }
        if local_model_path is not None:
            commit = push_folder(local_model_path, repo_id, **options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                model.save(folder)
                files = {
                    file.relative_to(folder).as_posix(): file for file in Path(folder).rglob("*") if file.is_file()
                }
                commit = _push(files, repo_id, **options)
            model.model_card_data.set_model_id(commit.repo_url.repo_id)
        return commit.pr_url or commit.commit_url


def push_folder(folder: str | Path, repo_id: str, *, nested: Sequence[str] = (), **options: Any) -> CommitInfo:
    """Upload the saved model in `folder`, and nothing else that may lie there.

    Arguments and errors as of `push_to_hub`; `nested` are names of folders within that hold a model of their own which
    goes with it.
    """
    return _push(model_files(folder, nested), repo_id, nested=nested, **options)


def check_push(repo_id: str, *, token: str | None = None, private: bool | None = None, create_pr: bool = False) -> str:
    """Find out before a long run whether its model can be pushed at its end; the full id. Changes nothing.

    Raises:
        PushError, HfHubHTTPError, ValueError: it cannot.
    """
    api = HfApi(token=token)
    with clear_hub_errors(api, repo_id):
        user = api.whoami()
        repo_id, info = _repository(api, repo_id, private)
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        owners = {user["name"], *(group["name"] for group in user.get("orgs", []))}
        # Of a fine-grained token nobody but the Hub knows where it may write.
        may_write = repo_id.split("/")[0] in owners or role == "fineGrained" or (create_pr and info is not None)
        if role == "read" or not may_write:
            raise PushError(_no_right(repo_id, "it may only read" if role == "read" else f"it is {user['name']}'s"))
    return repo_id


def _push(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    exist_ok: bool = False,
    replace_model_card: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add new model",
    nested: Sequence[str] = (),
) -> CommitInfo:
    """Put files, by their path in it, into a repository."""
    api = HfApi(token=token)
    with clear_hub_errors(api, repo_id):
        repo_id, info = _repository(api, repo_id, private)
        if info is None:
            api.create_repo(repo_id, private=private)
        elif not (exist_ok or create_pr) and {file.rfilename for file in info.siblings or []} - {".gitattributes"}:
            raise PushError(
                f"{repo_id} exists already. Replace the model in it with exist_ok=True (on the command line: "
                "--exist-ok), propose the change with create_pr=True, or choose another name."
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = str(api.model_info(repo_id, revision=revision).sha)
        there = api.list_repo_files(repo_id, revision=head)

        @cache
        def read(name: str) -> str:
            file = api.hf_hub_download(repo_id, name, revision=head)
            return Path(file).read_text(encoding="utf-8", errors="replace")

        def stays(name: str) -> bool:
            if name == CARD:
                return not replace_model_card and not is_generated(read(name))
            return is_code(name) and is_our_code(files[name].read_text("utf-8")) and not is_our_code(read(name))

        stale = stale_files(there, files, lambda name: is_our_code(read(name)), nested)
        operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in stale]
        for name, file in files.items():
            if name in there and stays(name):
                logger.warning("%s in %s was written or edited by hand, so it stays as it is.", name, repo_id)
            elif name == CARD:
                operations.append(CommitOperationAdd(name, with_id(file.read_text("utf-8"), repo_id).encode()))
            else:
                operations.append(CommitOperationAdd(name, file))
        # Unlike upload_folder, which may make several where files go by Xet, this makes one commit.
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,  # what somebody else commits meanwhile is never overwritten
        )


def _repository(api: HfApi, repo_id: str, private: bool | None) -> tuple[str, Any]:
    """The full id of a repository, and what is known of it; `None` where there is none that the token may see."""
    repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return repo_id, None
    if private and not info.private:
        raise PushError(
            f"{repo_id} exists already and is public, which pushing does not change. Make it private in its settings, "
            "choose another name, or leave private out."
        )
    return repo_id, info


def _no_right(repo_id: str, why: str) -> str:
    return (
        f"This token may not write to {repo_id} ({why}). `hf auth whoami` tells whose it is. Use one with the role "
        f"'write' of a member of {repo_id.split('/')[0]}, push under a name of your own, or propose the change with "
        "create_pr=True."
    )


@contextmanager
def clear_hub_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """Have the errors that people meet say what to do. The token is in none of them."""
    try:
        yield
    except PushError:
        raise
    except (OSError, RuntimeError, _CLIENT_ERROR) as error:
        cause: Any = error
        while isinstance(cause, (RuntimeError, LocalEntryNotFoundError)) and cause.__cause__ is not None:
            cause = cause.__cause__  # a failed upload or download, which is only wrapped
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401 or isinstance(cause, LocalTokenNotFoundError):
            raise PushError(
                f"You are not logged in to {api.endpoint}, or with a token that is misspelt, expired or revoked. Make "
                f"one that may write at {api.endpoint}/settings/tokens, and run `hf auth login` with it, or set "
                "HF_TOKEN to it."
            ) from error
        if status == 403:
            said = getattr(cause, "server_message", None) or "status 403"
            raise PushError(_no_right(repo_id, f"the Hub says: {said}")) from error
        if status is None and isinstance(cause, (ConnectionError, TimeoutError, _CLIENT_ERROR)):
            raise PushError(
                f"The connection to {api.endpoint} failed ({cause or type(cause).__name__}). Look whether the network "
                "is up, and push again: large files that have arrived are not sent twice."
            ) from error
        raise
