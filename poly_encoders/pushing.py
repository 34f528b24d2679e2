"""Pushing a model to the Hub: one complete folder in one commit, or nothing.

The large files go first, to the Hub's storage, where they change nothing that anyone sees; then a single commit puts
all files in place, and takes away what an earlier model left behind. So a push that fails, wherever it does, leaves the
repository as it was. A push that is tried again sends no large file that has arrived: the storage knows each by its
hash, and saving a model twice gives the same bytes.
"""

import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, but lazily

from poly_encoders.model_files import CARD, model_files, stale_files
from poly_encoders.push_errors import REQUEST_ERRORS, PushError, explained, is_passing, root_error, status_of
from poly_encoders.pushed_cards import card_on_hub, card_with_id, merged_card

logger = logging.getLogger(__name__)

# Seconds before a commit is asked for again whose answer was lost.
COMMIT_WAITS = (1.0, 5.0)
_EMPTY = {".gitattributes"}  # the files of a repository that was just made


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

        Arguments as upstream's. A push that fails leaves the repository as it was and can be tried again: large files
        that have arrived are not sent twice. Pushing what is there already makes no commit.

        Args:
            repo_id: `organisation/name`, or `name` for one of your own.
            token: What to log in with; the one of `hf auth login` or of HF_TOKEN when left out.
            private: Whether a new repository is private; your default when left out. With True, a public one that
                exists is refused.
            safe_serialization: Must stay True: weights are saved as safetensors only.
            commit_message: First line of the commit; "Add new PolyEncoder model" or the like when left out.
            local_model_path: A saved model to push in place of this one.
            exist_ok: Replace the model in a repository that has files already.
            replace_model_card: Write a card that is there anew, but for what was edited in it by hand; else it stays.
            train_datasets: Ids of the training data for the card, as in `save`.
            revision: Branch to push to, made where it is missing; the main one when left out. Also `refs/pr/1`.
            create_pr: Propose the change as a pull request, which needs no right to write.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            PushError: it did not arrive; the message says why and what to do.
            ValueError: an argument that makes no sense, or no complete model at `local_model_path`.
        """
        model: Any = self
        if not safe_serialization:
            raise ValueError("Models are pushed as safetensors only: leave safe_serialization at True.")
        kind = type(self).__name__
        options: dict[str, Any] = {
            "token": token,
            "private": private,
            "exist_ok": exist_ok,
            "replace_model_card": replace_model_card,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message or f"Add new {kind} model",
            "commit_description": f"A {kind}, pushed by poly-encoders." if create_pr else None,
        }
        if local_model_path is not None:
            return _address(push_folder(local_model_path, repo_id, **options))
        repo_id = full_repo_id(repo_id, token)
        with _named(model, repo_id), tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "model")
            if replace_model_card and (card := _card_there(repo_id, token, revision)):
                folder.mkdir()
                (folder / CARD).write_text(card, encoding="utf-8")  # what was edited by hand goes into the new one
            model.save(str(folder), model_name=repo_id, train_datasets=train_datasets)
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            return _address(push_files(files, repo_id, **options))


def push_folder(folder: str | Path, repo_id: str, *, nested: Sequence[str] = (), **options: Any) -> CommitInfo:
    """Upload the saved model in `folder`, and nothing else that may lie there; options as for `push_files`.

    Args:
        folder: Where the model was saved, such as the output folder of a training run.
        repo_id: `organisation/name`, or `name` for one of your own.
        nested: Names of folders within that hold a model of their own which goes with it.
        **options: Those of `push_files`.

    Raises:
        ValueError: there is no complete model.
        PushError: as `push_files`.
    """
    files: dict[str, Path | bytes] = dict(model_files(folder, nested))
    repo_id = full_repo_id(repo_id, options.get("token"))
    if CARD in files:
        card = card_with_id(Path(folder, CARD).read_text(encoding="utf-8"), repo_id)
        if options.get("replace_model_card"):
            card = merged_card(card, _card_there(repo_id, options.get("token"), options.get("revision")))
        files[CARD] = card.encode()
    try:
        return push_files(files, repo_id, nested=nested, **options)
    except PushError as error:
        raise PushError(f"{error} The model is still in {folder}.") from error.__cause__


def _card_there(repo_id: str, token: str | bool | None, revision: str | None) -> str | None:
    target = _Target(repo_id, token, revision, False)
    with target.clear_errors():
        return card_on_hub(target.api, repo_id, revision)


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    exist_ok: bool = False,
    replace_model_card: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add new model",
    commit_description: str | None = None,
    nested: Sequence[str] = (),
) -> CommitInfo:
    """Put a model into a repository, in one commit.

    Args:
        files: Local file, or content, by path in the repository.
        repo_id: `organisation/name`, or `name` for one of your own.
        nested: Names of folders that hold a model of their own.
        token, private, exist_ok, replace_model_card, revision, create_pr, commit_message: As in `push_to_hub`.
        commit_description: Text of the commit, or of the pull request.

    Raises:
        PushError, ValueError: as `push_to_hub`.
    """
    target = _Target(repo_id, token, revision, create_pr)
    try:
        with target.clear_errors():
            target.prepare(private, exist_ok)
            return target.commit(files, replace_model_card, commit_message, commit_description, nested)
    except PushError as error:
        if error.__cause__ is None:  # refused here, before anything was done
            raise
        raise PushError(f"{error} {target.withdraw(error.__cause__)}") from error.__cause__


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """`repo_id` with the name of whom the token belongs to before it, if it has no namespace.

    Raises:
        ValueError: it is no id.
        PushError: the Hub does not say who that is.
    """
    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    target = _Target(repo_id, token, None, False)
    with target.clear_errors():
        return f"{target.api.whoami()['name']}/{repo_id}"


def check_push(
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Find out before a long run whether its model can be pushed at its end; the full id. Changes nothing.

    Raises:
        PushError, ValueError: it cannot.
    """
    target = _Target(repo_id, token, revision, create_pr)
    with target.clear_errors():
        user = target.api.whoami()
        namespace, _, name = repo_id.rpartition("/")
        target.repo_id = f"{namespace or user['name']}/{name}"
        access = user.get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise PushError(
                f"This token may only read. Make one with the role 'write' at {target.api.endpoint}/settings/tokens, "
                "and run `hf auth login` with it."
            )
        try:
            info = target.api.model_info(target.repo_id)
        except RepositoryNotFoundError:
            info = None
        owners = {user["name"], *(group["name"] for group in user.get("orgs", []))}
        # Of a fine-grained token nobody but the Hub knows where it may write.
        may_write = target.repo_id.split("/")[0] in owners or access.get("role") == "fineGrained"
        if not may_write and (info is None or not create_pr):
            raise PushError(
                f"{user['name']}, whose token this is, does not belong to {namespace}. Push under a name of your own, "
                "ask to join, or propose a change to a repository that you can see with create_pr."
            )
        if info is not None:
            target.check_visibility(info, private)
            target.check_revision()
    return target.repo_id


class _Target:
    """The repository and the branch of one push."""

    def __init__(self, repo_id: str, token: str | bool | None, revision: str | None, create_pr: bool) -> None:
        validate_repo_id(repo_id)
        if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
            raise ValueError(f"revision={revision!r} is a commit, to which nothing can be added. Name a branch.")
        self.api = HfApi(token=token)
        self.repo_id = repo_id
        self.token = token
        self.revision = revision
        self.create_pr = create_pr
        self.head = self.base = ""  # the commit that the new one follows; the one that was there at first
        self._made_repository = False
        self._made_branch = False
        self._lost_answer = False  # a commit was asked for, and nobody knows what became of it

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Have what huggingface_hub raises say what to do."""
        try:
            yield
        except PushError:
            raise
        except REQUEST_ERRORS as error:
            if isinstance(error, ValueError) and status_of(error) is None and "metadata" not in str(error):
                raise  # of an argument, not of an answer
            raise PushError(explained(error, self.repo_id, self.api.endpoint, self.token)) from error

    def prepare(self, private: bool | None, exist_ok: bool) -> None:
        """See that repository and branch are there, making what is missing."""
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            self.repo_id = self.api.create_repo(self.repo_id, private=private).repo_id
            self._made_repository = True
        else:
            self.repo_id = info.id
            self.check_visibility(info, private)
            has_files = any(file.rfilename not in _EMPTY for file in info.siblings or [])
            if has_files and not exist_ok and not self.create_pr:
                raise PushError(
                    f"{self.repo_id} exists already. Replace the model in it with exist_ok=True (on the command line: "
                    "--exist-ok), propose the change with create_pr=True, or choose another name."
                )
        if self.check_revision():
            self.api.create_branch(self.repo_id, branch=str(self.revision))
            self._made_branch = True
        self.head = self.base = self._newest()

    def check_visibility(self, info: Any, private: bool | None) -> None:
        """Refuse to publish what is to be private."""
        if private and not info.private:
            raise PushError(
                f"{self.repo_id} exists and is public, which pushing does not change. Make it private in its settings, "
                "choose another name, or leave private out."
            )

    def check_revision(self) -> bool:
        """Whether the branch is still to be made.

        Raises:
            ValueError: a tag has this name.
        """
        if self.revision is None or self.create_pr or self.revision.startswith("refs/"):
            return False
        refs = self.api.list_repo_refs(self.repo_id)
        if any(tag.name == self.revision for tag in refs.tags):
            raise ValueError(
                f"revision={self.revision!r} is a tag of {self.repo_id}, which stays where it is. Push to a branch, "
                "and tag the new commit."
            )
        return all(branch.name != self.revision for branch in refs.branches)

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        replace_model_card: bool,
        message: str,
        description: str | None,
        nested: Sequence[str],
    ) -> CommitInfo:
        """Upload what is new, then commit. The card is checked first, before anything is sent."""
        waits = [] if self.create_pr else list(COMMIT_WAITS)
        while True:
            there = self.api.list_repo_files(self.repo_id, revision=self.head)
            keep_card = CARD in there and not replace_model_card
            # Made anew each time: huggingface_hub notes in them what has become of them.
            operations: list[Any] = [
                CommitOperationAdd(name, content) for name, content in files.items() if not (keep_card and name == CARD)
            ]
            operations += [CommitOperationDelete(name, is_folder=False) for name in stale_files(there, files, nested)]
            try:
                # Unlike upload_folder, which may make several where files go by Xet, this makes one commit.
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=self.head,
                )
            except REQUEST_ERRORS as error:
                self._lost_answer = _is_lost_answer(error)
                if not self._lost_answer or not waits:
                    raise
                # Perhaps it was made, and only its answer was lost. If so, the next one finds nothing to do.
                logger.warning("The Hub did not answer the commit (%s). Trying again.", error)
                time.sleep(waits.pop(0))
                self.head = self._newest()

    def withdraw(self, error: BaseException) -> str:
        """Take away what this push made and did not fill, as far as the Hub can be reached; what is left, in words."""
        place = f"{self.api.endpoint}/{self.repo_id}"
        if self._lost_answer and self.create_pr:
            return f"A pull request may have been opened all the same: see {place}/discussions before pushing again."
        passing = is_passing(error)
        with suppress(*REQUEST_ERRORS):
            # One whose upload only broke off stays: its storage has what has arrived.
            if self._made_repository and not (passing or self._lost_answer) and self._is_empty():
                self.api.delete_repo(self.repo_id)
                return "Nothing was left on the Hub."
            if self._made_branch and self._newest() == self.base:
                self.api.delete_branch(self.repo_id, branch=str(self.revision))
        if self._lost_answer:
            return f"The commit may have been made all the same: see {place}. Pushing again does no harm."
        resumed = " Large files that have arrived are not sent again." if passing else ""
        if self._made_repository:
            return f"{self.repo_id} was made and is still empty; the next push fills it.{resumed}"
        return f"Nothing in the repository has changed.{resumed}"

    def _newest(self) -> str:
        """The last commit of the branch."""
        return str(self.api.model_info(self.repo_id, revision=self.revision).sha)

    def _is_empty(self) -> bool:
        return set(self.api.list_repo_files(self.repo_id)) <= _EMPTY


def _is_lost_answer(error: BaseException) -> bool:
    """Whether a commit was asked for and nobody knows what became of it."""
    error = root_error(error)
    status = status_of(error)
    if not is_passing(error) or status == 429:
        return False
    try:
        request: Any = error.response.request if isinstance(error, HfHubHTTPError) else error.request  # type: ignore[attr-defined]
        return "/commit/" in str(request.url)
    except (AttributeError, RuntimeError):  # of other errors, or none known
        return False


@contextmanager
def _named(model: Any, repo_id: str) -> Iterator[None]:
    """Give the model's card the id, and take it back if the push fails."""
    before = model.model_card_data.model_id
    model.model_card_data.set_model_id(repo_id)
    try:
        yield
    except BaseException:
        model.model_card_data.model_id = before
        raise


def _address(commit: CommitInfo) -> str:
    return commit.pr_url or commit.commit_url
