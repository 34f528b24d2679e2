# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Saved models of the three kinds, scoring as poly_encoders' own classes do, with transformers and torch alone.

A Poly-encoder goes through its pipeline. Of a Bi-encoder and a Cross-encoder this reads the folder that
sentence-transformers wrote: which modules there are, for which side, and with which settings.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import pipeline

from .conversations import TURN_SEPARATOR, context_text
from .lengths import by_length, token_limit, tokenized
from .pairs import PairTokenizer, pair_limits, pair_room
from .sentence_modules import (
    Entry,
    SentenceModule,
    TextEncoder,
    activation,
    load_module,
    read_entries,
    read_json,
    read_sides,
)

BATCH_SIZE = 32

#: Gives the vectors of candidates, `(n, dim)`, kept or, by the function that is handed to it, made.
Vectors: TypeAlias = Callable[[list[str], Callable[[list[str]], Tensor]], Tensor]


class Scorer(ABC):
    """Scores candidates for a context.

    Args:
        folder: The saved model.
        settings: What its config_sentence_transformers.json says.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        ours = settings.get("poly_encoders") or {}
        self.separator: str = ours.get("turn_separator", TURN_SEPARATOR)
        self.max_turns: int | None = ours.get("max_turns")
        # By the names under which sentence-transformers looks for the prompt of each side.
        self.context_prompt = _prompt(settings, "query")
        self.candidate_prompt = _prompt(settings, "document", "passage", "corpus")

    def context_text(self, context: Any) -> str:
        """A context in any of its forms as the text that the model reads.

        Raises:
            TypeError, ValueError: it is none.
        """
        return context_text(context, self.separator, self.max_turns)

    @abstractmethod
    def scores(self, context: str, candidates: list[str], vectors: Vectors) -> Tensor:
        """`(n,)` scores of n candidates, at least one.

        Args:
            context: As `context_text` gives it.
            candidates: The texts to choose from.
            vectors: Where the candidates' vectors come from; of no use to a Cross-encoder.

        Raises:
            NoTokensError: a text has no token.
        """


class PolyScorer(Scorer):
    """A Poly-encoder, through the pipeline that travels with it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.pipeline: Any = pipeline("sentence-similarity", model=str(folder), trust_remote_code=True)
        config = self.pipeline.model.config
        self.separator, self.max_turns = config.turn_separator, config.max_turns

    def scores(self, context: str, candidates: list[str], vectors: Vectors) -> Tensor:
        pipe = self.pipeline
        contexts = pipe.encode_contexts([context], prompt=self.context_prompt)
        found = vectors(candidates, lambda texts: pipe.encode_candidates(texts, prompt=self.candidate_prompt))
        return pipe.score(contexts, found.to(contexts.device))[0]


class BiScorer(Scorer):
    """A Bi-encoder, of one encoder or two."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.similarity: str = settings.get("similarity_fn_name") or "cosine"  # as sentence-transformers takes it
        if self.similarity not in ("dot", "cosine"):
            raise ValueError(f"The model scores by {self.similarity!r}; known here are 'dot' and 'cosine'.")
        sides = read_sides(folder)
        names = {_encoder_folder(entries) for entries in sides.values()}  # one for both sides is loaded once
        encoders = {name: TextEncoder(folder / name) for name in names}
        self.query, self.document = (
            _Side(folder, sides[side], encoders, prompt, length)
            for side, prompt, length in (
                ("query", self.context_prompt, "query_length"),
                ("document", self.candidate_prompt, "document_length"),
            )
        )

    def scores(self, context: str, candidates: list[str], vectors: Vectors) -> Tensor:
        contexts = self.query.encode([context])
        found = vectors(candidates, self.document.encode).to(contexts.device)
        if self.similarity == "cosine":
            contexts, found = normalize(contexts, dim=-1), normalize(found, dim=-1)
        return found @ contexts[0]


class _Side:
    """The encoder of one side and what comes after it."""

    def __init__(
        self,
        folder: Path,
        entries: list[Entry],
        encoders: dict[str, TextEncoder],
        prompt: str | None,
        length: str,
    ) -> None:
        self.encoder = encoders[_encoder_folder(entries)]
        self.modules = _load_modules(folder, entries[1:], self.encoder, prompt)
        self.prompt = prompt
        self.limit = token_limit(self.encoder.tokenizer, self.encoder.model, self.encoder.settings.get(length))

    def encode(self, texts: list[str]) -> Tensor:
        """`(n, dim)` vectors of n texts, at least one."""
        tokenizer = self.encoder.tokenizer
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for places in by_length(texts, BATCH_SIZE):
            rows = [texts[place] for place in places]
            _, encoding = tokenized(tokenizer, rows, self.limit, tokenizer.truncation_side, self.prompt)
            features = _through(self.encoder, self.modules, dict(encoding))
            for place, vector in zip(places, features["sentence_embedding"], strict=True):
                vectors[place] = vector
        return torch.stack(vectors)


class CrossScorer(Scorer):
    """A Cross-encoder: a sequence classifier, or an encoder with modules that make a score of its hidden states."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        entries = read_entries(folder)
        self.encoder = TextEncoder(folder / _encoder_folder(entries), classifier=len(entries) == 1)
        if self.encoder.classifier and self.encoder.model.config.num_labels != 1:
            raise ValueError(
                f"The model gives {self.encoder.model.config.num_labels} values for a pair, not one score, so it "
                "cannot rank."
            )
        self.prompt = _prompt(settings)
        self.modules = _load_modules(folder, entries[1:], self.encoder, self.prompt)
        self.activation = activation(settings.get("activation_fn"))
        tokenizer, model, ours = self.encoder.tokenizer, self.encoder.model, settings.get("poly_encoders") or {}
        self.room = pair_room(tokenizer, model)
        wishes = ours.get("max_context_length"), ours.get("max_candidate_length")
        self.limits = pair_limits(tokenizer, self.room, *wishes)
        self.knows_segments = getattr(model.config, "type_vocab_size", 0) > 1

    def scores(self, context: str, candidates: list[str], vectors: Vectors) -> Tensor:
        tokenizer = self.encoder.tokenizer
        pairs = PairTokenizer(tokenizer, *self.limits, self.room, self.prompt)
        scores = torch.empty(len(candidates), device=self.encoder.device)
        for places in by_length(candidates, BATCH_SIZE):
            rows = pairs([context] * len(places), [candidates[place] for place in places])
            features = dict(tokenizer.pad(rows, padding=True, return_tensors="pt"))
            if not self.knows_segments:
                features.pop("token_type_ids", None)
            features = _through(self.encoder, self.modules, features)
            scores[places] = self.activation(features["scores"].float())[:, 0]
        return scores


def _encoder_folder(entries: list[Entry]) -> str:
    kind, name = entries[0]
    if kind != "Transformer":
        raise ValueError(f"The model begins with a {kind}, and an endpoint knows those that begin with a text encoder.")
    return name


def _load_modules(folder: Path, entries: list[Entry], encoder: TextEncoder, prompt: str | None) -> list[SentenceModule]:
    return [load_module(folder / name, kind, encoder.device, prompted=bool(prompt)) for kind, name in entries]


def _prompt(settings: dict[str, Any], *names: str) -> str | None:
    """The first of the named prompts that there is, else the default one, else none."""
    prompts = settings.get("prompts") or {}
    name = next((name for name in names if name in prompts), settings.get("default_prompt_name"))
    return prompts.get(name) or None


@torch.no_grad()
def _through(encoder: TextEncoder, modules: list[SentenceModule], encoding: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder and the modules after it make of texts."""
    features = encoder(encoding)
    for module in modules:
        features = module(features)
    return features


def load_scorer(folder: str) -> Scorer:
    """The scorer of a saved Poly-encoder, Bi-encoder or Cross-encoder.

    Raises:
        OSError: it is not there, or incomplete.
        ValueError: it is a model of another kind.
    """
    path = Path(folder)
    settings = read_json(path / "config_sentence_transformers.json", default={})
    config = read_json(path / "config.json", default={})
    if config.get("model_type") == "poly-encoder":
        return PolyScorer(path, settings)
    classifies = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    if settings.get("model_type") == "CrossEncoder" or (classifies and not settings):
        return CrossScorer(path, settings)
    if settings.get("model_type", "SentenceTransformer") == "SentenceTransformer" and settings:
        return BiScorer(path, settings)
    raise ValueError("The folder holds no Poly-encoder, Bi-encoder or Cross-encoder, which is what an endpoint serves.")
