# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder as a pipeline of transformers: a context and candidates in, a ranked list out.

    pipe = pipeline("sentence-similarity", model="org/poly-encoder", trust_remote_code=True)
    pipe({"context": ["Hi!", "Any plans for tonight?"], "candidates": ["A film, perhaps.", "Forty-two."]}, top_k=1)

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedModel

from .conversations import candidate_texts, context_and_candidates, context_text
from .lengths import by_length, token_limit, tokenized
from .modeling_poly_encoder import poly_score
from .ranking import best_first, checked_top_k, refuse_nonfinite

# Texts that go through a backbone together, as many as PolyEncoder.rank takes.
BATCH_SIZE = 32

_OPTIONS = ("top_k", "context_prompt", "candidate_prompt")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


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
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # decoders come without one; the mask hides it anyway

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

    def _sanitize_parameters(
        self, texts_at_once: int | None = None, local_files_only: Any = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # `pipeline` hands on the local_files_only that it was called with.
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            raise TypeError(f"This pipeline has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}.")
        after = {"top_k": checked_top_k(options.pop("top_k"))} if "top_k" in options else {}
        return {}, options | ({"batch_size": texts_at_once} if texts_at_once else {}), after

    def preprocess(self, input_: Any) -> dict[str, Any]:
        """The checked texts of one input."""
        context, candidates = context_and_candidates(input_)
        config = self.model.config
        return {
            "context": context_text(context, config.turn_separator, config.max_turns),
            "candidates": candidate_texts(candidates),
        }

    def _forward(
        self,
        texts: dict[str, Any],
        batch_size: int = BATCH_SIZE,
        context_prompt: str | None = None,
        candidate_prompt: str | None = None,
    ) -> dict[str, Any]:
        """Scores of one input, or of several that were put together, which share the vectors of equal candidates."""
        contexts, sets = texts["context"], texts["candidates"]
        single = isinstance(contexts, str)
        if single:
            contexts, sets = [contexts], [sets]
        places = {text: place for place, text in enumerate(dict.fromkeys(text for texts in sets for text in texts))}
        scores: list[Tensor] = [torch.empty(0)] * len(contexts)
        if places:
            context_vectors = self.encode_contexts(contexts, batch_size, context_prompt)
            vectors = self.encode_candidates(list(places), batch_size, candidate_prompt)
            for row, candidates in enumerate(sets):
                own = vectors[[places[text] for text in candidates]]
                scores[row] = self.score(context_vectors[row : row + 1], own)[0]
        return {"scores": scores[0] if single else scores, "candidates": texts["candidates"]}

    def postprocess(self, outputs: dict[str, Any], top_k: int | None = None) -> list[dict[str, Any]]:
        """One input's ranking."""
        ranking = best_first(outputs["scores"].flatten(), top_k)
        return [{"index": index, "score": score, "text": outputs["candidates"][index]} for index, score in ranking]

    # --- the two sides ---------------------------------------------------------------------------------------------

    def encode_contexts(
        self, contexts: Sequence[Any], batch_size: int = BATCH_SIZE, prompt: str | None = None
    ) -> Tensor:
        """Context vectors, `(n, m, dim)` on the pipeline's device, of n contexts in any of their forms, at least one.

        Raises:
            TypeError, ValueError: what is no context, or has no token; vectors that are not finite.
        """
        config = self.model.config
        texts = [context_text(context, config.turn_separator, config.max_turns) for context in contexts]
        return self._encode("context", texts, batch_size, prompt)

    def encode_candidates(
        self, candidates: Sequence[str], batch_size: int = BATCH_SIZE, prompt: str | None = None
    ) -> Tensor:
        """Candidate vectors, `(n, dim)` on the pipeline's device, of n texts, at least one. They can be kept.

        Raises:
            TypeError, ValueError: what is no text, or has no token; vectors that are not finite.
        """
        return self._encode("candidate", candidate_texts(candidates), batch_size, prompt)

    def score(self, contexts: Tensor, candidates: Tensor) -> Tensor:
        """Scores, `(n, k)` float32, of `(n, m, dim)` context vectors with `(k, dim)` candidate vectors."""
        return poly_score(contexts, candidates, self.model.final_scale)

    def _encode(
        self, side: Literal["context", "candidate"], texts: list[str], batch_size: int, prompt: str | None
    ) -> Tensor:
        model: Any = self.model
        context = side == "context"
        encoder: PreTrainedModel = model.context_encoder if context else model.candidate_encoder
        wanted = model.config.max_context_length if context else model.config.max_candidate_length
        limit = token_limit(self.tokenizer, encoder, wanted)
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        with self.device_placement(), torch.no_grad():
            for places in by_length(texts, batch_size):
                rows = [texts[place] for place in places]
                _, encoding = tokenized(self.tokenizer, rows, limit, "left" if context else "right", prompt)
                features = {name: encoding[name].to(self.device) for name in _INPUTS if name in encoding}
                encode = model.get_context_features if context else model.get_candidate_features
                for place, vector in zip(places, encode(**features), strict=True):
                    vectors[place] = vector
        stacked = torch.stack(vectors)
        refuse_nonfinite(stacked)
        return stacked


__all__ = ["PolyEncoderPipeline"]
