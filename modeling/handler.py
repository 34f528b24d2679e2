# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The entry of Inference Endpoints, which look for `EndpointHandler` in the file handler.py of a model's folder.

They import this file by itself, so it cannot import the files beside it as a package would; what it does is in
endpoint.py. It imports the standard library and transformers only.
"""

from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module


class EndpointHandler:
    """Answers requests to score candidates with the model in a folder; see `Endpoint` in endpoint.py.

    Args:
        path: The folder, a copy of the model's repository. The one this file is in when left out.
    """

    def __init__(self, path: str = "") -> None:
        folder = str(path) or str(Path(__file__).parent)
        self.endpoint = get_class_from_dynamic_module("endpoint.Endpoint", folder)(folder)

    def __call__(self, data: Any) -> Any:
        """Scores, a ranking, or an error, of one request; never raises for a bad one."""
        return self.endpoint(data)
