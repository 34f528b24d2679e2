"""The code that is saved beside a model's weights, for where this package is not installed."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from poly_encoders.modeling import endpoint, handler


def add_hub_files(folder: str) -> None:
    """Copy handler.py, the entry of Inference Endpoints, and all that it needs into a model's folder.

    A Poly-encoder has them already, with its own code: transformers copies what that names.
    """
    code = endpoint.__file__
    for file in {handler.__file__, code, *get_relative_import_files(code)}:
        shutil.copyfile(file, Path(folder, Path(file).name))
