"""What a ParlAI checkpoint's options mean, and which of them have no counterpart here.

Every option that changes what a ranking model computes is either carried over or refused by name; nothing is dropped in
silence. What is not named here concerns training, data sets, logging or other agents.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

PAIR_FRAME = 4  # the start and end tokens of a pair

Kind = Literal["poly", "bi", "cross"]

# The agents by their path and their class; opt["model"] holds the one, or both with a colon between.
_AGENTS: dict[str, tuple[Kind, set[str]]] = {
    "polyencoder": ("poly", {"", "PolyencoderAgent", "IRFriendlyPolyencoderAgent"}),
    "biencoder": ("bi", {"", "BiencoderAgent", "IRFriendlyBiencoderAgent"}),
    "crossencoder": ("cross", {"", "CrossencoderAgent"}),
}

# option -> (values that can be carried over; why). It must be there: it decides what a layer or a head computes.
_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "variant": (("xlm",), "other variants have other layers, or have not been checked against the original"),
    "activation": (("gelu", "relu"), "other activations are not ParlAI's"),
    "reduction_type": (("mean", "first"), "with max, which counts padding, a score would depend on its batch"),
    "dict_tokenizer": (("bpe",), "only subword-nmt's byte-pair codes can be carried over"),
}
_CHOICES_POLY: dict[str, tuple[tuple[str, ...], str]] = {
    "polyencoder_type": (("codes", "n_first"), "these are the kinds of context vectors"),
    "poly_attention_type": (("basic", "sqrt"), "the final attention has no weights of its own"),
    "codes_attention_type": (("basic", "sqrt"), "the code attention has no weights of its own"),
}

# option -> why it must be off. Where it is absent it is taken to be off; if it was on, the weights give it away.
_OFF: dict[str, str] = {
    "history_reversed": "turns are read oldest first",
    "split_lines": "a turn of several lines stays one turn",
    "person_tokens": "no speaker tokens are put before the turns",
    "add_p1_after_newln": "no speaker tokens are put before the turns",
    "history_add_global_end_token": "no further token is put after the history",
    "special_tok_lst": "the dictionary has no further special tokens",
}
_OFF_OF_KIND: dict[Kind, dict[str, str]] = {
    "poly": {"polyencoder_image_encoder_num_layers": "contexts are text, without images"},
    "bi": {
        "share_encoders": "ParlAI then puts an MLP on the candidate encoder, which is no Bi-encoder",
        "use_memories": "memories have no counterpart",
        "wrap_memory_encoder": "the MLP around the encoder has no counterpart",
        "normalize_sent_emb": "ParlAI then normalises over the candidates instead of over the vector",
    },
    "cross": {},
}
# What ParlAI takes where one of these is missing.
_DEFAULTS = {"history_size": -1, "delimiter": "\n", "truncate": 1024, "dropout": 0, "attention_dropout": 0}


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
    sizes: dict[str, int]  # what the options say of the tensors' sizes, under ParlAI's names

    @property
    def pooling(self) -> Literal["mean", "cls"]:
        """`reduction` under sentence-transformers' name."""
        return "mean" if self.reduction == "mean" else "cls"

    def text_options(self, positions: int) -> dict[str, Any]:
        """How the converted model, which has so many positions, cuts texts and joins turns."""
        context, candidate = self.text_truncate, self.label_truncate
        if self.kind == "cross":
            # Special tokens are not counted here; of a long candidate, which loses its end token, the first is left.
            most = positions - PAIR_FRAME - 1
            context = most if context is None else min(context, most)
            candidate = most if candidate is None else min(candidate - 1, most)
        elif context is not None:
            context += 2
        return {
            "max_context_length": context,
            "max_candidate_length": candidate,
            "turn_separator": self.turn_separator,
            "max_turns": self.max_turns,
        }


class _Reader:
    """Reads options one by one and collects what is wrong with them, so that one error names it all."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.problems: list[str] = []

    def choice(self, name: str, values: tuple[str, ...], why: str) -> Any:
        return self._read(name, lambda value: value in values, f"{' or '.join(values)} can be converted; {why}", "")

    def off(self, name: str, why: str) -> None:
        self._read(name, lambda value: not value, why, None)

    def flag(self, name: str) -> bool:
        return self._read(name, lambda value: isinstance(value, bool), "true or false is needed", False)

    def text(self, name: str) -> str:
        return self._read(name, lambda value: isinstance(value, str) and value != "", "a text is needed", " ")

    def integer(self, name: str, least: int | None = None) -> int:
        why = "a whole number is needed" + ("" if least is None else f", at least {least}")
        return self._read(name, lambda value: type(value) is int and (least is None or value >= least), why, 1)

    def number(self, name: str) -> float:
        def fits(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value)

        return float(self._read(name, fits, "a finite number is needed", 1.0))

    def limit(self, name: str, least: int) -> int | None:
        """A number of ids as ParlAI's agents read it: null or 0 means `truncate`, a negative number no limit."""
        if not self.options.get(name):
            name = "truncate"
        value = self.integer(name)
        if 0 <= value < least:
            self._refuse(name, f"so few ids leave nothing of the text; at least {least} are needed")
        return None if value < 0 else value

    def _read(self, name: str, fits: Callable[[Any], bool], why: str, instead: Any) -> Any:
        """An option's value, or something in its place where it does not fit, which is refused at the end."""
        value = self.options.get(name, _DEFAULTS.get(name))
        if not fits(value):
            self._refuse(name, why)
        return value if fits(value) else instead

    def _refuse(self, name: str, why: str) -> None:
        came = f"{name}={self.options[name]!r}" if name in self.options else f"{name} is missing"
        if (problem := f"{came}: {why}") not in self.problems:
            self.problems.append(problem)


def interpret(options: dict[str, Any]) -> Settings:
    """The settings that a checkpoint's options mean.

    Raises:
        ValueError: options that are missing, senseless, or have no counterpart; the message names every one.
    """
    kind = _kind(options.get("model"))
    read = _Reader(options)
    chosen = {name: read.choice(name, *allowed) for name, allowed in _CHOICES.items()}
    for name, why in (_OFF | _OFF_OF_KIND[kind]).items():
        read.off(name, why)
    if options.get("dict_max_ngram_size", -1) not in (-1, 0, 1, None):
        read.off("dict_max_ngram_size", "words are not joined to n-grams")
    if kind == "poly":
        _read_poly(read, chosen)
    delimiter = read.text("delimiter")
    settings = Settings(
        kind=kind,
        num_heads=read.integer("n_heads", least=1),
        activation=chosen["activation"],
        scale_embeddings=read.flag("embeddings_scale"),
        output_scaling=read.number("output_scaling"),
        dropout=read.number("dropout"),
        attention_dropout=read.number("attention_dropout"),
        reduction=chosen["reduction_type"],
        context_vectors="first_m" if chosen.get("polyencoder_type") == "n_first" else "learnt_codes",
        num_codes=read.integer("poly_n_codes", least=1) if kind == "poly" else 1,
        code_attention=chosen.get("codes_attention_type", "basic"),
        final_attention=chosen.get("poly_attention_type", "basic"),
        text_truncate=read.limit("text_truncate", least=1),
        label_truncate=read.limit("label_truncate", least=3),  # two of these ids are its start and end tokens
        max_turns=max(0, read.integer("history_size")) or None,
        # ParlAI tokenizes its delimiter by itself.
        turn_separator=delimiter if delimiter.isspace() else f" {delimiter} ",
        lower=read.flag("dict_lower"),
        null_token=read.text("dict_nulltoken"),
        start_token=read.text("dict_starttoken"),
        end_token=read.text("dict_endtoken"),
        unk_token=read.text("dict_unktoken"),
        sizes=_sizes(read, kind),
    )
    if settings.output_scaling <= 0:
        read.problems.append(f"output_scaling={settings.output_scaling}: a positive factor is needed")
    if read.problems:
        raise ValueError(
            "The checkpoint's options (model.opt) do not allow a conversion:\n  "
            + "\n  ".join(read.problems)
            + "\nWhat is missing can be added to model.opt, which is JSON. What has no counterpart here is not "
            "converted, because scores would be others without it."
        )
    _mention_harmless(options)
    return settings


def _read_poly(read: _Reader, chosen: dict[str, Any]) -> None:
    """Read the Poly-encoder's choices into `chosen`."""
    for name, (values, why) in _CHOICES_POLY.items():
        if name == "codes_attention_type" and chosen["polyencoder_type"] == "n_first":
            chosen[name] = "basic"  # there are no codes, so ParlAI never looks at it
        else:
            chosen[name] = read.choice(name, values, why)
    if read.options.get("polyencoder_attention_keys", "context") != "context":
        read.off("polyencoder_attention_keys", "attention is over hidden states, not over positions")


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


def _sizes(read: _Reader, kind: Kind) -> dict[str, int]:
    """The sizes that the options name; where one is absent or null, the tensors alone decide."""
    names = ("embedding_size", "ffn_size", "n_layers", "n_positions", "n_encoder_layers", "n_segments")
    named = {name: read.integer(name) for name in names if read.options.get(name) is not None}
    if (own_layers := named.pop("n_encoder_layers", -1)) > 0:
        named["n_layers"] = own_layers
    if named.get("n_positions") == 0:  # as null, it leaves the number to other options
        del named["n_positions"]
    return named if kind == "bi" else {**named, "n_segments": 2}  # whatever the option says


def _mention_harmless(options: dict[str, Any]) -> None:
    """Warn of what was assumed, and of what changes no score but a user should know."""
    if assumed := [f"{name}={value!r}" for name, value in _DEFAULTS.items() if name not in options]:
        logger.warning("model.opt lacks some options; ParlAI's defaults are assumed: %s.", ", ".join(assumed))
    if dropout := options.get("relu_dropout"):
        logger.warning("relu_dropout=%s has no counterpart: scores are the same, training goes without it.", dropout)
    if options.get("use_reply") == "none":
        logger.warning("use_reply='none': the model was trained without its own replies. Leave them out of contexts.")
