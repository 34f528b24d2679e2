# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A Poly-encoder as an Inference Endpoint, which looks for `EndpointHandler` in the handler.py of a model's folder:

    {"inputs": {"context": ["Hi!", "Any plans for tonight?"], "candidates": ["A film, perhaps.", "Forty-two."]}}
    [12.25, 3.5]

    {"inputs": {...}, "parameters": {"top_k": 1, "return_documents": true}}
    [{"index": 0, "score": 12.25, "text": "A film, perhaps."}]

    {"inputs": {"context": []}}
    {"error": {"type": "invalid_request", "message": "...", "status": 400}}

Endpoints import this file by itself, so it imports the standard library, torch and transformers only; the texts' way to
their scores is the pipeline that lies beside it.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import pipeline

logger = logging.getLogger(__name__)

_PARAMETERS = ("ranked", "return_documents", "top_k")
_MAX_CANDIDATES, _MAX_CHARACTERS = 10_000, 5_000_000  # of a request, unless the environment says otherwise


class EndpointHandler:
    """Scores candidates for contexts, request by request; safe to call from several threads.

    A request may have 10,000 candidates (`POLY_ENCODERS_MAX_CANDIDATES` in the environment) and 5,000,000 characters
    (`POLY_ENCODERS_MAX_CHARACTERS`). The model's own prompts are put before the texts.

    Args:
        path: The saved model, a local folder; the one this file is in when left out.

    Raises:
        OSError: files of the model are missing or incomplete.
        ValueError: a model of another kind, or a limit that is none.
    """

    def __init__(self, path: str = "") -> None:
        folder = Path(path) if path else Path(__file__).parent
        self.limits = {
            "candidates": _limit("POLY_ENCODERS_MAX_CANDIDATES", _MAX_CANDIDATES),
            "characters": _limit("POLY_ENCODERS_MAX_CHARACTERS", _MAX_CHARACTERS),
        }
        self.pipeline: Any = pipeline("sentence-similarity", model=str(folder), trust_remote_code=True)
        self.prompts = _read_prompts(folder / "config_sentence_transformers.json")

    def __call__(self, data: Any) -> list[float] | list[dict[str, Any]] | dict[str, Any]:
        """Answer one request.

        Args:
            data: The request's JSON: `inputs` as the pipeline takes it; without `inputs`, its keys are looked for in
                `data` itself. `parameters` may hold `ranked` (true for a ranking in place of scores), `top_k` and
                `return_documents` (true for the texts too), which both ask for a ranking.

        Returns:
            Scores in the order of the candidates; or the ranking, `{"index", "score", "text"}` each, best first; or
            `{"error": {"type", "message", "status"}}`, status 400 where the request is at fault, else 500.
        """
        try:
            texts, ranked, options = self._read(data)
        except (TypeError, ValueError) as error:
            return _error("invalid_request", str(error), 400)
        try:
            scores = self.pipeline.score_texts(**texts, **self.prompts)
            entries = self.pipeline.postprocess({"scores": scores, **texts}, options.get("top_k"))
        except self.pipeline.NoTokensError as error:
            return _error("invalid_request", str(error), 400)
        except Exception:
            # Nothing of it may reach the caller: it could name paths and settings of the server.
            logger.exception("The model failed on a request.")
            return _error("internal_error", "The model failed on this request; the endpoint's log says why.", 500)
        if not ranked:
            return scores.tolist()
        shown = ("index", "score", "text") if options.get("return_documents") else ("index", "score")
        return [{name: entry[name] for name in shown} for entry in entries]

    def _read(self, data: Any) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """The checked texts of a request, whether a ranking is asked for, and its options."""
        if not isinstance(data, Mapping):
            raise TypeError(f"A request is a JSON object with 'inputs', but this is a {type(data).__name__}.")
        options = data.get("parameters") or {}
        if not isinstance(options, Mapping):
            raise TypeError(f"'parameters' is a JSON object, but this is a {type(options).__name__}.")
        if unknown := sorted(map(str, options.keys() - set(_PARAMETERS))):
            raise ValueError(f"There is no parameter {unknown[0]!r:.60}; there are {', '.join(_PARAMETERS)}.")
        for name in ("ranked", "return_documents"):
            if not isinstance(options.get(name, False), bool):
                raise TypeError(f"The parameter {name!r} is true or false, but this is {options[name]!r:.60}.")
        wants_ranking = options.get("top_k") is not None or options.get("return_documents", False)
        if wants_ranking and not options.get("ranked", True):
            raise ValueError("'top_k' and 'return_documents' belong to a ranking: leave 'ranked' out, or make it true.")
        self.pipeline.check_options(top_k=options.get("top_k"))
        inputs = data["inputs"] if "inputs" in data else {key: data[key] for key in data if key != "parameters"}
        texts = self.pipeline.preprocess(inputs)
        self._check_size("candidates", len(texts["candidates"]))
        self._check_size("characters", len(texts["context"]) + sum(map(len, texts["candidates"])))
        return texts, options.get("ranked", wants_ranking), dict(options)

    def _check_size(self, what: str, size: int) -> None:
        if size > (limit := self.limits[what]):
            raise ValueError(
                f"The request has {size} {what}; this endpoint takes at most {limit}. Send several requests, or raise "
                f"POLY_ENCODERS_MAX_{what.upper()} where it runs."
            )


def _read_prompts(file: Path) -> dict[str, str | None]:
    """The prompts of both sides, by the pipeline's names, as sentence-transformers chooses them."""
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    names = {"context_prompt": ("query",), "candidate_prompt": ("document", "passage", "corpus")}
    return {
        option: prompts.get(next((name for name in own if prompts.get(name) is not None), default))
        for option, own in names.items()
    }


def _limit(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ValueError(f"{variable} is a whole number of at least 0, but it is set to {value!r}.")
    return int(value)


def _error(kind: str, message: str, status: int) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "status": status}}
