# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What an Inference Endpoint answers, with a Poly-encoder, a Bi-encoder or a Cross-encoder:

    {"inputs": {"context": ["Hi!", "Any plans for tonight?"], "candidates": ["A film, perhaps.", "Forty-two."]}}
    [12.25, 3.5]

    {"inputs": {...}, "parameters": {"top_k": 1, "return_documents": true}}
    [{"index": 0, "score": 12.25, "text": "A film, perhaps."}]

    {"inputs": {"context": []}}
    {"error": {"type": "invalid_request", "message": "...", "status": 400}}

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversations import candidate_texts, context_and_candidates
from .lengths import NoTokensError
from .ranking import best_first, checked_top_k, refuse_nonfinite
from .scorers import load_scorer

logger = logging.getLogger(__name__)

#: Limits of an endpoint, each with the environment variable that sets it.
CACHE_MB = ("POLY_ENCODERS_CACHE_MB", 256)
MAX_CANDIDATES = ("POLY_ENCODERS_MAX_CANDIDATES", 10_000)
MAX_CHARACTERS = ("POLY_ENCODERS_MAX_CHARACTERS", 5_000_000)

# What a kept vector takes beside its numbers and its text: the tensor and its storage, and its place in the cache.
ENTRY_BYTES = 512

_PARAMETERS = {"top_k", "ranked", "return_documents"}


class Endpoint:
    """Scores candidates for contexts, request by request; safe to call from several threads.

    Args:
        folder: The saved model, a local folder.
        cache_mb: Megabytes of candidate vectors kept for later requests, those used last; 0 keeps none, and a
            Cross-encoder has none to keep. The environment's `POLY_ENCODERS_CACHE_MB` when left out, else 256.
        max_candidates: Most candidates of a request. `POLY_ENCODERS_MAX_CANDIDATES` when left out, else 10,000.
        max_characters: Most characters of a request, its context and candidates together.
            `POLY_ENCODERS_MAX_CHARACTERS` when left out, else 5,000,000.

    Raises:
        OSError: files of the model are missing or incomplete.
        ValueError: a model of another kind, or a limit that is none.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache_mb: int | None = None,
        max_candidates: int | None = None,
        max_characters: int | None = None,
    ) -> None:
        self.max_candidates = _limit(max_candidates, *MAX_CANDIDATES)
        self.max_characters = _limit(max_characters, *MAX_CHARACTERS)
        self.cache = VectorCache(_limit(cache_mb, *CACHE_MB) * 2**20)
        self.scorer = load_scorer(folder)

    def __call__(self, data: Any) -> list[float] | list[dict[str, Any]] | dict[str, Any]:
        """Answer one request.

        Args:
            data: The request's JSON: `inputs` is a mapping of `context` and `candidates`, of `source_sentence` and
                `sentences`, or of `query` and `texts`; without `inputs`, these are looked for in `data` itself. A
                context is a text, a list of turns, or a list of chat messages, oldest first. `parameters` may hold
                `ranked` (true for a ranking in place of scores), `top_k` and `return_documents` (true for the texts
                too), which both ask for a ranking.

        Returns:
            Scores in the order of the candidates; or the ranking, `{"index", "score", "text"}` each, best first, equal
            scores in the order given; or `{"error": {"type", "message", "status"}}`, status 400 where the request is at
            fault and 500 where it is not.
        """
        try:
            request = self._read(data)
            scores = self._scores(request)
        except RequestError as error:
            return _error("invalid_request", str(error), 400)
        except Exception:
            # Nothing of it may reach the caller: it could name paths and settings of the server.
            logger.exception("The model failed on a request.")
            return _error("internal_error", "The model failed on this request; the endpoint's log says why.", 500)
        if not request.ranked:
            return scores.tolist()
        ranking = [{"index": index, "score": score} for index, score in best_first(scores, request.top_k)]
        if request.with_texts:
            return [entry | {"text": request.candidates[int(entry["index"])]} for entry in ranking]
        return ranking

    def _read(self, data: Any) -> "Request":
        if not isinstance(data, Mapping):
            raise RequestError(f"A request is a JSON object with 'inputs', but this is a {type(data).__name__}.")
        inputs = data["inputs"] if "inputs" in data else {key: data[key] for key in data if key != "parameters"}
        options = data.get("parameters") or {}
        try:
            context, candidates = context_and_candidates(inputs)
            if isinstance(candidates, (list, tuple)) and len(candidates) > self.max_candidates:
                raise RequestError(
                    f"The request has {len(candidates)} candidates; this endpoint takes at most {self.max_candidates}. "
                    "Send them in several requests, or raise POLY_ENCODERS_MAX_CANDIDATES where it runs."
                )
            texts = candidate_texts(candidates)
            request = Request(self.scorer.context_text(context), texts, *_read_options(options))
        except (TypeError, ValueError) as error:
            raise RequestError(str(error)) from error
        characters = len(request.context) + sum(map(len, texts))
        if characters > self.max_characters:
            raise RequestError(
                f"The request has {characters} characters; this endpoint takes at most {self.max_characters}. "
                "Shorten or split it, or raise POLY_ENCODERS_MAX_CHARACTERS where it runs."
            )
        return request

    def _scores(self, request: "Request") -> Tensor:
        if not request.candidates:
            return torch.empty(0)
        try:
            scores = self.scorer.scores(request.context, request.candidates, self.cache.vectors)
        except NoTokensError as error:
            raise RequestError(str(error)) from error
        refuse_nonfinite(scores)
        return scores.float().cpu()


class Request(NamedTuple):
    """A request, checked."""

    context: str
    candidates: list[str]
    ranked: bool
    top_k: int | None
    with_texts: bool


class RequestError(ValueError):
    """What is wrong with a request, in words that its sender may read."""


class VectorCache:
    """Vectors of the texts used last, within a number of bytes; safe to use from several threads.

    Args:
        max_bytes: Most bytes of vectors and texts held.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._vectors: OrderedDict[str, Tensor] = (
            OrderedDict()
        )  # text -> (dim,) on the CPU, the one used last at the end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._vectors)

    def vectors(self, texts: list[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
        """The vectors of texts, `(n, dim)` on the CPU.

        Args:
            texts: At least one.
            encode: Gives `(k, dim)` vectors of those k texts that are not held, each once.
        """
        wanted = dict.fromkeys(texts)
        with self._lock:
            found = {text: self._vectors[text] for text in wanted if text in self._vectors}
            for text in found:
                self._vectors.move_to_end(text)
        if missing := [text for text in wanted if text not in found]:
            # A copy of each, because a row would keep all of its batch in memory.
            found |= {text: row.clone() for text, row in zip(missing, encode(missing).cpu(), strict=True)}
            self._keep(missing, found)
        return torch.stack([found[text] for text in texts])

    def _keep(self, texts: list[str], vectors: dict[str, Tensor]) -> None:
        with self._lock:
            for text in texts:
                size = _held(text, vectors[text])
                if text in self._vectors or size > self.max_bytes:
                    continue
                self._vectors[text] = vectors[text]
                self.held_bytes += size
                while self.held_bytes > self.max_bytes:
                    self.held_bytes -= _held(*self._vectors.popitem(last=False))


def _held(text: str, vector: Tensor) -> int:
    return sys.getsizeof(text) + vector.nbytes + ENTRY_BYTES


def _read_options(options: Any) -> tuple[bool, int | None, bool]:
    """Whether a ranking is asked for, of how many, and with the texts."""
    if not isinstance(options, Mapping):
        raise RequestError(f"'parameters' is a JSON object, but this is a {type(options).__name__}.")
    if unknown := sorted(map(str, options.keys() - _PARAMETERS)):
        raise RequestError(f"There is no parameter {unknown[0]!r:.60}; there are {', '.join(sorted(_PARAMETERS))}.")
    for name in ("ranked", "return_documents"):
        if not isinstance(options.get(name, False), bool):
            raise RequestError(f"The parameter {name!r} is true or false, but this is {options[name]!r:.60}.")
    top_k, with_texts = checked_top_k(options.get("top_k")), options.get("return_documents", False)
    ranked = options.get("ranked", top_k is not None or with_texts)
    if not ranked and (top_k is not None or with_texts):
        raise RequestError("'top_k' and 'return_documents' belong to a ranking: leave 'ranked' out, or make it true.")
    return ranked, top_k, with_texts


def _limit(given: int | None, variable: str, default: int) -> int:
    value: Any = os.environ.get(variable, default) if given is None else given
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{variable} is a whole number of at least 0, but it is set to {value!r}.")
    return number


def _error(kind: str, message: str, status: int) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "status": status}}


__all__ = ["Endpoint"]
