"""What went wrong with a push, said so that its reader knows what to do."""

from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The HTTP client's own error, of which the Hub's is a kind: huggingface_hub has changed clients before.
_CLIENT_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

#: What huggingface_hub raises when a request fails. It wraps a failed upload in a RuntimeError.
REQUEST_ERRORS = (OSError, RuntimeError, ValueError, _CLIENT_ERROR)


class PushError(OSError):
    """A model did not get to the Hub. The repository is as it was, unless the message says otherwise."""


def root_error(error: BaseException) -> BaseException:
    """The error that another one only wraps."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with; None if there was no answer."""
    response = getattr(root_error(error), "response", None)
    return getattr(response, "status_code", None)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may go well later: no connection, or a server that was overburdened."""
    error, status = root_error(error), status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, (OfflineModeIsEnabled, PermissionError, FileNotFoundError)):
        return False
    return isinstance(error, (ConnectionError, TimeoutError, _CLIENT_ERROR))


def explained(error: BaseException, repo_id: str, endpoint: str, token: str | bool | None) -> str:
    """One or two sentences: what happened to the push to `repo_id`, and what to do.

    Never holds the token.
    """
    error = root_error(error)
    status = status_of(error)
    if status is None:
        text = _without_answer(error, endpoint)
    else:
        text = _ANSWERS.get(status, _server if status >= 500 else _refused)(_Case(error, repo_id, endpoint, token))
    secret = token if isinstance(token, str) else get_token()
    return text.replace(secret, "<token>") if secret else text


class _Case:
    """What the sentences are made of."""

    def __init__(self, error: Any, repo_id: str, endpoint: str, token: str | bool | None) -> None:
        self.error = error
        self.repo_id = repo_id
        self.endpoint = endpoint
        self.has_token = isinstance(token, str) or (token is not False and get_token() is not None)
        self.said = " ".join(str(getattr(error, "server_message", None) or error).split()).rstrip(".")
        self.headers = error.response.headers


def _without_answer(error: BaseException, endpoint: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, and push again."
    if isinstance(error, LocalTokenNotFoundError):
        return _not_logged_in(endpoint)
    if isinstance(error, ValueError) and "metadata" in str(error):
        return f"The Hub refuses the model's card: {str(error).strip()} Mend the head of README.md, and push again."
    if is_passing(error):
        return (
            f"The connection to {endpoint} failed ({error or type(error).__name__}). Look whether the network is up, "
            "and push again."
        )
    return f"The upload failed: {error or type(error).__name__}."


def _not_logged_in(endpoint: str) -> str:
    return (
        f"You are not logged in to {endpoint}. Make a token that may write at {endpoint}/settings/tokens, and run "
        "`hf auth login` with it, or set HF_TOKEN to it."
    )


def _not_known(case: _Case) -> str:
    if not case.has_token:
        return _not_logged_in(case.endpoint)
    return (
        f"{case.endpoint} does not accept this token: it is misspelt, has expired, or was revoked. Make one that may "
        f"write at {case.endpoint}/settings/tokens, run `hf auth login` with it, and push again."
    )


def _not_allowed(case: _Case) -> str:
    if any(word in case.said.lower() for word in ("storage", "quota", "upgrade")):
        return _no_room(case)
    return (
        f"This token may not write to {case.repo_id} (the Hub says: {case.said}). `hf auth whoami` tells whose it is. "
        f"Use one with the role 'write' of a member of {case.repo_id.split('/')[0]}, push under a name of your own, or "
        "propose the change with create_pr=True."
    )


def _not_found(case: _Case) -> str:
    if isinstance(case.error, RevisionNotFoundError):
        return f"{case.repo_id} has no such branch. Name one that it has, or leave revision out."
    if isinstance(case.error, RepositoryNotFoundError):
        return (
            f"There is no {case.repo_id} that this token may see. Check the name, or whether the token may read "
            "private repositories of its owner."
        )
    return _refused(case)


def _changed_meanwhile(case: _Case) -> str:
    return f"Someone else changed {case.repo_id} during the push. Look at what is there now, and push again."


def _no_room(case: _Case) -> str:
    return (
        f"There is no room for this model (the Hub says: {case.said}). Free storage or extend the plan at "
        f"{case.endpoint}/settings/billing, or push to a public repository or another namespace."
    )


def _too_many(case: _Case) -> str:
    wait = case.headers.get("Retry-After")
    return f"The Hub had too many requests of yours. Push again in {f'{wait} seconds' if wait else 'some minutes'}."


def _server(case: _Case) -> str:
    return f"The Hub failed with status {status_of(case.error)} ({case.said}). Push again in some minutes."


def _refused(case: _Case) -> str:
    return f"The Hub refused the push to {case.repo_id} with status {status_of(case.error)}: {case.said}."


_ANSWERS = {
    401: _not_known,
    402: _no_room,
    403: _not_allowed,
    404: _not_found,
    412: _changed_meanwhile,
    413: _no_room,
    429: _too_many,
}
