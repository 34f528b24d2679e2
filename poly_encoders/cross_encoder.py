"""The Cross-encoder: Humeau et al., arXiv:1905.01969, section 4.3: both texts in one pass, score = first(T(pair)) W.

It is sentence-transformers' CrossEncoder with its own way from text to tokens: a context in any of its forms is segment
0 and keeps its last tokens, a candidate is segment 1 and keeps its first, each to its own limit. What it saves loads
with plain `sentence_transformers.CrossEncoder` and with `AutoModelForSequenceClassification`.
"""

import logging
import os
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import sentence_transformers
from sentence_transformers.util import load_file_path
from torch import Tensor, nn

from poly_encoders.cards import CrossEncoderModelCardData
from poly_encoders.modeling.text_poly_encoder import TURN_SEPARATOR, Context, Side, candidate_texts, make_ready, padded
from poly_encoders.pairs import PairTokenizer, pair_limits, pair_room
from poly_encoders.ranker import (
    UPSTREAM_READS,
    Ranked,
    Ranker,
    Task,
    TextOptions,
    clear_load_errors,
    default_separator,
    freeze_pooler,
    local_path,
    refuse_poly_encoder,
)

logger = logging.getLogger(__name__)


class CrossEncoder(Ranker, sentence_transformers.CrossEncoder):
    """A Cross-encoder: scores a context and a candidate read together. The most exact of the three, and the slowest.

    Args:
        model_name_or_path: A saved Cross-encoder; or what to build a new one on, to be trained: any encoder, which gets
            a new scoring layer, or another's Cross-encoder, whose pairs are then cut as said below. A local folder or a
            Hub id. To use another's as it is, `poly_encoders.loading.load_model(path)`.
        max_context_length, max_candidate_length: Tokens kept: the last of a context, the first of a candidate, special
            tokens not counted. When left out, a candidate may take a quarter of the room, a context the rest. Of a pair
            that is too long all the same, the context gives way.
        turn_separator: Text between the turns of a conversation. For a new model a newline or, where the tokenizer
            drops newlines, its separator token.
        max_turns: Turns kept of a conversation, its last; all when left out.
        **kwargs: All that `sentence_transformers.CrossEncoder` takes. A new model's `activation_fn` is the identity:
            scores are raw and unbounded, comparable within one context.

    Raises:
        ValueError: limits that the encoder has no positions for, or a model that gives several values for a pair.
        OSError: files that are missing, truncated or corrupted.
    """

    model_card_data_class = CrossEncoderModelCardData

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        max_context_length: int | None = None,
        max_candidate_length: int | None = None,
        turn_separator: str | None = None,
        max_turns: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._text = TextOptions(max_context_length, max_candidate_length, turn_separator, max_turns)
        self._unchanged = kwargs.pop("_unchanged", False)  # load_model's: another's model stays what it is
        if kwargs.get("num_labels") not in (None, 1):
            raise ValueError(
                f"This Cross-encoder ranks, so it has one score for a pair, not num_labels={kwargs['num_labels']}. "
                "To classify pairs, use sentence_transformers.CrossEncoder."
            )
        path = local_path(model_name_or_path)
        with clear_load_errors(path):
            super().__init__(path, **kwargs)
        if self.num_labels != 1:
            raise ValueError(
                f"{path} gives {self.num_labels} values for a pair, not one score, so it cannot rank. "
                "Load it with sentence_transformers.CrossEncoder."
            )
        if self._text.turn_separator is None:
            self._text.turn_separator = default_separator(self.tokenizer)
        if not self._unchanged:
            if path is not None and not self._is_ours and self._is_trained():
                logger.warning(
                    "This is a new Cross-encoder on %s, to be trained: its pairs are cut in another way. "
                    "poly_encoders.loading.load_model loads the model as it is.",
                    path,
                )
            self._set_up_encoder()

    def _is_trained(self) -> bool:
        return any(name.endswith("ForSequenceClassification") for name in self.config.architectures or [])

    def _set_up_encoder(self) -> None:
        tokenizer, model = self[0].tokenizer, self[0].model
        make_ready(tokenizer)
        text_config = model.config.get_text_config()
        if hasattr(model, "score") or text_config.pad_token_id is None:  # a decoder's layer scores the last other token
            text_config.pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = self._padding_side()
        if self._knows_segments() and "token_type_ids" not in tokenizer.model_input_names:
            # Without this, upstream's CrossEncoder would leave the segments out and score otherwise.
            names = [*tokenizer.model_input_names, "token_type_ids"]
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        if len(self) > 1:  # its score is made of token vectors by further modules, as in converted checkpoints
            freeze_pooler(model)
        self.length_limits()  # a limit that cannot be kept is said on loading, not on the first long text

    @property
    def turn_separator(self) -> str:
        separator = self._text.turn_separator
        return TURN_SEPARATOR if separator is None else separator

    @property
    def max_turns(self) -> int | None:
        return self._text.max_turns

    def length_limits(self) -> tuple[int, int]:
        """Tokens kept at most of a context and of a candidate, special tokens not counted.

        Of a pair that is too long all the same, the context gives way.

        Raises:
            ValueError: a limit that the encoder has no positions for.
        """
        if self._unchanged:  # upstream cuts the longer of the two
            return self._room(), self._room()
        return pair_limits(self._room(), self._text.max_context_length, self._text.max_candidate_length)

    def _room(self) -> int:
        return pair_room(self[0].tokenizer, self[0].model)

    def preprocess(self, inputs: Sequence[Sequence[Any]], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Token features of (context, candidate) pairs, `(batch, length)` int64.

        Args:
            inputs: Pairs of a context, in any of its forms, and a candidate text.
            prompt: Put before each context.

        Raises:
            TypeError, ValueError: an input that is no pair, or no text.
        """
        if len(inputs) == 0:
            return {}
        if kwargs.get("task") is not None and all(isinstance(text, str) for text in inputs):
            return super().preprocess(inputs, prompt=prompt, **kwargs)  # one column, for the card's statistics
        for position, pair in enumerate(inputs):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"Item {position} is no pair of a context and a candidate, but {pair!r:.80}.")
        contexts = self.context_texts([pair[0] for pair in inputs])
        candidates = [str(text) for text in candidate_texts([pair[1] for pair in inputs])]
        if self._unchanged:
            with UPSTREAM_READS:
                return super().preprocess(list(zip(contexts, candidates, strict=True)), prompt=prompt, **kwargs)
        rows = PairTokenizer(self[0].tokenizer, *self.length_limits(), self._room(), prompt)(contexts, candidates)
        if not self._knows_segments():
            del rows["token_type_ids"]
        return {**padded(self[0].tokenizer, rows, self._padding_side()), "modality": "text"}

    def _padding_side(self) -> Side:
        # A generator that scores by its next word reads that off the last position.
        return "left" if self[0].transformer_task == "text-generation" else "right"

    def _knows_segments(self) -> bool:
        return getattr(self[0].model.config, "type_vocab_size", 0) > 1

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `inputs` is one pair: two items, the second a text, the first a context."""
        return isinstance(inputs, (list, tuple, np.ndarray)) and len(inputs) == 2 and isinstance(inputs[1], str)

    def prompt_of(self, task: Task, prompt_name: str | None = None, prompt: str | None = None) -> str | None:
        if self._unchanged:  # upstream knows no prompts of the sides
            return self._resolve_prompt(prompt, prompt_name)
        return super().prompt_of(task, prompt_name, prompt)

    def predict(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As upstream's, with the prompt that `rank` puts before a context; the scores of no pairs are float32 too."""
        scores = super().predict(inputs, None, self.prompt_of("query", prompt_name, prompt), *args, **kwargs)
        return scores.astype(np.float32) if isinstance(scores, np.ndarray) and scores.size == 0 else scores

    def rank(
        self,
        context: Context | None = None,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        query: Context | None = None,
        documents: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> list[Ranked]:
        """Rank candidates for one context: arguments and result as for `PolyEncoder.rank`.

        `query` and `documents`, sentence-transformers' names, will do for `context` and `candidates`.
        """
        if (context is None) == (query is None) or (candidates is None) == (documents is None):
            raise TypeError("rank needs one context and one list of candidates: model.rank(context, candidates).")
        signature(sentence_transformers.CrossEncoder.rank).bind_partial(self, **kwargs)  # predict takes any keyword
        context, candidates = query if context is None else context, documents if candidates is None else candidates
        return super().rank(context, candidates, top_k, return_documents, **kwargs)  # type: ignore[arg-type]

    def score_texts(self, context: str, candidates: list[str], prompt: str | None, **options: Any) -> Tensor:
        return self.predict(
            [(context, candidate) for candidate in candidates], prompt=prompt, convert_to_tensor=True, **options
        )

    def get_default_activation_fn(self) -> Any:
        """The saved activation, else the identity: scores are raw."""
        config = self.config
        saved = "activation_fn" in (getattr(config, "sentence_transformers", None) or {})
        if self._unchanged or saved or getattr(config, "sbert_ce_default_activation_function", None) is not None:
            return super().get_default_activation_fn()
        return nn.Identity()

    # --- loading and saving ----------------------------------------------------------------------------------------

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> Any:
        refuse_poly_encoder(model_name_or_path, kwargs)
        return super()._load_default_modules(model_name_or_path, **kwargs)

    def _load_converted_modules(self, model_name_or_path: str, *, model_type: str | None = None, **kwargs: Any) -> Any:
        if model_type != sentence_transformers.SentenceTransformer.model_type:
            raise ValueError(
                f"{model_name_or_path} is a {model_type}, not a CrossEncoder or an encoder. "
                f"Load it with {model_type}(path)."
            )
        hub = {
            name: kwargs[name] for name in ("token", "cache_folder", "revision", "local_files_only") if name in kwargs
        }
        if load_file_path(model_name_or_path, "router_config.json", **hub) is not None:
            raise ValueError(
                f"{model_name_or_path} has an encoder for each side, and a Cross-encoder reads both together. "
                "Load it with BiEncoder(path), or build a Cross-encoder on the encoder it was trained from."
            )
        return super()._load_converted_modules(model_name_or_path, model_type=model_type, **kwargs)

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)
        self._text = self._text.filled(model_config.get("poly_encoders", {}))  # what the caller gave comes first

    def _get_model_config(self) -> dict[str, Any]:
        config = super()._get_model_config()
        return config if self._unchanged else {**config, "poly_encoders": vars(self._text)}


__all__ = ["CrossEncoder"]
