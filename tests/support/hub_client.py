"""Running clients against the stand-in Hub: in a fresh process with an empty cache, or in this one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import huggingface_hub.constants

from hub_server import Hub
from without_package import HIDE


def run_python(
    code: str,
    *arguments: str,
    hub: Hub,
    token: str | None = "hf_alice",
    home: Path | None = None,
    hide_package: bool = False,
) -> str:
    """Run `code` in a fresh process that takes `hub` for the Hub; what it printed.

    Args:
        code: Python, with `arguments` in `sys.argv[1:]`.
        token: What the process is logged in with; None for nobody.
        home: Folder of its cache; a new, empty one when left out.
        hide_package: Have the import of poly_encoders fail, as where it is not installed.
    """
    environment = hub.environment(token, home)
    done = subprocess.run(
        [sys.executable, "-c", (HIDE if hide_package else "import sys\n") + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=environment["HF_HOME"],
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    return done.stdout


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
