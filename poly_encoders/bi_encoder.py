"""The Bi-encoder: Humeau et al., arXiv:1905.01969, section 4.2: score = red(T1(context)) . red(T2(candidate)).

It is built of sentence-transformers' own modules, so what it saves loads with plain `SentenceTransformer(path)`, to the
same bits, where this package is not installed. Only the mean of the first m outputs needs `trust_remote_code=True`
there, because sentence-transformers has no such pooling and the checkpoint carries ours.
"""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn

from poly_encoders import first_m_pooling
from poly_encoders.cards import BiEncoderModelCardData
from poly_encoders.conversations import TURN_SEPARATOR, candidate_texts, checked_max_turns
from poly_encoders.first_m_pooling import FirstMMeanPooling
from poly_encoders.lengths import last_tokens, room_beside_prompt, token_limit
from poly_encoders.two_sided import (
    Task,
    TwoSidedEncoder,
    clear_load_errors,
    freeze_pooler,
    refuse_poly_encoder,
    save_staged,
)

logger = logging.getLogger(__name__)

# Outputs that first_m_mean averages unless told, as many as a Poly-encoder has codes.
DEFAULT_M = 64

_OURS = f"{FirstMMeanPooling.__module__}.{FirstMMeanPooling.__name__}"
_BESIDE_THE_WEIGHTS = f"first_m_pooling.{FirstMMeanPooling.__name__}"


class BiEncoder(TwoSidedEncoder):
    r"""A Bi-encoder: one vector for a context, one for a candidate, their dot product as the score.

    Args:
        model_name_or_path: A saved Bi-encoder, any SentenceTransformer, or any encoder; a local folder or a Hub id.
            A SentenceTransformer keeps its pooling; its `Normalize` module goes, because scores are dot products.
        reduction: `"first"` output, `"mean"` of all (for a new model), or `"first_m_mean"`.
        m: For `"first_m_mean"`, how many outputs to average; 64 when left out.
        share_encoders: One encoder for both sides instead of two that start equal and are trained apart, as in the
            paper. A shared encoder has one tokenizer, and so one side to cut long texts on: the left, also for
            candidates.
        max_context_length, max_candidate_length: Tokens kept: the last of a context, the first of a candidate.
        turn_separator: Text between the turns of a conversation, `"\n"` for a new model.
        max_turns: Turns kept of a conversation, its last; all when left out.
        **kwargs: All that `SentenceTransformer` takes.

    Raises:
        ValueError: options that a saved model was not trained with, or a checkpoint of another kind.
        OSError: files that are missing, truncated or corrupted.
    """

    model_card_data_class = BiEncoderModelCardData
    # Classes outside sentence_transformers that a saved model may name without trust_remote_code.
    _module_classes: ClassVar[dict[str, type[nn.Module]]] = {
        _OURS: FirstMMeanPooling,
        _BESIDE_THE_WEIGHTS: FirstMMeanPooling,
    }

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        reduction: Literal["first", "mean", "first_m_mean"] | None = None,
        m: int | None = None,
        share_encoders: bool | None = None,
        max_context_length: int | None = None,
        max_candidate_length: int | None = None,
        turn_separator: str | None = None,
        max_turns: int | None = None,
        **kwargs: Any,
    ) -> None:
        if m is not None and reduction != "first_m_mean":
            raise ValueError(f"m={m} belongs to reduction='first_m_mean', but the reduction is {reduction!r}.")
        if reduction not in (None, "first", "mean", "first_m_mean"):
            raise ValueError(f"reduction must be 'first', 'mean' or 'first_m_mean', got {reduction!r}.")
        self._wishes: dict[str, Any] = {"reduction": reduction, "m": m, "share_encoders": share_encoders}
        self._saved: dict[str, Any] | None = None
        self._turn_separator = turn_separator
        self._max_turns = checked_max_turns(max_turns)
        with clear_load_errors(model_name_or_path):
            super().__init__(model_name_or_path, **kwargs)
        if kwargs.get("similarity_fn_name") is None and self._saved is None:  # a saved Bi-encoder keeps its own
            self.similarity_fn_name = "dot"
        self._set_lengths(max_context_length, max_candidate_length)
        for encoder in self._transformers():
            freeze_pooler(encoder.model)

    @property
    def turn_separator(self) -> str:
        return TURN_SEPARATOR if self._turn_separator is None else self._turn_separator

    @property
    def max_turns(self) -> int | None:
        return self._max_turns

    @property
    def share_encoders(self) -> bool:
        """Whether one encoder reads both sides."""
        return not isinstance(self[0], Router)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: Task | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token features of one side; contexts in any of their forms. A prompt stays before a context that is cut."""
        if prompt and task in ("query", "document"):
            encoder = self._transformers()[0 if task == "query" else -1]
            tokenizer = encoder.tokenizer
            room = room_beside_prompt(prompt, tokenizer, self.length_limit(task))
            if tokenizer.truncation_side == "left":
                texts = self.context_texts(inputs) if task == "query" else candidate_texts(inputs)
                inputs = [last_tokens(text, tokenizer, room) for text in texts]
        return super().preprocess(inputs, prompt=prompt, task=task, **kwargs)

    def length_limit(self, task: Task) -> int:
        """Tokens kept of a text on this side, special tokens included."""
        encoder = self._transformers()[0 if task == "query" else -1]
        return getattr(encoder, f"{task}_length") or encoder.tokenizer.model_max_length

    def reduction_options(self) -> dict[str, Any]:
        """How token vectors become one: `reduction`, and `m` where it takes one; empty for another pooling."""
        pooling = self._pooling()
        if isinstance(pooling, FirstMMeanPooling):
            return {"reduction": "first_m_mean", "m": pooling.m}
        if isinstance(pooling, Pooling) and pooling.pooling_mode in ("cls", "mean"):
            return {"reduction": "first" if pooling.pooling_mode == "cls" else "mean"}
        return {}

    def _transformers(self) -> list[Transformer]:
        """The encoders: the context's and the candidate's, or the one for both."""
        if isinstance(self[0], Router):
            return [self[0].sub_modules["query"][0], self[0].sub_modules["document"][0]]
        return [self[0]] if isinstance(self[0], Transformer) else []

    def _set_lengths(self, context: int | None, candidate: int | None) -> None:
        encoders = self._transformers()
        if len(encoders) == 1:
            encoder = encoders[0]
            encoder.max_seq_length = token_limit(encoder.tokenizer, encoder.model)
            _cut_on(encoder.tokenizer, "left")
            for name, wanted in (("query_length", context), ("document_length", candidate)):
                if wanted is not None:
                    setattr(encoder, name, token_limit(encoder.tokenizer, encoder.model, wanted))
            return
        for encoder, wanted, side in zip(encoders, (context, candidate), ("left", "right"), strict=True):
            encoder.max_seq_length = token_limit(encoder.tokenizer, encoder.model, wanted)
            _cut_on(encoder.tokenizer, side)

    # --- loading ---------------------------------------------------------------------------------------------------

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        refuse_poly_encoder(model_name_or_path, kwargs)
        modules, module_kwargs = super()._load_default_modules(model_name_or_path, **kwargs)
        return self._arranged(list(modules)), module_kwargs

    def _load_config_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        modules, module_kwargs = super()._load_config_modules(model_name_or_path, **kwargs)
        loaded = list(modules.values())
        if self._saved is None:  # a SentenceTransformer that is not ours
            return self._arranged(loaded), {}
        self._refuse_changes(model_name_or_path, shared=not isinstance(loaded[0], Router))
        return modules, module_kwargs

    def _load_converted_modules(self, model_name_or_path: str, *, model_type: str | None = None, **kwargs: Any) -> Any:
        raise ValueError(
            f"{model_name_or_path} is a {model_type}, not a BiEncoder, a SentenceTransformer or a plain encoder. "
            f"Load it with {model_type}(path), or build a Bi-encoder on the encoder it was trained from."
        )

    def _arranged(self, modules: list[nn.Module]) -> list[nn.Module]:
        """Modules for both sides, made of a checkpoint's for one or, in a Router, for each."""
        router: Any = modules[0]
        if not isinstance(router, Router):
            side = self._one_side(modules)
            if self._wishes["share_encoders"]:
                return side
            return [Router({"query": side, "document": copy.deepcopy(side)}, allow_empty_key=False)]
        if self._wishes["share_encoders"]:
            raise ValueError("The checkpoint has an encoder for each side, which share_encoders=True would drop.")
        if missing := {"query", "document"} - router.sub_modules.keys():
            raise ValueError(f"The checkpoint has no modules for {sorted(missing)}, which a Bi-encoder needs.")
        sides = {
            name: self._one_side([*router.sub_modules[name], *copy.deepcopy(modules[1:])])
            for name in ("query", "document")
        }
        return [Router(sides, allow_empty_key=False)]

    def _one_side(self, modules: list[nn.Module]) -> list[nn.Module]:
        encoder: Any = modules[0]
        if not isinstance(encoder, Transformer) or encoder.tokenizer is None:
            raise ValueError(f"A Bi-encoder is built on a text encoder, not on a {type(encoder).__name__}.")
        if any(isinstance(module, Normalize) for module in modules):
            logger.warning("Dropped the checkpoint's Normalize module: a Bi-encoder's scores are plain dot products.")
        modules = [module for module in modules if not isinstance(module, Normalize)]
        if self._wishes["reduction"] is None:
            return modules
        rest = [module for module in modules[1:] if not isinstance(module, (Pooling, FirstMMeanPooling))]
        return [encoder, self._new_pooling(encoder.get_embedding_dimension()), *rest]

    def _new_pooling(self, width: int) -> nn.Module:
        if self._wishes["reduction"] == "first_m_mean":
            return FirstMMeanPooling(width, DEFAULT_M if self._wishes["m"] is None else self._wishes["m"])
        return Pooling(width, "cls" if self._wishes["reduction"] == "first" else "mean")

    def _refuse_changes(self, path: str, shared: bool) -> None:
        saved = {**(self._saved or {}), "share_encoders": shared}
        for name, wish in self._wishes.items():
            if wish is not None and wish != saved.get(name, wish):
                raise ValueError(
                    f"{path} is a trained Bi-encoder with {name}={saved[name]!r}; {name}={wish!r} would need training "
                    "anew. Leave the option out, or start from an encoder checkpoint."
                )

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)
        self._saved = model_config.get("poly_encoders")
        if self._saved is not None and self._turn_separator is None:
            self._turn_separator = self._saved.get("turn_separator")
        if self._saved is not None and self._max_turns is None:
            self._max_turns = self._saved.get("max_turns")

    # --- saving ----------------------------------------------------------------------------------------------------

    def _get_model_config(self) -> dict[str, Any]:
        ours = {
            "share_encoders": self.share_encoders,
            "turn_separator": self.turn_separator,
            "max_turns": self.max_turns,
            **self.reduction_options(),
        }
        return {
            **super()._get_model_config(),
            # plain SentenceTransformer compares this with its own type, and subclasses share it
            "model_type": SentenceTransformer.model_type,
            "poly_encoders": ours,
        }

    def _pooling(self) -> nn.Module | None:
        modules = list(self[0].sub_modules["query"]) if isinstance(self[0], Router) else list(self)
        return next((module for module in modules if isinstance(module, (Pooling, FirstMMeanPooling))), None)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As upstream's, but a save that fails leaves what was at `path` as it was."""
        save_staged(self._save_complete, path, *args, **kwargs)

    def _save_complete(self, folder: str, *args: Any, **kwargs: Any) -> None:
        super().save(folder, *args, **kwargs)
        if isinstance(self._pooling(), FirstMMeanPooling):
            _carry_pooling_code(Path(folder))


def _cut_on(tokenizer: Any, side: str) -> None:
    """Cut long texts on this side, now and wherever the tokenizer is loaded again."""
    tokenizer.truncation_side = side
    tokenizer.init_kwargs["truncation_side"] = side  # what save_pretrained writes


def _carry_pooling_code(folder: Path) -> None:
    """Save our pooling's source with the model, and name it so that sentence-transformers finds it there."""
    shutil.copyfile(first_m_pooling.__file__, folder / "first_m_pooling.py")
    for file in (folder / "modules.json", folder / "router_config.json"):
        if file.exists():
            text = file.read_text(encoding="utf-8")
            file.write_text(
                json.dumps(json.loads(text.replace(_OURS, _BESIDE_THE_WEIGHTS)), indent=2), encoding="utf-8"
            )


__all__ = ["BiEncoder"]
