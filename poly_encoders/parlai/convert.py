"""ParlAI checkpoints as models of this package: the same ids, vectors and scores, from plain text."""

import logging
import math
import os
import tempfile
from typing import NamedTuple

import torch
from sentence_transformers.base.modules import Dense, Module, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel
from poly_encoders.parlai.files import read_files
from poly_encoders.parlai.settings import Settings, interpret
from poly_encoders.parlai.tokenizer import ParlAITokenizer, Vocabulary, build_tokenizer, dictionary_tokens, vocabulary
from poly_encoders.parlai.weights import Weights, bert_config, bert_weights, take_encoder
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.poly_encoder_module import PolyEncoderModule

logger = logging.getLogger(__name__)

# The encoders of each agent: the context's and the candidate's, or the one for both together.
_PREFIXES = {
    "poly": ("encoder_ctxt", "encoder_cand"),
    "bi": ("context_encoder", "cand_encoder"),
    "cross": ("encoder",),
}


class Parts(NamedTuple):
    """A checkpoint taken apart."""

    settings: Settings
    weights: Weights  # what the encoders left
    encoders: list[dict[str, Tensor]]  # ParlAI's names without prefixes; in the order of _PREFIXES
    words: Vocabulary
    tokenizer: ParlAITokenizer
    positions: int

    def config(self, number: int) -> BertConfig:
        """One encoder's configuration."""
        return bert_config(self.encoders[number], self.words, self.settings)

    def transformer(self, number: int) -> Transformer:
        """One encoder as sentence-transformers' module; its last hidden states carry `output_scaling`."""
        model = BertModel(self.config(number))
        # AutoModel builds BERT with its pooler, which nothing here reads: zeros, so that no weight is missing.
        pooler = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if "pooler." in name}
        load(model, bert_weights(self.encoders[number], self.words, self.settings, scale_output=True) | pooler)
        with tempfile.TemporaryDirectory() as folder:  # the module is made from a folder only
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return Transformer(folder)


def convert_parlai_checkpoint(
    model_file: str | os.PathLike[str], output_dir: str | os.PathLike[str]
) -> PolyEncoder | BiEncoder | CrossEncoder:
    """Convert a checkpoint of ParlAI's transformer/polyencoder, transformer/biencoder or transformer/crossencoder.

    Args:
        model_file: The file `model`, with `model.opt`, `model.dict` and `model.dict.codecs` beside it, or their folder.
        output_dir: The folder to write; other files that are in it stay. It loads with `PolyEncoder(output_dir)` (or
            `BiEncoder`, `CrossEncoder`), and ranks plain text as the original does, with no further setting.

    Returns:
        The converted model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: one of the four files is not there.
        ValueError: a damaged or unsafe file, or a checkpoint that uses what has no counterpart here; then nothing is
            written.
    """
    if not str(output_dir):
        raise ValueError("The output folder has an empty name. Give the folder to write the converted model to.")
    parts = take_apart(model_file)
    model: PolyEncoder | BiEncoder | CrossEncoder
    if parts.settings.kind == "poly":
        model = _poly_encoder(parts)
    else:
        model = _bi_encoder(parts) if parts.settings.kind == "bi" else _cross_encoder(parts)
    parts.weights.check_empty()
    model.eval()
    model.model_card_data.add_tags("parlai")
    model.save_pretrained(str(output_dir))
    return model


def take_apart(model_file: str | os.PathLike[str]) -> Parts:
    """Read a checkpoint; see `convert_parlai_checkpoint`."""
    files = read_files(model_file)
    settings = interpret(files.options)
    weights = Weights(files.weights)
    encoders = [take_encoder(weights, prefix) for prefix in _PREFIXES[settings.kind]]
    rows = {len(encoder["embeddings.weight"]) for encoder in encoders}
    if len(rows) > 1:
        raise ValueError(f"The checkpoint's encoders embed {sorted(rows)} tokens; expected the same number in both.")
    words = vocabulary(dictionary_tokens(settings, files.dictionary), files.merges, settings, rows.pop())
    positions = min(len(encoder["position_embeddings.weight"]) for encoder in encoders)
    wanted = [math.inf if limit is None else limit for limit in (settings.text_truncate, settings.label_truncate)]
    if (sum(wanted) + 2 if settings.kind == "cross" else max(wanted[0] + 2, wanted[1])) > positions:
        logger.warning(
            "The checkpoint has positions for %d tokens, less than its options allow. Longer texts (pairs, for a "
            "Cross-encoder) are cut, where ParlAI would fail.",
            positions,
        )
    tokenizer = build_tokenizer(words, files.merges, settings, positions)
    return Parts(settings, weights, encoders, words, tokenizer, positions)


def _poly_encoder(parts: Parts) -> PolyEncoder:
    settings = parts.settings
    config = PolyEncoderConfig(
        context_encoder=parts.config(0),
        candidate_encoder=parts.config(1),
        context_vectors=settings.context_vectors,
        num_codes=settings.num_codes,
        reduction=settings.reduction,
        code_attention=settings.code_attention,
        final_attention=settings.final_attention,
        output_scaling=settings.output_scaling,
        **settings.text_options(parts.positions),
    )
    model = PolyEncoderModel(config)
    state = {
        f"{side}.{name}": tensor
        for side, encoder in zip(("context_encoder", "candidate_encoder"), parts.encoders, strict=True)
        for name, tensor in bert_weights(encoder, parts.words, settings).items()
    }
    if settings.context_vectors == "learnt_codes":
        if parts.weights.names("codes"):
            state["codes"] = parts.weights.take("codes", dimensions=2)
        else:
            # As in ParlAI, where a checkpoint from pre-training has none and fine-tuning adds them.
            logger.warning("The checkpoint is only pre-trained: it has no codes. They are new, so fine-tune the model.")
            state["codes"] = model.codes.detach()
    load(model, state)
    return PolyEncoder(modules=[PolyEncoderModule(model, parts.tokenizer)], device="cpu")


def _bi_encoder(parts: Parts) -> BiEncoder:
    context, candidate = parts.encoders
    parts.weights.drop_copy("embeddings.weight", context["embeddings.weight"])
    parts.weights.drop_copy("cand_embeddings.weight", candidate["embeddings.weight"])
    for name, tensor in context.items():
        parts.weights.drop_copy(f"memory_transformer.{name}", tensor)
    sides: dict[str, list[Module]] = {}
    for number, side in enumerate(("query", "document")):
        encoder = parts.transformer(number)
        sides[side] = [encoder, Pooling(encoder.get_embedding_dimension(), parts.settings.pooling)]
    options = parts.settings.text_options(parts.positions)
    return BiEncoder(modules=[Router(sides, allow_empty_key=False)], **options, device="cpu")


def _cross_encoder(parts: Parts) -> CrossEncoder:
    encoder = parts.transformer(0)
    width = encoder.get_embedding_dimension()
    # ParlAI's head is one linear layer on the reduced output; the head of BertForSequenceClassification has a tanh.
    head = Dense(width, 1, activation_function=nn.Identity(), module_output_name="scores")
    weight, bias = parts.weights.take("linear_layer.weight", 2), parts.weights.take("linear_layer.bias", 1)
    load(head, {"linear.weight": weight, "linear.bias": bias})
    modules = [encoder, Pooling(width, parts.settings.pooling), head]
    return CrossEncoder(modules=modules, **parts.settings.text_options(parts.positions), device="cpu")


def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict that must fit `module` exactly; a ValueError names what does not."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if tensor.shape != state[name].shape
    ]
    if wrong:
        raise ValueError(
            f"The checkpoint's weights do not fit together: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. "
            "Its model and model.opt do not belong together."
        )
    module.load_state_dict(state)


__all__ = ["convert_parlai_checkpoint"]
