# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of a Poly-encoder, Humeau et al., "Poly-encoders", ICLR 2020, arXiv:1905.01969, and its backbones.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import copy
import dataclasses
import difflib
import inspect
import math
import os
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import strict  # huggingface_hub's, by way of transformers

from .text_poly_encoder import TURN_SEPARATOR, checked_count

_NO_LIMIT = 10**9  # transformers gives more than this to a tokenizer that knows no limit
# Task -> the class of the file that travels beside the weights, and the Auto class that loads its model.
_PIPELINES = {"sentence-similarity": {"impl": "pipeline_poly_encoder.PolyEncoderPipeline", "pt": ["AutoModel"]}}


def _delegated(name: str) -> property:
    """A property that reads the context encoder's `name` and sets it on both encoders."""

    def read(config: "PolyEncoderConfig") -> Any:
        return getattr(config.context_encoder.get_text_config(), name)

    def write(config: "PolyEncoderConfig", value: Any) -> None:
        for encoder in (config.context_encoder, config.candidate_encoder):
            if encoder is not None:
                setattr(encoder.get_text_config(), name, value)

    return property(read, write)


@strict
class PolyEncoderConfig(PreTrainedConfig):
    r"""Configuration of a [`PolyEncoderModel`].

    Args:
        context_encoder (`PreTrainedConfig` or `dict`, *optional*, defaults to `BertConfig()`):
            The backbone that reads the context. A `dict` names its family in `model_type`.
        candidate_encoder (`PreTrainedConfig` or `dict`, *optional*):
            The backbone that reads a candidate, as wide as the context's. A copy of `context_encoder` when left out;
            `None` when `share_encoders=True`.
        share_encoders (`bool`, defaults to `False`):
            One backbone for both sides. The paper's encoders are separate (section 4.1).
        context_vectors (`str`, defaults to `"learnt_codes"`):
            How a context becomes m vectors. The paper's kinds (section 4.4): `"learnt_codes"`, m learnt queries that
            attend over all hidden states; `"first_m"` and `"last_m"`, the first or last m hidden states;
            `"first_and_last_m"`, the last m and the first one, m + 1 vectors in all. Ours: `"turns"`, one vector for
            each of the last m turns, the mean of its tokens' hidden states, which have all read the whole context
            (late chunking, arXiv:2409.04701, with turns as chunks); `"turns_and_codes"`, m of either, 2 m in all.
        num_codes (`int`, defaults to 64):
            m, the number of context vectors, for all kinds. At least 1.
        reduction (`str`, defaults to `"mean"`):
            How a candidate becomes one vector (section 4.2): `"first"` hidden state, `"mean"` of all,
            or `"first_m_mean"`, the mean of the first m (`num_codes`). `candidate_vector` is an older name of it.
        code_attention, final_attention (`str`, defaults to `"basic"`):
            Attention of the codes over the context, and of the candidate over the context vectors: `"basic"` takes
            dot products as they are, `"sqrt"` divides them by the square root of the width.
        normalize (`bool`, defaults to `False`):
            Scale candidate vectors, the vectors of turns and those of codes to length 1, so that scores are cosines.
        final_temperature (`float`, defaults to 1.0):
            T of the final attention, `sum_i softmax(d / T)_i d_i`. Cosines need one well below 1, such as 0.025.
        learn_final_temperature (`bool`, defaults to `False`):
            T is a weight, `exp(log_temperature)`, that starts at `final_temperature`.
        last_turn_share (`float`, defaults to 0.0):
            s, how much of the last turn, which a reply answers first of all, is in each turn's (or code's) vector:
            `y_t = s u_last + (1 - s) u_t`. From 0 to below 1. With `normalize` every u has length 1, y_t at most 1.
        learn_last_turn_share (`bool`, defaults to `False`):
            s is a weight, `sigmoid(last_turn_logit)`, that starts at `last_turn_share`, which may not be 0 then.
        max_turn_length (`int`, *optional*, defaults to 64):
            A turn of more tokens, as a document is, is split into windows of about equal length, at most this.
        turn_boundary_ids (`list[int]`, *optional*):
            Where token ids come without `turn_ids`, turns are what lies between these tokens. All is one turn when
            left out. `PolyEncoder` sets it for its tokenizer and turn separator.
        output_scaling (`float`, defaults to 1.0):
            A factor on the hidden states of both backbones. The paper's models use 0.06.
        code_std (`float`, defaults to 0.05):
            Standard deviation of new codes. Near zero a fresh model attends evenly, and on a mean-pooled checkpoint
            ranks as that checkpoint does; but all codes then learn the same. `PolyEncoder` starts a new model with
            cosines at 0.5, where each code looks at other tokens from the first step.
        max_context_length, max_candidate_length (`int`, *optional*):
            Tokens kept of a context (its last) and of a candidate (its first). All that the backbones and the
            tokenizer allow when left out. The paper keeps 360 and 72.
        turn_separator (`str`, defaults to `"\n"`):
            The text put between the turns of a conversation.
        max_turns (`int`, *optional*):
            Turns kept of a conversation (its last). All when left out. The paper keeps 20.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type, or not among those listed.
        StrictDataclassClassValidationError: a value out of range, or encoders of different widths.

    Example:
        >>> PolyEncoderConfig(num_codes=16, hidden_size=32, num_attention_heads=4).num_context_vectors
        16
    """

    model_type = "poly-encoder"
    #: Whether `transformers.pipeline` knows our task by itself, as it does once poly_encoders is imported.
    pipeline_is_registered: ClassVar[bool] = False
    attribute_map = {"candidate_vector": "reduction"}  # noqa: RUF012
    sub_configs = {"context_encoder": AutoConfig, "candidate_encoder": AutoConfig}  # noqa: RUF012  (upstream's form)

    context_encoder: Any = None  # given as PreTrainedConfig, dict or None; always a PreTrainedConfig afterwards
    candidate_encoder: Any = None  # likewise, or None for shared encoders
    share_encoders: bool = False
    context_vectors: Literal["learnt_codes", "first_m", "last_m", "first_and_last_m", "turns", "turns_and_codes"] = (
        "learnt_codes"
    )
    num_codes: int = 64
    reduction: Literal["first", "mean", "first_m_mean"] = "mean"
    code_attention: Literal["basic", "sqrt"] = "basic"
    final_attention: Literal["basic", "sqrt"] = "basic"
    normalize: bool = False
    final_temperature: int | float = 1.0
    learn_final_temperature: bool = False
    last_turn_share: int | float = 0.0
    learn_last_turn_share: bool = False
    max_turn_length: int | None = 64
    turn_boundary_ids: list[int] | None = None
    output_scaling: int | float = 1.0
    code_std: int | float = 0.05
    max_context_length: int | None = None
    max_candidate_length: int | None = None
    turn_separator: str = TURN_SEPARATOR
    max_turns: int | None = None

    # What transformers and DeepSpeed read of any configuration; a value set here reaches both encoders.
    hidden_size = _delegated("hidden_size")
    num_attention_heads = _delegated("num_attention_heads")
    num_hidden_layers = _delegated("num_hidden_layers")
    vocab_size = _delegated("vocab_size")

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("custom_pipelines", None)  # read from config.json, but a constant
        if "candidate_vector" in kwargs:
            self.reduction = kwargs.pop("candidate_vector")  # upstream would set it unchecked
        self.refuse_misspelt(kwargs)
        self.context_encoder = _resolve_encoder(self.context_encoder, "context_encoder") or BertConfig()
        self.candidate_encoder = _resolve_encoder(self.candidate_encoder, "candidate_encoder")
        if self.candidate_encoder is None and not self.share_encoders:
            self.candidate_encoder = copy.deepcopy(self.context_encoder)
        super().__post_init__(**kwargs)

    @property
    def num_context_vectors(self) -> int:
        """Vectors a context becomes: m, m + 1 for `"first_and_last_m"`, 2 m for `"turns_and_codes"`."""
        more = {"first_and_last_m": 1, "turns_and_codes": self.num_codes}
        return self.num_codes + more.get(self.context_vectors, 0)

    @property
    def has_codes(self) -> bool:
        """Whether codes are learnt."""
        return self.context_vectors in ("learnt_codes", "turns_and_codes")

    @property
    def has_turns(self) -> bool:
        """Whether the turns of a context have vectors."""
        return self.context_vectors in ("turns", "turns_and_codes")

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """Where `transformers.pipeline` finds the pipeline: its task, and the class in the file beside the weights.

        Empty where it is registered already, because `pipeline` asks for `trust_remote_code=True` whenever this is not.
        A new `dict` each time, because `pipeline` writes classes into it, which could not be saved.
        """
        return {} if self.pipeline_is_registered else copy.deepcopy(_PIPELINES)

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """Ignored: what `Pipeline.save_pretrained` sets is what is there."""

    def to_dict(self) -> dict[str, Any]:
        """As upstream's, with `custom_pipelines` in full."""
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(_PIPELINES)}

    @classmethod
    def own_fields(cls) -> frozenset[str]:
        """Names of the fields that this class adds to `PreTrainedConfig`'s."""
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        return frozenset(field.name for field in dataclasses.fields(cls)) - inherited

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "PolyEncoderConfig":
        """As upstream's, but refuses the configuration of another architecture, which upstream loads with a warning.

        Raises:
            ValueError: `model_type` is there and is not `"poly-encoder"`.
        """
        model_type = config_dict.get("model_type")
        if model_type not in (None, cls.model_type):
            raise ValueError(
                f"This is a checkpoint of the architecture {model_type!r}; PolyEncoderModel loads {cls.model_type!r}. "
                "To build a Poly-encoder on such a backbone, use PolyEncoderModel.from_encoders_pretrained(path) or "
                "poly_encoders.PolyEncoder(path)."
            )
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The context encoder's configuration, which stands for the text side wherever transformers asks for one."""
        return self.context_encoder.get_text_config(decoder=decoder, encoder=encoder)

    def validate_num_codes(self) -> None:
        if isinstance(self.num_codes, bool) or self.num_codes < 1:
            raise ValueError(
                f"num_codes must be a whole number of at least 1, got {self.num_codes!r}. "
                "A model without context vectors is a Bi-encoder: use poly_encoders.BiEncoder."
            )

    def validate_factors(self) -> None:
        if not (math.isfinite(self.output_scaling) and self.output_scaling > 0):
            raise ValueError(f"output_scaling must be a positive finite number, got {self.output_scaling!r}.")
        if not (math.isfinite(self.code_std) and self.code_std >= 0):
            raise ValueError(f"code_std must be a finite number of at least 0, got {self.code_std!r}.")
        if not (math.isfinite(self.final_temperature) and self.final_temperature > 0):
            raise ValueError(f"final_temperature must be a positive finite number, got {self.final_temperature!r}.")

    def validate_last_turn_share(self) -> None:
        if not 0 <= self.last_turn_share < 1:
            raise ValueError(f"last_turn_share must be at least 0 and below 1, got {self.last_turn_share!r}.")
        if (self.last_turn_share or self.learn_last_turn_share) and not self.has_turns:
            raise ValueError(
                f"last_turn_share is for context_vectors 'turns' and 'turns_and_codes', not {self.context_vectors!r}."
            )
        if self.learn_last_turn_share and not self.last_turn_share:
            raise ValueError("A last_turn_share that is learnt starts above 0; give one, such as 0.5.")

    def validate_lengths(self) -> None:
        for name in ("max_context_length", "max_candidate_length", "max_turns", "max_turn_length"):
            checked_count(getattr(self, name), name)

    def validate_encoders(self) -> None:
        if self.share_encoders:
            if self.candidate_encoder is not None:
                raise ValueError(
                    "share_encoders=True means one encoder, but a candidate_encoder was given as well. "
                    "Leave candidate_encoder out, or set share_encoders=False."
                )
            return
        widths = [config.get_text_config().hidden_size for config in (self.context_encoder, self.candidate_encoder)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"The context encoder is {widths[0]} wide, the candidate encoder {widths[1]}; their vectors are "
                "multiplied, so the widths must be equal. Choose two backbones with the same hidden_size."
            )

    def refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        """Raise a ValueError where a name is nearly one of ours."""
        # transformers keeps any unknown keyword as an attribute, so a misspelt one would silently do nothing.
        for name in kwargs.keys() - self.own_fields():
            if close := difflib.get_close_matches(name, self.own_fields(), n=1, cutoff=0.85):
                raise ValueError(f"PolyEncoderConfig has no option {name!r}. Did you mean {close[0]!r}?")


def _resolve_encoder(encoder: Any, name: str) -> PreTrainedConfig | None:
    if encoder is None or isinstance(encoder, PreTrainedConfig):
        return encoder
    options = dict(encoder)
    model_type = options.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"{name} is a dict without 'model_type', so its family is unknown. Add it, e.g. "
            f'{name}={{"model_type": "bert", ...}}, or pass a configuration object.'
        )
    return AutoConfig.for_model(model_type, **options)


# --- the backbones that configurations mean -------------------------------------------------------------------------


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights."""
    auto_class, _, options = _backbone_recipe(config)
    return _encoder_of(auto_class.from_config(config, **options))


def load_backbone(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The backbone at a local folder or a Hub id, as `from_pretrained` loads it with these arguments.

    Raises:
        OSError: it is not there, or weights are missing.
        ValueError: it is a Poly-encoder, or does not read text.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    hub = {name: kwargs[name] for name in names if name in kwargs}
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    if isinstance(config, PolyEncoderConfig):
        raise ValueError(
            f"{path} is itself a Poly-encoder. Load it with PolyEncoderModel.from_pretrained, or name the checkpoint "
            "of its backbone here."
        )
    auto_class, model_class, options = _backbone_recipe(config)
    if model_class is None:  # code of the checkpoint's own
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **options, **kwargs)
    else:
        # A class of our own for a moment, so that a pooler's weights, unused on purpose, are not reported.
        ignored = [*(model_class._keys_to_ignore_on_load_unexpected or []), r"pooler\."]
        quiet: Any = type(model_class.__name__, (model_class,), {"_keys_to_ignore_on_load_unexpected": ignored})
        model, info = quiet.from_pretrained(path, config=config, output_loading_info=True, **options, **kwargs)
        model.__class__ = model_class
    if missing := sorted(info["missing_keys"]):
        raise OSError(
            f"The checkpoint {path} does not hold {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} "
            f"({len(missing)} weights in all) of the {config.model_type} that its config.json describes. "
            "Download or save it again."
        )
    encoder = _encoder_of(model)
    if not isinstance(encoder.get_input_embeddings(), nn.Embedding):
        raise ValueError(f"{path} holds a {config.model_type} model, which does not read text. Name a text encoder.")
    return encoder


def _backbone_recipe(config: PreTrainedConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The Auto class and, if it is transformers' own, the class of such a backbone, and arguments its family needs."""
    is_text_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # encoders alone of T5 and its kin
    mapping = MODEL_FOR_TEXT_ENCODING_MAPPING if is_text_encoder else MODEL_MAPPING
    found = mapping.get(type(config), None)
    model_class = found if inspect.isclass(found) else None
    takes_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    # A pooler would be a parameter without a gradient, which distributed training refuses.
    options = {"add_pooling_layer": False} if takes_pooler else {}
    return AutoModelForTextEncoding if is_text_encoder else AutoModel, model_class, options


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def position_limit(encoder: PreTrainedModel) -> int | None:
    """The longest input the backbone has positions for, special tokens included; `None` where there is no limit.

    RoBERTa and its kin count positions from `padding_idx + 1`, so 514 rows of embeddings hold 512 positions.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def token_limit(tokenizer: Any, encoder: PreTrainedModel, wanted: int | None = None) -> int:
    """Tokens to keep of a text: the smallest of the wishes and limits, special tokens included.

    Raises:
        ValueError: what is left does not even hold the special tokens.
    """
    limits = [wanted, tokenizer.model_max_length, position_limit(encoder), _NO_LIMIT]
    limit = min(limit for limit in limits if limit is not None)
    special = tokenizer.num_special_tokens_to_add()
    if limit <= special:
        raise ValueError(
            f"At most {limit} tokens are kept of a text, but the tokenizer adds {special} special tokens, which leaves "
            "no room for the text. Raise max_context_length or max_candidate_length."
        )
    return int(limit)


__all__ = ["PolyEncoderConfig"]
