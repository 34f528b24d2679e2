# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder: Humeau et al., "Poly-encoders", ICLR 2020, arXiv:1905.01969, section 4.4.

    y_i   = sum_j softmax_j(c_i . h_j) h_j      one context vector per learnt code c_i over the hidden states h
    y(x)  = sum_i softmax_i(x . y_i) y_i        the candidate vector x attends over the context vectors
    score = x . y(x)

Departures: padding is masked out of every softmax, which the paper leaves implicit, and y(x) is never built, because
with d_i = x . y_i the score is sum_i softmax(d)_i d_i.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import contextlib
import copy
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_poly_encoder import PolyEncoderConfig

if TYPE_CHECKING:
    # Never imported here: transformers reads in a model's code which other files belong to it, and copies those with it
    # wherever the model is saved or fetched, also where this package is not installed.
    from .endpoint import Endpoint  # noqa: F401
    from .handler import EndpointHandler  # noqa: F401
    from .pipeline_poly_encoder import PolyEncoderPipeline  # noqa: F401

logger = logging.get_logger(__name__)


def poly_score(context: Tensor, candidates: Tensor, scale: float = 1.0) -> Tensor:
    """Score every candidate against every context: `sum_i softmax(scale d)_i d_i` with `d_i = x . y_i`.

    Args:
        context: `(batch, m, dim)` context vectors. An all-zero vector is padding and takes no part.
        candidates: `(n, dim)` candidate vectors shared by the batch, or `(batch, n, dim)`, a set per context.
        scale: Factor on the dots inside the softmax: 1 for basic attention, `dim ** -0.5` for sqrt.

    Returns:
        `(batch, n)` scores: raw dot products, unbounded, comparable only within a row. They are computed and returned
        in float32 (float64 for float64 inputs), under autocast as well: half precision would tie close candidates.

    Raises:
        ValueError: the shapes do not fit together.
    """
    dots, weights = poly_attention(context, candidates, scale)
    return (weights * dots).sum(dim=-1)


def poly_attention(context: Tensor, candidates: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `poly_score` is made of, arguments and errors as there.

    Returns:
        The dots `d_i = x . y_i` and their weights `softmax(scale d)`, 0 for padding: both `(batch, n, m)`, float32
        (float64 for float64 inputs).
    """
    check_vectors(context, candidates)
    with maybe_autocast(device_type=context.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(context.dtype, candidates.dtype), torch.float32)
        context, candidates = context.to(dtype), candidates.to(dtype)
        if candidates.dim() == 2:
            # One flat product, as in poly_encoders.scoring, so that both give the same bits.
            dots = (candidates @ context.flatten(0, 1).T).unflatten(1, context.shape[:2]).transpose(0, 1)
        else:
            dots = torch.einsum("bmd,bnd->bnm", context, candidates)
        padding = (context == 0).all(dim=-1)[:, None]  # (batch, 1, m)
        weights = (dots * scale).masked_fill(padding, torch.finfo(dtype).min).softmax(dim=-1)
    return dots, weights


def check_vectors(context: Tensor, candidates: Tensor) -> None:
    """Raise a ValueError that says what is wrong with the shapes, if they are not as `poly_score` takes them."""
    if context.dim() != 3 or candidates.dim() not in (2, 3):
        raise ValueError(
            f"Context vectors have shape {tuple(context.shape)}, candidate vectors {tuple(candidates.shape)}; expected "
            "(batch, m, dim) and (n, dim) or (batch, n, dim). Encode contexts with get_context_features (encode_query) "
            "and candidates with get_candidate_features (encode_document)."
        )
    if context.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"Context vectors are {context.shape[-1]} wide, candidate vectors {candidates.shape[-1]}; they must match. "
            "Encode both with one model, or rebuild the candidate cache."
        )
    if candidates.dim() == 3 and context.shape[0] != candidates.shape[0]:
        raise ValueError(
            f"There are {context.shape[0]} contexts but {candidates.shape[0]} sets of candidates. Pass one set per "
            "context, (batch, n, dim), or one set for all of them, (n, dim)."
        )


@dataclass
class PolyEncoderOutput(ModelOutput):
    """What [`PolyEncoderModel`] returns; a field is `None` where its inputs or the request for it are missing.

    Attributes:
        loss: Scalar, float32. Cross-entropy of the labelled candidate among those scored with it.
        scores: `(batch, n)`, float32. Raw, unbounded, comparable within a row.
        context_vectors: `(batch, m, dim)`; all-zero vectors are padding.
        candidate_vectors: `(n, dim)`, or `(batch, n, dim)` for candidates per context.
        hidden_states, attentions: The context encoder's, one tensor a layer.
        candidate_hidden_states, candidate_attentions: The candidate encoder's, `batch * n` rows for candidates per
            context.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    context_vectors: Tensor | None = None
    candidate_vectors: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    candidate_hidden_states: tuple[Tensor, ...] | None = None
    candidate_attentions: tuple[Tensor, ...] | None = None


class PolyEncoderModel(PreTrainedModel):
    """Two backbones, m context vectors, one vector a candidate, and the attention between them as the score.

    Args:
        config: The configuration; the backbones are built from it with random weights.
        context_encoder, candidate_encoder: Ready backbones to use instead, as `from_encoders_pretrained` does.
    """

    config_class = PolyEncoderConfig
    base_model_prefix = "poly_encoder"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: PolyEncoderConfig,
        context_encoder: PreTrainedModel | None = None,
        candidate_encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.context_encoder = self._adopt("context_encoder", context_encoder)
        if not config.share_encoders:
            # One registered module where encoders are shared: one set of weights in memory and in the file. Registered
            # by hand, because the name is a property too, which is there in either case.
            self._modules["candidate_encoder"] = self._adopt("candidate_encoder", candidate_encoder)
        if config.context_vectors == "learnt_codes":
            self.codes = nn.Parameter(torch.empty(config.num_codes, config.hidden_size))
        towers = (self.context_encoder, self.candidate_encoder)
        self.supports_gradient_checkpointing = all(tower.supports_gradient_checkpointing for tower in towers)
        # What sentence_transformers.SentenceTransformer calls when it is pointed at a Poly-encoder by mistake.
        self.get_text_features = _refuse_one_vector
        self.post_init()

    def _adopt(self, name: str, encoder: PreTrainedModel | None) -> PreTrainedModel:
        if encoder is None:
            encoder = _build_backbone(getattr(self.config, name))
        # One configuration object for the tower and for our config's part, so that later changes reach both.
        setattr(self.config, name, encoder.config)
        return encoder

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.context_vectors == "learnt_codes":
            init.normal_(self.codes, mean=0.0, std=self.config.code_std)

    @property
    def candidate_encoder(self) -> PreTrainedModel:
        """The backbone that reads candidates; the context's own where encoders are shared."""
        return self._modules.get("candidate_encoder") or self.context_encoder

    @property
    def final_scale(self) -> float:
        """Factor on the dots in the final attention's softmax; give it to `poly_score` for this model's vectors."""
        return self._attention_scale(self.config.final_attention)

    def _attention_scale(self, kind: Literal["basic", "sqrt"]) -> float:
        return self.config.hidden_size**-0.5 if kind == "sqrt" else 1.0

    @classmethod
    def from_encoders_pretrained(
        cls, context: str | os.PathLike[str], candidate: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> "PolyEncoderModel":
        """Build a Poly-encoder on two pre-trained backbones; only the codes are new.

        Args:
            context: Local folder or Hub id of the context's backbone.
            candidate: The same for the candidate's. The context's when left out: the two start equal and are trained
                apart, as in the paper, or are one with `share_encoders=True`.
            **kwargs: Fields of [`PolyEncoderConfig`] (`num_codes=16`); all others go to both backbones'
                `from_pretrained` (`revision`, `token`, `dtype`, `attn_implementation`, ...).

        Returns:
            The model, in evaluation mode. Train it: a fresh one only ranks as its backbones do.

        Raises:
            OSError: a checkpoint is not there.
            ValueError: a candidate backbone together with `share_encoders=True`.
        """
        ours = {name: kwargs.pop(name) for name in PolyEncoderConfig.own_fields() & kwargs.keys()}
        if ours.get("share_encoders") and candidate is not None:
            raise ValueError("share_encoders=True takes one checkpoint; leave `candidate` out, or train two encoders.")
        context_encoder = _load_backbone(context, **kwargs)
        candidate_encoder = None
        if not ours.get("share_encoders"):
            if candidate is None or candidate == context:
                candidate_encoder = copy.deepcopy(context_encoder)
            else:
                candidate_encoder = _load_backbone(candidate, **kwargs)
        # Copies, because a new composite configuration resets the attention of its parts; _adopt brings theirs back.
        config = PolyEncoderConfig(
            context_encoder=copy.deepcopy(context_encoder.config),
            candidate_encoder=None if candidate_encoder is None else copy.deepcopy(candidate_encoder.config),
            attn_implementation=context_encoder.config._attn_implementation,
            **ours,
        )
        model = cls(config, context_encoder, candidate_encoder).to(context_encoder.device, context_encoder.dtype)
        logger.warning_once("The codes of this Poly-encoder are new: train it before you rely on its scores.")
        return model.eval()

    # --- the two sides -------------------------------------------------------------------------------------------

    def get_context_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Encode contexts.

        Args:
            input_ids: `(batch, length)` int64 token ids.
            attention_mask: `(batch, length)`, 1 for a token and 0 for padding, on either side. All ones by default.
            token_type_ids: `(batch, length)`; ignored by backbones that know none.
            position_ids: `(batch, length)`; the backbone's own by default.
            inputs_embeds: `(batch, length, embedding size)`, in place of `input_ids`.

        Returns:
            `(batch, m, dim)` context vectors; where a context has fewer than m tokens, the rest is all-zero.
        """
        inputs = _backbone_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.reduce_context(self.run_encoder("context", inputs).last_hidden_state, inputs["attention_mask"])

    def get_candidate_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Encode candidates; arguments as for `get_context_features`, with `(n, length)`.

        Returns:
            `(n, dim)` candidate vectors. They depend on nothing else, so they can be kept.
        """
        inputs = _backbone_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.reduce_candidate(self.run_encoder("candidate", inputs).last_hidden_state, inputs["attention_mask"])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        candidate_input_ids: Tensor | None = None,
        candidate_attention_mask: Tensor | None = None,
        candidate_token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
    ) -> PolyEncoderOutput:
        """Encode contexts, and candidates where given; score them, and take the loss where labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: The contexts, as for
                `get_context_features`.
            candidate_input_ids: `(n, length)`, shared by the batch, or `(batch, n, length)`, a set per context.
            candidate_attention_mask, candidate_token_type_ids: Of the same shape as `candidate_input_ids`.
            labels: `(batch,)` int64, the index of the right candidate in its row of scores.
            output_attentions, output_hidden_states: Return those of both backbones; a list of layers keeps only theirs.
            return_dict: `False` returns a plain tuple without the empty fields.

        Raises:
            ValueError: no contexts, labels without candidates, or shapes that do not fit.
        """
        options = self._output_options(output_attentions, output_hidden_states)
        inputs = _backbone_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        context = self.run_encoder("context", inputs, **options)
        context_vectors = self.reduce_context(context.last_hidden_state, inputs["attention_mask"])
        output = PolyEncoderOutput(
            context_vectors=context_vectors,
            hidden_states=context.hidden_states,
            attentions=context.attentions,
        )
        if candidate_input_ids is None:
            if labels is not None:
                raise ValueError("labels name the right candidate, but no candidate_input_ids were given.")
            return output

        leading = candidate_input_ids.shape[:-1]  # (n,) or (batch, n)
        flat = [
            None if tensor is None else tensor.flatten(0, -2)
            for tensor in (candidate_input_ids, candidate_attention_mask, candidate_token_type_ids)
        ]
        inputs = _backbone_inputs(*flat)
        candidates = self.run_encoder("candidate", inputs, **options)
        vectors = self.reduce_candidate(candidates.last_hidden_state, inputs["attention_mask"])
        candidate_vectors = vectors.unflatten(0, leading)
        output.candidate_vectors = candidate_vectors
        output.candidate_hidden_states = candidates.hidden_states
        output.candidate_attentions = candidates.attentions
        output.scores = poly_score(context_vectors, candidate_vectors, self.final_scale)
        if labels is not None:
            output.loss = cross_entropy(output.scores, labels)
        return output

    def _output_options(self, attentions: bool | None, hidden_states: bool | list[int] | None) -> dict[str, Any]:
        return {
            "output_attentions": self.config.output_attentions if attentions is None else attentions,
            "output_hidden_states": self.config.output_hidden_states if hidden_states is None else hidden_states,
        }

    def run_encoder(self, side: Literal["context", "candidate"], inputs: dict[str, Tensor], **options: Any) -> Any:
        """One backbone's output for `inputs` of `input_ids`, `attention_mask`, ...; what it cannot take is left out.

        `last_hidden_state`, `(n, length, dim)`, carries `output_scaling`.
        """
        encoder = self.context_encoder if side == "context" else self.candidate_encoder
        accepted = _accepted_inputs(type(encoder))
        if "position_ids" in accepted and "position_ids" not in inputs and _is_causal(encoder.config):
            # Left padding must not move a causal model's positions; encoders count for themselves.
            inputs = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)}
        if "use_cache" in accepted:
            options["use_cache"] = False
        output: BaseModelOutput = encoder(
            **{name: tensor for name, tensor in inputs.items() if name in accepted}, **options, return_dict=True
        )
        # With a device_map the two backbones may be on two devices, but their vectors meet.
        hidden = output.last_hidden_state.to(inputs["attention_mask"].device)
        output.last_hidden_state = hidden * self.config.output_scaling
        return output

    def reduce_context(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Context vectors `(batch, m, dim)` from hidden states `(batch, length, dim)` and their mask (section 4.4)."""
        if self.config.context_vectors != "learnt_codes":
            return self._take_context_tokens(hidden, attention_mask)
        weights = self.context_attention(hidden, attention_mask).to(hidden.dtype)
        return torch.einsum("bml,bld->bmd", weights, hidden).to(hidden.dtype)

    def context_attention(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """How much of each token is in each context vector; arguments as for `reduce_context`.

        Returns:
            `(batch, m, length)` weights, float32 (float64 for float64 hidden states). Each row sums to 1: over all
            tokens for learnt codes, on the one token taken for the other kinds; a row of padding is all-zero.
        """
        if self.config.context_vectors != "learnt_codes":
            precise = torch.promote_types(hidden.dtype, torch.float32)
            each = torch.eye(hidden.shape[1], dtype=precise, device=hidden.device).expand(len(hidden), -1, -1)
            return self._take_context_tokens(each, attention_mask)
        # A fresh product, so always aligned in memory: a loaded model computes bit for bit what the saved one did.
        codes = (self.codes * self._attention_scale(self.config.code_attention)).to(hidden.device, hidden.dtype)
        logits = torch.einsum("md,bld->bml", codes, hidden)
        logits = logits.masked_fill(attention_mask[:, None] == 0, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _take_context_tokens(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """Of `(batch, length, width)` values those of the tokens that become context vectors, `(batch, m, width)`."""
        kind, m = self.config.context_vectors, self.config.num_codes
        if kind == "first_m":
            return _take_tokens(values, attention_mask, m)
        last = _take_tokens(values, attention_mask, m, from_end=True)
        if kind == "last_m":
            return last
        return torch.cat([_take_tokens(values, attention_mask, 1), last], dim=1)

    def reduce_candidate(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Candidate vectors `(n, dim)` from hidden states `(n, length, dim)` and their mask (section 4.2)."""
        if self.config.candidate_vector == "first":
            return _take_tokens(hidden, attention_mask, 1)[:, 0]
        mask = attention_mask != 0
        if self.config.candidate_vector == "first_m_mean":
            mask = mask & (mask.cumsum(dim=-1) <= self.config.num_codes)
        weights = mask[..., None].to(hidden.dtype)
        total = (hidden * weights).sum(dim=1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (total / mask.sum(dim=-1, keepdim=True).clamp(min=1)).to(hidden.dtype)

    # --- what transformers expects of a composite model ------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.context_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.context_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary of both backbones; arguments and result as upstream's, for the context's backbone."""
        embeddings = self.context_encoder.resize_token_embeddings(*args, **kwargs)
        if not self.config.share_encoders:
            self.candidate_encoder.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = embeddings.num_embeddings
        return embeddings

    def enable_input_require_grads(self) -> None:
        for tower in {self.context_encoder, self.candidate_encoder}:
            tower.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        for tower in {self.context_encoder, self.candidate_encoder}:
            tower.disable_input_require_grads()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As upstream's, but written beside the folder and moved in when complete: a failed save changes nothing."""
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with staged_folder(save_directory) as staging:
            return super().save_pretrained(staging, **kwargs)


def _refuse_one_vector(**_: Any) -> NoReturn:
    raise TypeError(
        "This is a Poly-encoder: a text has no single vector, and which side it is on matters. Load it with "
        "poly_encoders.PolyEncoder(path), then call encode_query, encode_document or rank."
    )


def _take_tokens(hidden: Tensor, attention_mask: Tensor, m: int, from_end: bool = False) -> Tensor:
    """The first or last m hidden states that are not padding, in order: `(batch, m, dim)`, all-zero where none is left.

    Works for padding on either side, and of any size.
    """
    real = attention_mask != 0
    lengths = real.sum(dim=-1, keepdim=True)  # (batch, 1)
    order = torch.argsort(real, dim=-1, descending=True, stable=True)  # positions, real tokens first
    rank = torch.arange(m, device=hidden.device)[None]  # (1, m)
    start = (lengths - m).clamp(min=0) if from_end else torch.zeros_like(lengths)
    index = order.gather(1, (rank + start).clamp(max=hidden.shape[1] - 1))
    taken = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return taken.masked_fill((rank >= lengths)[..., None], 0.0)


def _backbone_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> dict[str, Tensor]:
    """The given inputs without the `None`s, with a mask of ones where there is none."""
    shaped = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
    if shaped is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give the texts as input_ids (batch, length) or as inputs_embeds, one of the two.")
    if shaped.dim() != 2:
        raise ValueError(f"Token inputs must have shape (batch, length), got {tuple(shaped.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones(shaped.shape, dtype=torch.long, device=shaped.device)
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
    }
    return {name: tensor for name, tensor in given.items() if tensor is not None}


# --- backbones -------------------------------------------------------------------------------------------------------


def _accepted_inputs(model_class: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _is_causal(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _backbone_recipe(config: PreTrainedConfig) -> tuple[type, dict[str, Any]]:
    """The Auto class that makes a backbone of this configuration, and the arguments its family needs."""
    mapping = MODEL_FOR_TEXT_ENCODING_MAPPING  # encoders alone of T5 and its kin
    auto_class: type = AutoModelForTextEncoding
    if type(config) not in mapping:
        mapping, auto_class = MODEL_MAPPING, AutoModel
    model_class = mapping.get(type(config), None)
    takes_pooler = inspect.isclass(model_class) and "add_pooling_layer" in inspect.signature(model_class).parameters
    # A pooler would be a parameter without a gradient, which distributed training refuses.
    return auto_class, {"add_pooling_layer": False} if takes_pooler else {}


def _build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    auto_class, options = _backbone_recipe(config)
    return _encoder_of(auto_class.from_config(config, **options))  # type: ignore[attr-defined]


def _load_backbone(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    hub = {
        name: kwargs[name]
        for name in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        if name in kwargs
    }
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    if isinstance(config, PolyEncoderConfig):
        raise ValueError(
            f"{path} is itself a Poly-encoder. Load it with PolyEncoderModel.from_pretrained, or name the checkpoint "
            "of its backbone here."
        )
    auto_class, options = _backbone_recipe(config)
    with _quiet_about_poolers(config):
        model, info = auto_class.from_pretrained(  # type: ignore[attr-defined]
            path, output_loading_info=True, **options, **kwargs
        )
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


@contextlib.contextmanager
def _quiet_about_poolers(config: PreTrainedConfig) -> Iterator[None]:
    """Within the block, a pooler's weights that go unused on purpose are not reported as unexpected."""
    model_class = MODEL_MAPPING.get(type(config), None)
    name = "_keys_to_ignore_on_load_unexpected"
    if not inspect.isclass(model_class):
        yield
        return
    before = getattr(model_class, name)
    setattr(model_class, name, [*(before or []), r"pooler\."])
    try:
        yield
    finally:
        setattr(model_class, name, before)


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


# --- saving ----------------------------------------------------------------------------------------------------------

_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@contextlib.contextmanager
def staged_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """A new folder to write a checkpoint into; its files move to `path` when the block ends well.

    Other files in `path` stay, except weights that the new ones replace under other names (another number of shards).
    An error, in the block or while the files move, leaves `path` as it was.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    target = Path(path)
    if target.is_file():
        raise NotADirectoryError(f"A checkpoint is a folder, but {path} is a file. Choose another path.")
    is_new = not target.exists()
    # A new checkpoint appears in one rename. One that is there may be a mount point, so its staging folder is inside.
    home = target.parent if is_new else target
    home.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".saving", dir=home))
    try:
        yield str(staging)
        if is_new:
            staging.chmod(0o777 & ~_umask())
            staging.rename(target)
        else:
            _replace_files(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_files(source: Path, target: Path) -> None:
    """Move every file of `source` to `target`, all or none; weights of the old checkpoint that are not replaced go."""
    names = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    stale: list[Path] = []
    if any(_WEIGHT_FILES.fullmatch(str(name)) for name in names):
        found = [Path(file.name) for file in target.iterdir() if _WEIGHT_FILES.fullmatch(file.name)]
        stale = [name for name in found if name not in names]
    kept = Path(tempfile.mkdtemp(dir=source))  # the old files, until all the new ones are in place
    put_away: list[Path] = []
    put_in: list[Path] = []
    try:
        for name in [*names, *stale]:
            if (target / name).exists():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).replace(kept / name)
                put_away.append(name)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).replace(target / name)
            put_in.append(name)
    except BaseException:
        for name in put_in:
            (target / name).unlink(missing_ok=True)
        for name in put_away:
            os.replace(kept / name, target / name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["PolyEncoderModel", "PolyEncoderOutput", "check_vectors", "poly_attention", "poly_score", "staged_folder"]
