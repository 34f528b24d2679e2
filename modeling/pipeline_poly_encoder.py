# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder as a pipeline of transformers: a context and candidates in, a ranked list out.

    pipe = pipeline("sentence-similarity", model="org/poly-encoder", trust_remote_code=True)
    pipe({"context": ["Hi!", "Any plans for tonight?"], "candidates": ["A film, perhaps.", "Forty-two."]}, top_k=1)

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedModel

from .configuration_poly_encoder import token_limit
from .scoring_poly_encoder import best_first, poly_score, refuse_nonfinite
from .text_poly_encoder import (
    NoTokensError,
    candidate_texts,
    checked_count,
    context_text,
    described,
    make_ready,
    tokenized,
)

BATCH_SIZE = 32  # texts that go through a backbone together, as many as PolyEncoder.rank takes

# The two sides of an input: ours, the Hub's for the task sentence-similarity, and those of rerankers.
_NAMES = (("context", "candidates"), ("source_sentence", "sentences"), ("query", "texts"))
_INPUTS = " or ".join(f'{{"{context}": ..., "{candidates}": [...]}}' for context, candidates in _NAMES)
_OPTIONS = ("top_k", "context_prompt", "candidate_prompt")
_FEATURES = ("input_ids", "attention_mask", "token_type_ids", "turn_ids")


class PolyEncoderPipeline(Pipeline):
    """Ranks candidates for contexts: `pipeline("sentence-similarity", model=...)`.

    Texts are joined, cut and scored as by `poly_encoders.PolyEncoder.rank`, after the model's own configuration.

    Args:
        top_k: How many candidates to return; all when left out. A call may say otherwise.
        context_prompt, candidate_prompt: Texts to put before each context and each candidate, for a model that was
            trained with any. Those that a `PolyEncoder` has in its `prompts` are not read from its folder here.
        **kwargs: What every pipeline of transformers takes (`device`, `device_map`, `dtype`, `batch_size`, ...).

    Raises:
        ValueError: another model than a Poly-encoder, or options out of range.
        TypeError: options that there are not.
    """

    NoTokensError = NoTokensError
    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_size = batch_size or BATCH_SIZE
        if self.model.config.model_type != "poly-encoder":
            raise ValueError(
                f"This pipeline ranks with a Poly-encoder, but the model is a {self.model.config.model_type}. "
                "Load it with the library that it was saved by, or train a Poly-encoder on it."
            )
        if self.tokenizer is None:
            raise ValueError("The pipeline needs the model's tokenizer: pass tokenizer=..., or the model by its path.")
        make_ready(self.tokenizer)

    def __call__(
        self,
        inputs: Any = None,
        *,
        context: Any = None,
        candidates: Sequence[str] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Rank.

        Args:
            inputs: One input, `{"context": ..., "candidates": [...]}`, or a list of them, or a stream: a generator, a
                data set. A context is a text, a list of turns, or a list of chat messages, oldest first. The names
                `source_sentence` and `sentences`, or `query` and `texts`, will do as well.
            context, candidates: The two sides of one input, in place of `inputs`.
            batch_size: How many inputs are read together, and how many texts go through the model at once. The
                pipeline's own when left out, which is 32 unless it was made with another.
            **kwargs: `top_k`, `context_prompt`, `candidate_prompt`, for this call, and `num_workers`.

        Returns:
            `[{"index": position, "score": float, "text": candidate}, ...]` for one input, best first, equal scores in
            the order given; a list of such lists for a list; an iterator over them for a stream.

        Raises:
            TypeError, ValueError: inputs that are no contexts and candidates, options out of range.
        """
        if (context is None) != (candidates is None) or (inputs is None) == (context is None):
            raise ValueError("Give inputs, or both context and candidates in place of them.")
        if inputs is None:
            inputs = {"context": context, "candidates": candidates}
        kwargs["batch_size"] = kwargs["texts_at_once"] = batch_size or self.batch_size
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        if isinstance(inputs, (Mapping, str, Dataset)) or not hasattr(inputs, "__iter__"):
            return super().__call__(inputs, **kwargs)
        return super().__call__((item for item in inputs), **kwargs)

    def check_options(self, **options: Any) -> dict[str, Any]:
        """The options as the steps take them.

        Raises:
            TypeError: one that there is not.
            ValueError: `top_k` is no number of candidates.
        """
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            raise TypeError(f"This pipeline has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}.")
        if "top_k" in options:
            options["top_k"] = checked_count(options["top_k"], "top_k", least=0)
        return options

    def _sanitize_parameters(
        self, texts_at_once: int | None = None, local_files_only: Any = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # `pipeline` hands on the local_files_only that it was called with.
        options = self.check_options(**options)
        after = {"top_k": options.pop("top_k")} if "top_k" in options else {}
        return {}, options | ({"batch_size": texts_at_once} if texts_at_once else {}), after

    def preprocess(self, input_: Any) -> dict[str, Any]:
        """The checked texts of one input."""
        context, candidates = context_and_candidates(input_)
        config = self.model.config
        return {
            "context": context_text(context, config.turn_separator, config.max_turns),
            "candidates": candidate_texts(candidates),
        }

    def _forward(self, texts: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Scores of one input, or of several that were put together, which share the vectors of equal candidates."""
        if isinstance(texts["context"], str):
            return {**texts, "scores": self.score_texts(**texts, **options)}
        return {**texts, "scores": self._score(texts["context"], texts["candidates"], **options)}

    def postprocess(self, outputs: dict[str, Any], top_k: int | None = None) -> list[dict[str, Any]]:
        """One input's ranking."""
        ranking = best_first(outputs["scores"].flatten(), top_k)
        return [{"index": index, "score": score, "text": outputs["candidates"][index]} for index, score in ranking]

    def score_texts(self, context: str, candidates: list[str], **options: Any) -> Tensor:
        """Scores of checked texts, `(n,)` float32 on the CPU; equal candidates have equal ones.

        Args:
            context, candidates: As `preprocess` gives them.
            **options: `batch_size`, texts that go through the model at once; `context_prompt`, `candidate_prompt`.

        Raises:
            NoTokensError: a text has no token.
            ValueError: vectors that are not finite.
        """
        return self._score([context], [candidates], **options)[0]

    def _score(
        self,
        contexts: list[str],
        sets: list[list[str]],
        batch_size: int = BATCH_SIZE,
        context_prompt: str | None = None,
        candidate_prompt: str | None = None,
    ) -> list[Tensor]:
        texts = list(dict.fromkeys(text for candidates in sets for text in candidates))
        if not texts:
            return [torch.empty(0)] * len(contexts)
        place = {text: position for position, text in enumerate(texts)}
        encoded = self._encode("context", contexts, batch_size, context_prompt)
        vectors = self._encode("candidate", texts, batch_size, candidate_prompt)
        scores = []
        for row, candidates in enumerate(sets):
            own = {text: position for position, text in enumerate(dict.fromkeys(candidates))}
            found = poly_score(encoded[row : row + 1], vectors[[place[text] for text in own]], self.model.final_scale)
            scores.append(found[0].cpu()[[own[text] for text in candidates]])
        return scores

    def _encode(
        self, side: Literal["context", "candidate"], texts: Sequence[str], batch_size: int, prompt: str | None
    ) -> Tensor:
        """`(n, m, dim)` or `(n, dim)` vectors, on the pipeline's device, of n checked texts, at least one."""
        model: Any = self.model
        is_context = side == "context"
        encoder: PreTrainedModel = model.context_encoder if is_context else model.candidate_encoder
        wanted = model.config.max_context_length if is_context else model.config.max_candidate_length
        encode = model.get_context_features if is_context else model.get_candidate_features
        limit = token_limit(self.tokenizer, encoder, wanted)
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        with self.device_placement(), torch.no_grad():
            for places in by_length(texts, batch_size):
                rows = [texts[place] for place in places]
                side_cut: Literal["left", "right"] = "left" if is_context else "right"
                turns = is_context and model.config.has_turns
                encoding = tokenized(self.tokenizer, rows, limit, side_cut, prompt, turns=turns)
                features = {name: encoding[name].to(self.device) for name in _FEATURES if name in encoding}
                for place, vector in zip(places, encode(**features), strict=True):
                    vectors[place] = vector
        stacked = torch.stack(vectors)
        refuse_nonfinite(stacked)
        return stacked


def context_and_candidates(inputs: Any) -> tuple[Any, Any]:
    """The context and the candidates of one input, under whichever names they come.

    Args:
        inputs: `{"context": ..., "candidates": [...]}`, or the names of the Hub's sentence-similarity task,
            `{"source_sentence": ..., "sentences": [...]}`, or those of rerankers, `{"query": ..., "texts": [...]}`.

    Raises:
        TypeError: it is no mapping.
        ValueError: a side is missing, or there are other names in it.

    Example:
        >>> context_and_candidates({"query": "hello", "texts": ["hi", "bye"]})
        ('hello', ['hi', 'bye'])
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"An input is {_INPUTS}, but this one is {described(inputs)}.")
    for names in _NAMES:
        if inputs.keys() == set(names):
            return inputs[names[0]], inputs[names[1]]
    raise ValueError(f"An input is {_INPUTS}, but this one has the keys {sorted(map(str, inputs))!s:.200}.")


def by_length(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Positions of texts in batches of texts of like length, the longest first, so that little padding is computed."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


__all__ = ["PolyEncoderPipeline"]
