"""The Cross-encoder: Humeau et al., arXiv:1905.01969, section 4.3: both texts in one pass, score = first(T(pair)) W.

It is sentence-transformers' CrossEncoder with its own way from text to tokens: a context in any of its forms is segment
0 and keeps its last tokens, a candidate is segment 1 and keeps its first, each to its own limit. What it saves loads
with plain `sentence_transformers.CrossEncoder` and with `AutoModelForSequenceClassification`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import sentence_transformers
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path
from torch import nn

from poly_encoders.conversations import TURN_SEPARATOR, Context, candidate_texts, checked_max_turns, context_texts
from poly_encoders.lengths import token_limit
from poly_encoders.two_sided import (
    Ranked,
    clear_load_errors,
    finite,
    freeze_pooler,
    ranking,
    ranking_inputs,
    refuse_poly_encoder,
    save_staged,
)


class CrossEncoder(sentence_transformers.CrossEncoder):
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
        room = self._room()
        if getattr(self.tokenizer, "cuts_as_parlai", False):
            wishes = (self._max_context_length, self._max_candidate_length)
            context, candidate = (room - 1 if wish is None else min(wish, room - 1) for wish in wishes)
            return context, candidate
        candidate = max(1, room // 4) if self._max_candidate_length is None else self._max_candidate_length
        context = room - candidate if self._max_context_length is None else self._max_context_length
        if min(context, candidate) < 1 or context + candidate > room:
            raise ValueError(
                f"max_context_length={context} and max_candidate_length={candidate} must each be at least 1 and "
                f"together at most {room}, which is what the encoder has positions for beside its special tokens."
            )
        return context, candidate

    def _room(self) -> int:
        """Positions of the encoder beside a pair's special tokens."""
        encoder: Transformer = self[0]
        return token_limit(encoder.tokenizer, encoder.model) - encoder.tokenizer.num_special_tokens_to_add(pair=True)

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
        tokenized = _PairTokenizer(self[0].tokenizer, *self.length_limits(), self._room(), prompt)
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
        save_staged(super().save, path, *args, **kwargs)


class _PairTokenizer:
    """Texts to rows of token ids: each side cut on its own side, the tokenizer's own special tokens between."""

    def __init__(self, tokenizer: Any, keep_context: int, keep_candidate: int, room: int, prompt: str | None) -> None:
        self.tokenizer = tokenizer
        self.keep_candidate = keep_candidate
        self.prompt: list[int] = self._encoded([prompt])[0] if prompt else []
        self.keep_context = keep_context - len(self.prompt)
        self.room = room - len(self.prompt)
        self.frame = self._frame() if tokenizer.is_fast else None
        if self.keep_context < 1 or self.room < 2:
            raise ValueError(
                f"The prompt {prompt!r} alone fills the {keep_context} tokens kept of a context. Shorten it."
            )

    def __call__(self, contexts: list[str], candidates: list[str]) -> list[dict[str, list[int]]]:
        pairs = zip(self._encoded(contexts), self._encoded(candidates), strict=True)
        return [self._row(context, candidate) for context, candidate in pairs]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]

    def _frame(self) -> tuple[list[list[int]], list[list[int]]]:
        """Special token ids before, between and after the two texts, and the segments of all five parts.

        Read off a pair of short texts. Post-processing long ones would pair up all that was cut off them, which takes
        time and memory in the product of their lengths.
        """
        context, candidate = self.tokenizer(["a", "a"], add_special_tokens=False, truncation=False).encodings
        row = self.tokenizer.backend_tokenizer.post_process(context, candidate, add_special_tokens=True)
        own = [position for position, special in enumerate(row.special_tokens_mask) if not special]
        first, last = own[: len(context.ids)], own[len(context.ids) :]
        cuts = [0, first[0], first[-1] + 1, last[0], last[-1] + 1, len(row.ids)]
        parts = [slice(start, end) for start, end in pairwise(cuts)]
        return [row.ids[parts[i]] for i in (0, 2, 4)], [row.type_ids[part] for part in parts]

    def _row(self, context: list[int], candidate: list[int]) -> dict[str, list[int]]:
        candidate = candidate[: min(self.keep_candidate, self.room - 1)]
        kept = min(len(context), self.keep_context, self.room - len(candidate))
        context = self.prompt + context[len(context) - kept :]
        if self.frame is None:
            return dict(self.tokenizer.prepare_for_model(context, candidate, return_token_type_ids=True))
        (before, between, after), (first, second, third, fourth, fifth) = self.frame
        if getattr(self.tokenizer, "cuts_as_parlai", False):
            after = after[: self.keep_candidate - len(candidate)]
        ids = [*before, *context, *between, *candidate, *after]
        kinds = [*first, *second[:1] * len(context), *third, *fourth[:1] * len(candidate), *fifth[: len(after)]]
        return {"input_ids": ids, "token_type_ids": kinds, "attention_mask": [1] * len(ids)}
