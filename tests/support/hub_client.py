"""Running clients against the stand-in Hub: in another process with an empty cache, or in this one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import huggingface_hub.constants

import forks
from hub_server import Hub


def run_python(
    code: str, *arguments: object, hub: Hub, token: str | None = "hf_alice", hide_package: bool = False
) -> str:
    """Run `code` in a process with an empty cache that takes `hub` for the Hub; what it printed.

    Args:
        code: Python, with `arguments` in `sys.argv[1:]`.
        token: What the process is logged in with; None for nobody.
        hide_package: Have the import of poly_encoders fail, as where it is not installed.
    """
    environment = hub.environment(token)
    home = Path(environment["HF_HOME"])
    return forks.run(["-c", f"import sys\n{code}", *arguments], env=environment, cwd=home, hide=hide_package)


@contextmanager
def logged_in(hub: Hub, token: str | None = "hf_alice") -> Iterator[None]:
    """Have this process take `hub` for the Hub: far quicker than another process, and enough for pushing.

    Loading is another matter: some of what transformers knows of the Hub stays as it was at import.
    """
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(hub.root / "cache"),
        "HF_TOKEN_PATH": str(hub.root / "no-token"),
    }
    with mock.patch.multiple(huggingface_hub.constants, **settings), mock.patch.dict(os.environ):
        os.environ.pop("HUGGING_FACE_HUB_TOKEN", None)
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        yield
