"""Libraries that only an index needs."""

import importlib
from typing import Any

PACKAGES = {"lance": "pylance", "faiss": "faiss-cpu"}


def needs(module: str) -> Any:
    """Import it.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {PACKAGES[module]}: pip install 'poly-encoders[index]'.") from error
