"""What a ParlAI checkpoint's options mean, and which of them have no counterpart here.

Every option that changes what a ranking model computes is either carried over or refused by name; nothing is dropped in
silence. What is not named here concerns training, data sets, logging or other agents.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Kind = Literal["poly", "bi", "cross"]

# The agents by their path and their class; opt["model"] holds the one, or both with a colon between.
_AGENTS: dict[str, tuple[Kind, set[str]]] = {
    "polyencoder": ("poly", {"", "PolyencoderAgent", "IRFriendlyPolyencoderAgent"}),
    "biencoder": ("bi", {"", "BiencoderAgent", "IRFriendlyBiencoderAgent"}),
    "crossencoder": ("cross", {"", "CrossencoderAgent"}),
}

# Options that must be there: their defaults changed between versions, so guessing one would be a wrong model.
_REQUIRED = [
    *("n_heads", "activation", "variant", "embeddings_scale", "output_scaling", "reduction_type"),
    *("dict_tokenizer", "dict_lower", "dict_nulltoken", "dict_starttoken", "dict_endtoken", "dict_unktoken"),
]
_REQUIRED_POLY = ["polyencoder_type", "poly_n_codes", "poly_attention_type", "codes_attention_type"]

# option -> (values that can be carried over, the first of them where the option is absent; why others cannot).
_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "variant": (("xlm",), "its layers are no BERT layers; only xlm's are"),
    "activation": (("gelu", "relu"), "the encoder knows gelu and relu"),
    "reduction_type": (("mean", "first"), "max counts padding as zeros, so a score would depend on its batch"),
    "dict_tokenizer": (("bpe",), "only subword-nmt's byte-pair codes can be carried over"),
    "dict_max_ngram_size": ((-1, 0, 1, None), "words are not joined to n-grams"),
    "history_reversed": ((False, None), "turns are read oldest first"),
    "split_lines": ((False, None), "a turn of several lines stays one turn"),
    "person_tokens": ((False, None), "no speaker tokens are put before the turns"),
    "add_p1_after_newln": ((False, None), "no speaker tokens are put before the turns"),
    "history_add_global_end_token": ((None,), "no further token is put after the history"),
    "special_tok_lst": ((None, ""), "the dictionary has no further special tokens"),
}
_SUPPORTED_BI: dict[str, tuple[tuple[Any, ...], str]] = {
    "share_encoders": ((False,), "ParlAI then puts an MLP on the candidate encoder, which is no Bi-encoder"),
    "use_memories": ((False, None), "memories have no counterpart"),
    "wrap_memory_encoder": ((False, None), "the MLP around the encoder has no counterpart"),
    "normalize_sent_emb": ((False, None), "ParlAI then normalises over the candidates instead of over the vector"),
}
_SUPPORTED_POLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "polyencoder_type": (("codes", "n_first"), "context vectors are codes or n_first"),
    "poly_attention_type": (("basic", "sqrt"), "the final attention has no weights of its own"),
    "codes_attention_type": (("basic", "sqrt"), "the code attention has no weights of its own"),
    "polyencoder_attention_keys": (("context", None), "attention is over hidden states, not over positions"),
    "polyencoder_image_encoder_num_layers": ((0, None), "contexts are text, without images"),
}


@dataclass(frozen=True)
class Settings:
    """The options of a checkpoint that decide what it computes."""

    kind: Kind
    num_heads: int
    activation: str
    scale_embeddings: bool  # word embeddings times sqrt(width)
    output_scaling: float
    dropout: float
    attention_dropout: float
    reduction: Literal["mean", "first"]
    context_vectors: Literal["learnt_codes", "first_m"]  # poly, as are the next three
    num_codes: int
    code_attention: Literal["basic", "sqrt"]
    final_attention: Literal["basic", "sqrt"]
    text_truncate: int | None  # ids kept of a context, before the start and end tokens are added; None for all
    label_truncate: int | None  # ids kept of a candidate, with its start and end tokens; None for all
    max_turns: int | None
    turn_separator: str
    lower: bool
    null_token: str
    start_token: str
    end_token: str
    unk_token: str


def interpret(options: dict[str, Any]) -> Settings:
    """The settings that a checkpoint's options mean.

    Raises:
        ValueError: an option is missing, or its value has no counterpart; the message names every such option.
    """
    kind = _kind(options.get("model"))
    supported = _SUPPORTED | {"bi": _SUPPORTED_BI, "poly": _SUPPORTED_POLY, "cross": {}}[kind]
    required = _REQUIRED + (_REQUIRED_POLY if kind == "poly" else [])
    if missing := [name for name in required if name not in options]:
        raise ValueError(
            f"The checkpoint's options lack {', '.join(missing)}, without which its scores cannot be told. "
            "Add them to model.opt, which is JSON, or load and save the checkpoint once with a later ParlAI."
        )
    problems = [
        f"{name}={options[name]!r}: {reason}"
        for name, (values, reason) in supported.items()
        if name in options and not _is_among(options[name], values) and not _is_unused(name, options)
    ]
    if problems:
        raise ValueError(
            "This checkpoint was trained with options that have no counterpart here, so it is not converted:\n  "
            + "\n  ".join(problems)
        )
    _mention_harmless(options)
    return Settings(
        kind=kind,
        num_heads=options["n_heads"],
        activation=options["activation"],
        scale_embeddings=bool(options["embeddings_scale"]),
        output_scaling=float(options["output_scaling"]),
        dropout=float(options.get("dropout") or 0.0),
        attention_dropout=float(options.get("attention_dropout") or 0.0),
        reduction=options["reduction_type"],
        context_vectors="first_m" if options.get("polyencoder_type") == "n_first" else "learnt_codes",
        num_codes=options.get("poly_n_codes", 1),
        code_attention="sqrt" if options.get("codes_attention_type") == "sqrt" else "basic",
        final_attention="sqrt" if options.get("poly_attention_type") == "sqrt" else "basic",
        text_truncate=_limit("text_truncate", options),
        label_truncate=_limit("label_truncate", options),
        max_turns=max(0, options.get("history_size") or 0) or None,
        turn_separator=_separator(options.get("delimiter", "\n")),
        lower=bool(options["dict_lower"]),
        null_token=options["dict_nulltoken"],
        start_token=options["dict_starttoken"],
        end_token=options["dict_endtoken"],
        unk_token=options["dict_unktoken"],
    )


def _kind(model: Any) -> Kind:
    path, _, agent_class = str(model).partition(":")
    *_, family, name = ["", *path.replace(".", "/").split("/")]
    kind, classes = _AGENTS.get(name, ("poly", set()))
    if family == "transformer" and agent_class in classes:
        return kind
    raise ValueError(
        f"The checkpoint is of the agent {model!r}; transformer/polyencoder, transformer/biencoder and "
        "transformer/crossencoder can be converted."
    )


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values)


def _is_unused(name: str, options: dict[str, Any]) -> bool:
    """Whether the model never looks at this option."""
    return name == "codes_attention_type" and options.get("polyencoder_type") == "n_first"


def _limit(name: str, options: dict[str, Any]) -> int | None:
    """A number of ids as ParlAI's agents read it: null or 0 means `truncate`, a negative number no limit."""
    value = options.get(name) or options.get("truncate", 1024)
    return None if value is None or value < 0 else value


def _separator(delimiter: str) -> str:
    """Text between turns that is split off as ParlAI splits off its delimiter, which it tokenizes by itself."""
    return delimiter if delimiter.strip() == "" and delimiter else f" {delimiter} "


def _mention_harmless(options: dict[str, Any]) -> None:
    if options.get("relu_dropout"):
        logger.warning(
            "relu_dropout=%s has no counterpart: scores are the same, further training goes without it.",
            options["relu_dropout"],
        )
    if options.get("use_reply") == "none":
        logger.warning("use_reply='none': the model was trained without its own replies. Leave them out of contexts.")
