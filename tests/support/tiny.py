"""Tiny random models of many families, and a tokenizer of single characters, all made here and offline."""

import string

import torch
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CHARACTERS = sorted(set(string.printable) - set("\r\x0b\x0c"))
VOCAB_SIZE = len(SPECIALS) + len(CHARACTERS)
PAD = SPECIALS.index("<pad>")
WIDTH = 32
# Positions in every family that has any; RoBERTa and its kin lose two of them to their offset.
POSITIONS = 66

FAMILIES = [
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "modernbert",
    "deberta-v2",
    "mpnet",
    "electra",
    "t5",
    "qwen3",
]
MORE_FAMILIES = ["albert", "bart", "big_bird", "gpt2", "llama", "opt", "gpt_neox"]
LEFT_PADDED = {"qwen3", "gpt2", "llama", "opt", "gpt_neox"}


def family_config(family: str, width: int = WIDTH, layers: int = 2, **changes: object) -> PreTrainedConfig:
    """A tiny configuration of the family, which is named as in `config.json`."""
    inner = 2 * width
    usual = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": inner,
        "max_position_embeddings": POSITIONS,
    }
    both = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", 4), ("ffn_dim", inner))
    }
    own = {
        "roberta": {**usual, "type_vocab_size": 1},
        "xlm-roberta": {**usual, "type_vocab_size": 1},
        "distilbert": {
            "dim": width,
            "n_layers": layers,
            "n_heads": 4,
            "hidden_dim": inner,
            "max_position_embeddings": POSITIONS,
        },
        "modernbert": {**usual, "cls_token_id": 0, "sep_token_id": 2},
        "deberta-v2": {**usual, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "electra": {**usual, "embedding_size": 16},
        "t5": {"d_model": width, "d_kv": 8, "d_ff": inner, "num_layers": layers, "num_heads": 4},
        "qwen3": {**usual, "num_key_value_heads": 2, "head_dim": 8},
        "albert": {**usual, "embedding_size": 16},
        "bart": {**both, "d_model": width, "max_position_embeddings": POSITIONS, "decoder_start_token_id": 2},
        # Sparse attention is for thousands of tokens; below, the model switches it off for good in the middle of a run.
        "big_bird": {**usual, "attention_type": "original_full"},
        "gpt2": {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": POSITIONS},
        "llama": {**usual, "num_key_value_heads": 2},
        "opt": {**usual, "ffn_dim": inner, "word_embed_proj_dim": width},
    }.get(family, usual)
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    return AutoConfig.for_model(family, **{**tokens, **own, **changes})


def poly_config(family: str = "bert", **options: object) -> PolyEncoderConfig:
    """A tiny Poly-encoder's configuration, 4 codes unless told."""
    return PolyEncoderConfig(context_encoder=family_config(family), **{"num_codes": 4, **options})


def poly_model(family: str = "bert", seed: int = 0, **options: object) -> PolyEncoderModel:
    """A tiny Poly-encoder with codes large enough to matter."""
    torch.manual_seed(seed)
    return PolyEncoderModel(poly_config(family, **{"code_std": 1.0, **options})).eval()


def make_tokenizer(
    left: bool = False, *, pad: bool = True, eos: bool = True, **options: object
) -> PreTrainedTokenizerFast:
    """One token a character, `<s>` and `</s>` around a text and `</s>` between two; none of them with padding left.

    Without `pad` or `eos` it has no such token, as a generator's; without `eos` no separator either.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIALS + CHARACTERS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if not left:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        cls_token="<s>",
        mask_token="<mask>",
        padding_side="left" if left else "right",
        **({"pad_token": "<pad>"} if pad else {}),
        **({"eos_token": "</s>", "sep_token": "</s>"} if eos else {}),
        **options,
    )


def token_batch(rows: int, length: int, seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Random ids with a mask that leaves every row at least one token, rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIALS), VOCAB_SIZE, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    position = torch.arange(length)[None]
    mask = (position >= length - lengths if left else position < lengths).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def pad(batch: dict[str, torch.Tensor], amount: int, left: bool = False) -> dict[str, torch.Tensor]:
    """The batch with more padding."""
    sides = (amount, 0) if left else (0, amount)
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], sides, value=PAD),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], sides, value=0),
    }


def shift(model: torch.nn.Module) -> None:
    """Make another model of a model: one weight tensor, which every kind has, is changed."""
    next(model.parameters()).data.add_(0.5)
