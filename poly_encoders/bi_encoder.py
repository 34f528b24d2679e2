"""The Bi-encoder: Humeau et al., arXiv:1905.01969, section 4.2: score = red(T1(context)) . red(T2(candidate)).

It is built of sentence-transformers' own modules, so what it saves loads with plain `SentenceTransformer(path)`, to the
same bits, where this package is not installed. Only the mean of the first m outputs needs `trust_remote_code=True`
there, because sentence-transformers has no such pooling and the checkpoint carries ours.
"""

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn
from transformers import PreTrainedTokenizerBase

from poly_encoders import first_m_pooling
from poly_encoders.cards import BiEncoderModelCardData
from poly_encoders.first_m_pooling import FirstMMeanPooling
from poly_encoders.modeling.configuration_poly_encoder import token_limit
from poly_encoders.modeling.text_poly_encoder import (
    TURN_SEPARATOR,
    checked_count,
    make_ready,
    plain_tokens,
    read_frame,
    tokenized,
)
from poly_encoders.ranker import (
    UPSTREAM_READS,
    Task,
    TextOptions,
    clear_load_errors,
    default_separator,
    freeze_pooler,
    local_path,
    refuse_poly_encoder,
)
from poly_encoders.two_sided import TwoSidedEncoder

logger = logging.getLogger(__name__)

DEFAULT_NUM_CODES = 64  # outputs that first_m_mean averages unless told, as many as a Poly-encoder has codes

_OURS = f"{FirstMMeanPooling.__module__}.{FirstMMeanPooling.__name__}"
_BESIDE_THE_WEIGHTS = f"first_m_pooling.{FirstMMeanPooling.__name__}"


class BiEncoder(TwoSidedEncoder):
    """A Bi-encoder: one vector for a context, one for a candidate, their dot product or cosine as the score.

    Args:
        model_name_or_path: A saved Bi-encoder; or what to build a new one on, to be trained: any SentenceTransformer or
            any encoder. A local folder or a Hub id. A SentenceTransformer keeps its pooling and its similarity, mostly
            the cosine; `similarity_fn_name="dot"` gives the paper's dot product, without a `Normalize` module. To use
            such a model as it is, its way of cutting texts too, `poly_encoders.loading.load_model(path)`.
        reduction: `"first"` output, `"mean"` of all (for a new model), or `"first_m_mean"`.
        num_codes: For `"first_m_mean"`, how many outputs to average, m; 64 when left out.
        share_encoders: One encoder for both sides instead of two that start equal and are trained apart, as in the
            paper. A shared encoder has one tokenizer, and so one side to cut long texts on: the left, also for
            candidates.
        max_context_length, max_candidate_length: Tokens kept: the last of a context, the first of a candidate.
        turn_separator: Text between the turns of a conversation. For a new model a newline or, where the tokenizer
            drops newlines, its separator token.
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
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        reduction: Literal["first", "mean", "first_m_mean"] | None = None,
        num_codes: int | None = None,
        share_encoders: bool | None = None,
        max_context_length: int | None = None,
        max_candidate_length: int | None = None,
        turn_separator: str | None = None,
        max_turns: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_codes is not None and reduction != "first_m_mean":
            raise ValueError(
                f"num_codes={num_codes} belongs to reduction='first_m_mean', but the reduction is {reduction!r}."
            )
        if reduction not in (None, "first", "mean", "first_m_mean"):
            raise ValueError(f"reduction must be 'first', 'mean' or 'first_m_mean', got {reduction!r}.")
        num_codes = checked_count(num_codes, "num_codes")
        self._wishes: dict[str, Any] = {
            "reduction": reduction,
            "num_codes": num_codes,
            "share_encoders": share_encoders,
        }
        self._text = TextOptions(max_context_length, max_candidate_length, turn_separator, max_turns)
        self._saved: dict[str, Any] | None = None
        self._unchanged = kwargs.pop("_unchanged", False)  # load_model's: another's model stays what it is
        self._plain_dots = kwargs.get("similarity_fn_name") in ("dot", "dot_product")
        path = local_path(model_name_or_path)
        self._is_plain_encoder = path is None
        with clear_load_errors(path):
            super().__init__(path, **kwargs)
        if self._text.turn_separator is None:
            self._text.turn_separator = default_separator(self.tokenizer)
        if self._unchanged:
            return
        if self._is_plain_encoder and kwargs.get("similarity_fn_name") is None:
            self.similarity_fn_name = "dot"  # the paper's; a SentenceTransformer's checkpoint keeps its own
        self._set_up_encoders()

    @property
    def turn_separator(self) -> str:
        separator = self._text.turn_separator
        return TURN_SEPARATOR if separator is None else separator

    @property
    def max_turns(self) -> int | None:
        return self._text.max_turns

    @property
    def share_encoders(self) -> bool:
        """Whether one encoder reads both sides."""
        return not isinstance(self[0], Router)

    @property
    def scores_are_cosines(self) -> bool:
        """Whether scores lie between -1 and 1, so that a loss scales them."""
        has_normalize = any(isinstance(module, Normalize) for module in self.modules())
        return self.similarity_fn_name == "cosine" or (self.similarity_fn_name == "dot" and has_normalize)

    def length_limits(self) -> tuple[int, int]:
        """Tokens kept of a context and of a candidate, special tokens included."""
        return self._limit("query"), self._limit("document")

    def preprocess(
        self, inputs: Any, prompt: str | None = None, task: Task | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token features of one side, `(batch, length)`; contexts in any of their forms.

        A prompt stays before a context that is cut.
        """
        texts = self.side_texts(inputs, task)
        encoder = self._encoder(task)
        if self._unchanged or encoder is None:
            with UPSTREAM_READS:
                return super().preprocess(texts, prompt=prompt, task=task, **kwargs)
        tokenizer = encoder.tokenizer
        limit = kwargs.get("max_length") or self._limit(task)
        features = {**tokenized(tokenizer, texts, limit, tokenizer.truncation_side, prompt)}
        if prompt:  # what a pooling that leaves prompts out needs to know
            features["prompt_length"] = len(read_frame(tokenizer).before)
            features["prompt_length"] += len(plain_tokens(tokenizer, [prompt])["input_ids"][0])
        return {**features, "task": task, "modality": "text"}

    def reduction_options(self) -> dict[str, Any]:
        """How token vectors become one: `reduction`, and `num_codes` where it takes one; empty for another pooling."""
        pooling = self._pooling()
        if isinstance(pooling, FirstMMeanPooling):
            return {"reduction": "first_m_mean", "num_codes": pooling.m}
        if isinstance(pooling, Pooling) and pooling.pooling_mode in ("cls", "mean"):
            return {"reduction": "first" if pooling.pooling_mode == "cls" else "mean"}
        return {}

    def _encoder(self, task: Task | None) -> Transformer | None:
        """The text encoder of one side, where there is one at the front."""
        first: Any = self[0]
        if isinstance(first, Router):
            first = next(iter(first.sub_modules[task]), None) if task in first.sub_modules else None
        reads_text = isinstance(first, Transformer) and isinstance(first.tokenizer, PreTrainedTokenizerBase)
        return first if reads_text else None

    def _limit(self, task: Task | None) -> int:
        encoder = self._encoder(task)
        if encoder is None:
            return self.max_seq_length or 0
        return getattr(encoder, f"{task}_length", None) or encoder.tokenizer.model_max_length

    def _set_up_encoders(self) -> None:
        wishes: dict[Task, int | None] = {
            "query": self._text.max_context_length,
            "document": self._text.max_candidate_length,
        }
        for task, wish in wishes.items():
            encoder = self._encoder(task)
            if encoder is None:
                continue
            tokenizer, model = encoder.tokenizer, encoder.model
            make_ready(tokenizer)
            freeze_pooler(model)
            if self._saved is not None and wish is not None and not self.share_encoders:
                tokenizer.model_max_length = wish  # the limit that was saved there is an older wish
            encoder.max_seq_length = token_limit(tokenizer, model, None if self.share_encoders else wish)
            if self.share_encoders and wish is not None:
                setattr(encoder, f"{task}_length", token_limit(tokenizer, model, wish))
            side = "left" if self.share_encoders or task == "query" else "right"
            tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = side  # now, and in what is saved
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # as `tokenized` does
        if not self.share_encoders:
            # Where a text's side is not named, as in the Hub's widget and snippet, plain sentence-transformers takes it
            # for a candidate. Our own class asks.
            self[0].default_route = "document"

    # --- loading ---------------------------------------------------------------------------------------------------

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        refuse_poly_encoder(model_name_or_path, kwargs)
        self._is_plain_encoder = True
        modules, module_kwargs = super()._load_default_modules(model_name_or_path, **kwargs)
        return self._arranged(list(modules)), module_kwargs

    def _load_config_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        modules, module_kwargs = super()._load_config_modules(model_name_or_path, **kwargs)
        loaded = list(modules.values())
        if self._unchanged:
            return modules, module_kwargs
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
            return [Router.for_query_document(side, copy.deepcopy(side))]
        if self._wishes["share_encoders"]:
            raise ValueError("The checkpoint has an encoder for each side, which share_encoders=True would drop.")
        if missing := {"query", "document"} - router.sub_modules.keys():
            raise ValueError(f"The checkpoint has no modules for {sorted(missing)}, which a Bi-encoder needs.")
        query, document = (
            self._one_side([*router.sub_modules[name], *copy.deepcopy(modules[1:])]) for name in ("query", "document")
        )
        return [Router.for_query_document(query, document)]

    def _one_side(self, modules: list[nn.Module]) -> list[nn.Module]:
        encoder: Any = modules[0]
        if not isinstance(encoder, Transformer) or encoder.tokenizer is None:
            raise ValueError(f"A Bi-encoder is built on a text encoder, not on a {type(encoder).__name__}.")
        if self._plain_dots:
            modules = [module for module in modules if not isinstance(module, Normalize)]
        if self._wishes["reduction"] is None:
            return modules
        rest = [module for module in modules[1:] if not isinstance(module, (Pooling, FirstMMeanPooling))]
        return [encoder, self._new_pooling(encoder.get_embedding_dimension()), *rest]

    def _new_pooling(self, width: int) -> nn.Module:
        if self._wishes["reduction"] == "first_m_mean":
            return FirstMMeanPooling(width, self._wishes["num_codes"] or DEFAULT_NUM_CODES)
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
        if self._saved is not None:
            self._text = self._text.filled(self._saved)
            if "m" in self._saved:  # its name in models saved by version 0.1
                self._saved = {**self._saved, "num_codes": self._saved["m"]}

    # --- saving ----------------------------------------------------------------------------------------------------

    def _get_model_config(self) -> dict[str, Any]:
        config = super()._get_model_config()
        # Plain SentenceTransformer compares this with its own type, and subclasses share it.
        config["model_type"] = SentenceTransformer.model_type
        if not self._unchanged:
            ours = {"turn_separator": self.turn_separator, "max_turns": self.max_turns}
            config["poly_encoders"] = {"share_encoders": self.share_encoders, **ours, **self.reduction_options()}
        return config

    def _pooling(self) -> nn.Module | None:
        modules = list(self[0].sub_modules["query"]) if isinstance(self[0], Router) else list(self)
        return next((module for module in modules if isinstance(module, (Pooling, FirstMMeanPooling))), None)

    def _save_into(self, folder: str, *args: Any, **kwargs: Any) -> None:
        super()._save_into(folder, *args, **kwargs)
        if isinstance(self._pooling(), FirstMMeanPooling):
            _carry_pooling_code(Path(folder))


def _carry_pooling_code(folder: Path) -> None:
    """Save our pooling's source with the model, and name it so that sentence-transformers finds it there."""
    shutil.copyfile(first_m_pooling.__file__, folder / "first_m_pooling.py")
    for file in (folder / "modules.json", folder / "router_config.json"):
        if file.exists():
            text = file.read_text(encoding="utf-8").replace(_OURS, _BESIDE_THE_WEIGHTS)
            file.write_text(json.dumps(json.loads(text), indent=2), encoding="utf-8")


__all__ = ["BiEncoder"]
