"""Libraries that only an index needs."""

import importlib
from typing import Any

EXTRAS = {"lance": "index", "faiss": "index", "pymilvus": "milvus", "ray": "ray"}
PACKAGES = {"lance": "pylance", "faiss": "faiss-cpu"}  # where they are called otherwise than their modules


def needs(module: str) -> Any:
    """Import it.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module, module)
        raise ImportError(f"This needs {package}: pip install 'poly-encoders[{EXTRAS[module]}]'.") from error
