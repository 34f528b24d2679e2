# Copyright 2026 The poly-encoders authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Poly-encoder: Humeau et al., "Poly-encoders", ICLR 2020, arXiv:1905.01969, section 4.4.

    y_i = sum_j softmax_j(c_i . h_j) h_j        one context vector per learnt code c_i over the hidden states h

Padding is masked out of the softmax, which the paper leaves implicit. scoring_poly_encoder.py has the rest: the
attention of a candidate's vector over the context vectors, and the score.

This file travels to the Hub beside the weights, so it imports the standard library, torch and transformers only.
"""

import copy
import inspect
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_poly_encoder import PolyEncoderConfig, build_backbone, load_backbone
from .pipeline_poly_encoder import PolyEncoderPipeline  # noqa: F401
from .scoring_poly_encoder import (
    ReductionMixin,
    padding_last,
    poly_score,
    reordered,
    reordered_twice,
    turns_between,
)

logger = logging.get_logger(__name__)

_OUR_HEADER = b"# Copyright 2026 The poly-encoders authors."  # of the files of code that we put beside weights


@dataclass
class PolyEncoderOutput(ModelOutput):
    """What [`PolyEncoderModel`] returns; a field is `None` where its inputs or the request for it are missing."""

    loss: Tensor | None = None  # scalar, float32: cross-entropy of the labelled candidate among those scored with it
    scores: Tensor | None = None  # (batch, n), float32: raw, unbounded, comparable within a row
    context_vectors: Tensor | None = None  # (batch, m, dim); all-zero vectors are padding
    candidate_vectors: Tensor | None = None  # (n, dim), or (batch, n, dim) for candidates per context
    hidden_states: tuple[Tensor, ...] | None = None  # the context encoder's, one tensor a layer
    attentions: tuple[Tensor, ...] | None = None
    candidate_hidden_states: tuple[Tensor, ...] | None = None  # batch * n rows for candidates per context
    candidate_attentions: tuple[Tensor, ...] | None = None


class PolyEncoderModel(ReductionMixin, PreTrainedModel):
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
        if config.has_codes:
            self.codes = nn.Parameter(torch.empty(config.num_codes, config.hidden_size))
        if config.learn_final_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1))
        if config.learn_last_turn_share:
            self.last_turn_logit = nn.Parameter(torch.empty(1))
        towers = (self.context_encoder, self.candidate_encoder)
        self.supports_gradient_checkpointing = all(tower.supports_gradient_checkpointing for tower in towers)
        # What sentence_transformers.SentenceTransformer calls when it is pointed at a Poly-encoder by mistake.
        self.get_text_features = _refuse_one_vector
        self.post_init()

    def _adopt(self, name: str, encoder: PreTrainedModel | None) -> PreTrainedModel:
        if encoder is None:
            encoder = build_backbone(getattr(self.config, name))
        # One configuration object for the tower and for our config's part, so that later changes reach both.
        setattr(self.config, name, encoder.config)
        return encoder

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self:
            return
        if self.config.has_codes:
            init.normal_(self.codes, mean=0.0, std=self.config.code_std)
        if self.config.learn_final_temperature:
            init.constant_(self.log_temperature, math.log(self.config.final_temperature))
        if self.config.learn_last_turn_share:
            share = self.config.last_turn_share
            init.constant_(self.last_turn_logit, math.log(share / (1 - share)))

    @property
    def candidate_encoder(self) -> PreTrainedModel:
        """The backbone that reads candidates; the context's own where encoders are shared."""
        return self._modules.get("candidate_encoder") or self.context_encoder

    @classmethod
    def from_encoders_pretrained(
        cls, context: str | os.PathLike[str], candidate: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> "PolyEncoderModel":
        """Build a Poly-encoder on two pre-trained backbones; only the codes are new, where there are any.

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
        names = PolyEncoderConfig.own_fields() | PolyEncoderConfig.attribute_map.keys()
        ours = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        if ours.get("share_encoders") and candidate is not None:
            raise ValueError("share_encoders=True takes one checkpoint; leave `candidate` out, or train two encoders.")
        context_encoder = load_backbone(context, **kwargs)
        candidate_encoder = None
        if not ours.get("share_encoders"):
            if candidate is None or candidate == context:
                candidate_encoder = copy.deepcopy(context_encoder)
            else:
                candidate_encoder = load_backbone(candidate, **kwargs)
        # Copies, because a new composite configuration resets the attention of its parts; _adopt brings theirs back.
        config = PolyEncoderConfig(
            context_encoder=copy.deepcopy(context_encoder.config),
            candidate_encoder=None if candidate_encoder is None else copy.deepcopy(candidate_encoder.config),
            attn_implementation=context_encoder.config._attn_implementation,
            **ours,
        )
        model = cls(config, context_encoder, candidate_encoder).to(context_encoder.device, context_encoder.dtype)
        if config.has_codes:
            logger.warning_once("The codes of this Poly-encoder are new: train it before you rely on its scores.")
        return model.eval()

    # --- the two sides -------------------------------------------------------------------------------------------

    def get_context_features(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """Encode contexts.

        Args:
            input_ids: `(batch, length)` int64 token ids.
            attention_mask: `(batch, length)`, 1 for a token and 0 for padding, on either side. All ones by default.
            **inputs: `token_type_ids`, `position_ids`, `(batch, length)`, left out where a backbone knows none of them;
                `inputs_embeds`, `(batch, length, embedding size)`, in place of `input_ids`; `turn_ids`, `(batch,
                length)` int64, the turn of each token, 1, 2, ... in their order and 0 for one in no turn, which are
                read off `config.turn_boundary_ids` when left out.

        Returns:
            `(batch, m, dim)` context vectors; where a context has fewer than m tokens or turns, the rest is all-zero.
        """
        return self.encode_side("context", _backbone_inputs(input_ids, attention_mask, **inputs))[1]

    def get_candidate_features(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """Encode candidates; arguments as for `get_context_features`, with `(n, length)`.

        Returns:
            `(n, dim)` candidate vectors. They depend on nothing else, so they can be kept.
        """
        return self.encode_side("candidate", _backbone_inputs(input_ids, attention_mask, **inputs))[1]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        turn_ids: Tensor | None = None,
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
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, turn_ids: The contexts, as for
                `get_context_features`.
            candidate_input_ids: `(n, length)`, shared by the batch, or `(batch, n, length)`, a set per context.
            candidate_attention_mask, candidate_token_type_ids: Of the same shape as `candidate_input_ids`.
            labels: `(batch,)` int64, the index of each context's positive in its row of scores.
            output_attentions, output_hidden_states: Return those of both backbones; a list of layers keeps only theirs.
            return_dict: `False` returns a plain tuple without the empty fields.

        Raises:
            ValueError: no contexts, labels without candidates, or shapes that do not fit.
        """
        options = {
            "output_attentions": self.config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }
        inputs = _backbone_inputs(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            turn_ids=turn_ids,
        )
        context, context_vectors = self.encode_side("context", inputs, **options)
        output = PolyEncoderOutput(
            context_vectors=context_vectors, hidden_states=context.hidden_states, attentions=context.attentions
        )
        if candidate_input_ids is None:
            if labels is not None:
                raise ValueError("labels name the positives, but no candidate_input_ids were given.")
            return output

        leading = candidate_input_ids.shape[:-1]  # (n,) or (batch, n)
        ids, mask, segments = (
            None if tensor is None else tensor.flatten(0, -2)
            for tensor in (candidate_input_ids, candidate_attention_mask, candidate_token_type_ids)
        )
        candidates, vectors = self.encode_side(
            "candidate", _backbone_inputs(ids, mask, token_type_ids=segments), **options
        )
        output.candidate_vectors = candidate_vectors = vectors.unflatten(0, leading)
        output.candidate_hidden_states = candidates.hidden_states
        output.candidate_attentions = candidates.attentions
        output.scores = poly_score(context_vectors, candidate_vectors, self._scale())
        if labels is not None:
            output.loss = cross_entropy(output.scores, labels)
        return output

    def encode_side(
        self, side: Literal["context", "candidate"], inputs: dict[str, Tensor], **options: Any
    ) -> tuple[Any, Tensor]:
        """One backbone's output for `inputs` as `run_encoder` takes them, and the vectors made of it."""
        output = self.run_encoder(side, inputs, **options)
        hidden, mask = output.last_hidden_state, inputs["attention_mask"]
        if side == "candidate":
            return output, self.reduce_candidate(hidden, mask)
        return output, self.reduce_context(hidden, mask, self.turns_of(inputs))

    def turns_of(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The turn of each token, `(batch, length)`, as given or as ids tell; `None` where no turn has a vector."""
        if not self.config.has_turns or "turn_ids" in inputs:
            return inputs.get("turn_ids")
        if "input_ids" not in inputs:
            return torch.ones_like(inputs["attention_mask"])
        return turns_between(inputs["input_ids"], inputs["attention_mask"], self.config.turn_boundary_ids)

    def run_encoder(self, side: Literal["context", "candidate"], inputs: dict[str, Tensor], **options: Any) -> Any:
        """One backbone's output for `inputs` of `input_ids`, `attention_mask`, ...; what it cannot take is left out.

        `last_hidden_state`, `(n, length, dim)`, carries `output_scaling`. Rows are read with their padding on the
        right, wherever it is: most encoders count positions from the start of a row.
        """
        encoder = self.context_encoder if side == "context" else self.candidate_encoder
        accepted = frozenset(inspect.signature(type(encoder).forward).parameters)
        if "use_cache" in accepted:
            options["use_cache"] = False
        mask = inputs["attention_mask"]
        order = padding_last(mask)
        read = inputs if order is None else {name: reordered(tensor, order) for name, tensor in inputs.items()}
        output = encoder(
            **{name: tensor for name, tensor in read.items() if name in accepted}, **options, return_dict=True
        )
        # With a device_map the two backbones may be on two devices, but their vectors meet.
        hidden = output.last_hidden_state.to(mask.device) * self.config.output_scaling
        if order is not None:
            back = order.argsort(dim=-1)
            hidden = reordered(hidden, back)
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(reordered(layer, back) for layer in output.hidden_states)
            if output.get("attentions") is not None:
                output.attentions = tuple(reordered_twice(layer, back) for layer in output.attentions)
        output.last_hidden_state = hidden
        return output

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
        """As upstream's, with handler.py, the entry of Inference Endpoints. Code that a user has there stays theirs.

        handler.py is no import of this file's, so that one of a user's own in a repository need not work here.
        """
        folder = Path(save_directory)
        found = {file: file.read_bytes() for file in folder.glob("*.py")}
        users = {file: content for file, content in found.items() if not content.startswith(_OUR_HEADER)}
        places = [Path(__file__).parent, *([Path(self.name_or_path)] if self.name_or_path else [])]
        source = next((place / "handler.py" for place in places if (place / "handler.py").is_file()), None)
        if kwargs.get("is_main_process", True) and source is not None and folder / "handler.py" not in users:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "handler.py").write_bytes(source.read_bytes())  # it may be the same file
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            for file, content in users.items():
                file.write_bytes(content)


def _refuse_one_vector(**_: Any) -> NoReturn:
    raise TypeError(
        "This is a Poly-encoder: a text has no single vector, and which side it is on matters. Load it with "
        "poly_encoders.PolyEncoder(path), then call encode_query, encode_document or rank."
    )


def _backbone_inputs(
    input_ids: Tensor | None, attention_mask: Tensor | None = None, **inputs: Tensor | None
) -> dict[str, Tensor]:
    """The given inputs without the `None`s, with a mask of ones where there is none."""
    embeds = inputs.get("inputs_embeds")
    shaped = input_ids if embeds is None else embeds[..., 0]
    if shaped is None or (input_ids is not None and embeds is not None):
        raise ValueError("Give the texts as input_ids (batch, length) or as inputs_embeds, one of the two.")
    if shaped.dim() != 2:
        raise ValueError(f"Token inputs must have shape (batch, length), got {tuple(shaped.shape)}.")
    turn_ids = inputs.get("turn_ids")
    if turn_ids is not None and turn_ids.shape != shaped.shape:
        raise ValueError(f"turn_ids must have the tokens' shape {tuple(shaped.shape)}, got {tuple(turn_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones(shaped.shape, dtype=torch.long, device=shaped.device)
    given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


__all__ = ["PolyEncoderModel", "PolyEncoderOutput"]
