"""Running code in a process where this package does not exist."""

import os
from pathlib import Path

import forks


def run_without_package(code: str, *arguments: str, cache: Path) -> str:
    """Run `code` where importing poly_encoders fails, in the folder `cache`; what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    return forks.run(["-c", "import sys\n" + code, *arguments], env=environment, cwd=cache, hide=True)
