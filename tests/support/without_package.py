"""Running code in a process where this package does not exist."""

import os
import subprocess
import sys
from pathlib import Path

#: Put before code, has the import of poly_encoders fail.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("poly_encoders", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def run_without_package(code: str, *arguments: str, cache: Path) -> str:
    """Run `code` where importing poly_encoders fails, in the folder `cache`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)},
        cwd=cache,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
