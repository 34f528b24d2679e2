"""The Cross-encoder: Humeau et al., arXiv:1905.01969, section 4.3: both texts in one pass, score = first(T(pair)) W.

It is sentence-transformers' CrossEncoder with its own way from text to tokens: a context in any of its forms is segment
0 and keeps its last tokens, a candidate is segment 1 and keeps its first, each to its own limit. What it saves loads
with plain `sentence_transformers.CrossEncoder` and with `AutoModelForSequenceClassification`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sentence_transformers
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path
from torch import nn

from poly_encoders.cards import CrossEncoderModelCardData, WithCard
from poly_encoders.conversations import TURN_SEPARATOR, Context, candidate_texts, checked_max_turns, context_texts
from poly_encoders.modeling.pairs import PairTokenizer, pair_limits, pair_room
from poly_encoders.pushing import HubPushing
from poly_encoders.two_sided import (
    Ranked,
    clear_load_errors,
    finite,
    forget_last_call,
    freeze_pooler,
    ranking,
    ranking_inputs,
    refuse_poly_encoder,
    save_staged,
)


class CrossEncoder(HubPushing, WithCard, sentence_transformers.CrossEncoder):
    r"""A Cross-encoder: scores a context and a candidate read together. The most exact of the three, and the slowest.

    Args:
        model_name_or_path: A saved Cross-encoder or any encoder, which gets a new scoring layer; a local folder or a
            Hub id.
        max_context_length, max_candidate_length: Tokens kept: the last of a context, the first of a candidate, special
            tokens not counted. When left out, a candidate may take a quarter of the room, a context the rest.
        turn_separator: Text between the turns of a conversation, `"\n"` for a new model.
        max_turns: Turns kept of a conversation, its last; all when left out.
        **kwargs: All that `sentence_transformers.CrossEncoder` takes. A new model's `activation_fn` is the identity:
            scores are raw and unbounded, comparable within one context.

    Raises:
        ValueError: limits that the encoder has no positions for.
        OSError: files that are missing, truncated or corrupted.
    """

    model_card_data_class = CrossEncoderModelCardData

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        max_context_length: int | None = None,
        max_candidate_length: int | None = None,
        turn_separator: str | None = None,
        max_turns: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._max_context_length = max_context_length
        self._max_candidate_length = max_candidate_length
        self._turn_separator = turn_separator
        self._max_turns = checked_max_turns(max_turns)
        if kwargs.get("num_labels", 1) != 1:
            raise ValueError(
                f"This Cross-encoder ranks, so it has one score for a pair, not num_labels={kwargs['num_labels']}. "
                "To classify pairs, use sentence_transformers.CrossEncoder."
            )
        with clear_load_errors(model_name_or_path):
            super().__init__(model_name_or_path, **kwargs)
        if self.num_labels != 1:
            raise ValueError(
                f"{model_name_or_path} gives {self.num_labels} values for a pair, not one score, so it cannot rank. "
                "Load it with sentence_transformers.CrossEncoder."
            )
        if self.tokenizer.pad_token is None:  # decoders come without one, and the scoring layer must know it
            self.tokenizer.pad_token = self.tokenizer.eos_token
            self[0].model.config.pad_token_id = self.tokenizer.pad_token_id
        if self._knows_segments() and "token_type_ids" not in self.tokenizer.model_input_names:
            # Without this, upstream's CrossEncoder would leave the segments out and score otherwise.
            names = [*self.tokenizer.model_input_names, "token_type_ids"]
            self.tokenizer.model_input_names = self.tokenizer.init_kwargs["model_input_names"] = names
        if len(self) > 1:  # its score is made of token vectors by further modules, as in converted checkpoints
            freeze_pooler(self[0].model)
        self.length_limits()  # a limit that cannot be kept is said on loading, not on the first long text

    @property
    def turn_separator(self) -> str:
        """Text between the turns of a conversation."""
        return TURN_SEPARATOR if self._turn_separator is None else self._turn_separator

    @property
    def max_turns(self) -> int | None:
        """Turns kept of a conversation, its last; `None` for all."""
        return self._max_turns

    def length_limits(self) -> tuple[int, int]:
        """Tokens kept at most of a context and of a candidate, special tokens not counted.

        Those of a model that was converted from ParlAI are each side's own; of a pair that is too long all the same,
        the context gives way.

        Raises:
            ValueError: the two together do not fit the encoder.
        """
        return pair_limits(self.tokenizer, self._room(), self._max_context_length, self._max_candidate_length)

    def _room(self) -> int:
        encoder: Transformer = self[0]
        return pair_room(encoder.tokenizer, encoder.model)

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
        contexts = context_texts([pair[0] for pair in inputs], self.turn_separator, self.max_turns)
        candidates = candidate_texts([pair[1] for pair in inputs])
        tokenized = PairTokenizer(self[0].tokenizer, *self.length_limits(), self._room(), prompt)
        rows = tokenized(contexts, candidates)
        features = dict(self[0].tokenizer.pad(rows, padding=True, return_tensors="pt"))
        if not self._knows_segments():
            features.pop("token_type_ids", None)
        return {**features, "modality": "text"}

    def _knows_segments(self) -> bool:
        return getattr(self[0].model.config, "type_vocab_size", 0) > 1

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `inputs` is one pair: two items, the second a text, the first a context."""
        return isinstance(inputs, (list, tuple, np.ndarray)) and len(inputs) == 2 and isinstance(inputs[1], str)

    def rank(
        self,
        query: Context,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> list[Ranked]:
        """Rank candidates for one context: arguments and result as `PolyEncoder.rank` and upstream's."""
        text, texts = ranking_inputs(self, query, documents, top_k)
        if not texts:
            return []
        options = {"prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, **kwargs}
        options |= {"show_progress_bar": show_progress_bar, "convert_to_tensor": True}
        scores = self.predict([(text, candidate) for candidate in texts], **options)
        return ranking(scores, texts, top_k, return_documents)

    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        return finite(super()._inference(inputs, **kwargs))

    def get_default_activation_fn(self) -> Any:
        """The saved activation, else the identity: scores are raw."""
        config = self.config
        saved = "activation_fn" in (getattr(config, "sentence_transformers", None) or {})
        if saved or getattr(config, "sbert_ce_default_activation_function", None) is not None:
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
        for name, value in model_config.get("poly_encoders", {}).items():
            attribute = f"_{name}"
            if getattr(self, attribute, value) is None:  # what the caller gave comes first
                setattr(self, attribute, value)

    def _get_model_config(self) -> dict[str, Any]:
        ours = {
            "max_context_length": self._max_context_length,
            "max_candidate_length": self._max_candidate_length,
            "turn_separator": self.turn_separator,
            "max_turns": self.max_turns,
        }
        return {**super()._get_model_config(), "poly_encoders": ours}

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As upstream's, but a save that fails leaves what was at `path` as it was."""
        forget_last_call(self)
        save_staged(super().save, path, *args, **kwargs)
