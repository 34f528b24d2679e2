"""ParlAI's way from text to ids as a fast tokenizer: lower-casing, words, subword-nmt's byte-pair codes, dictionary.

The pieces of a word are merged by the `tokenizers` library. Three habits of ParlAI are beyond it:

- Merging passes through pieces that the dictionary lacks, and a word that ends on one gets the unknown token. In a
  `tokenizers` vocabulary every piece has an id of its own, so these get *aliases*, ids after the dictionary's, which
  `ParlAITokenizer` turns into the ids that ParlAI gives. A model embeds an alias as what it stands for: a plain fast
  tokenizer, which transformers takes where this package is not installed, leads to the same vectors.
- A text that is too long is cut on the right after the special tokens are there, and so loses its end token.
- An empty text is read like any other: its special tokens alone.
"""

import logging
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy

from poly_encoders.modeling.text_poly_encoder import Cutting, Frame, Side
from poly_encoders.parlai.settings import Settings

logger = logging.getLogger(__name__)

END_OF_WORD = "</w>"  # subword-nmt's mark on the last piece of a word
_MORE_OF_WORD = "@@"  # ParlAI's mark on every other piece

# Python's `\w+|[^\w\s]`, which ParlAI splits by. Oniguruma's own \w counts combining marks as well, its \s leaves out
# the four separators at the end.
_WORD = r"[\p{L}\p{N}_]+|[^\p{L}\p{N}_\s\x1c-\x1f]"

# Python's lower() writes the sigma at the end of a word as ς; Rust's, letter by letter, never does.
_CASED, _IGNORABLE = r"[\p{Cased}&&[^\p{Case_Ignorable}]]", r"\p{Case_Ignorable}*"
_FINAL_SIGMA = rf"{_CASED}{_IGNORABLE}\KΣ(?!{_IGNORABLE}{_CASED})"

_MOST_PADDING = 7  # half-precision training pads the dictionary to a multiple of 8

_SPECIAL_TOKENS = {"__NULL__", "__START__", "__END__", "__UNK__"}


class _ParlAICutting(Cutting):
    """A text cut on the right has its special tokens counted in, and may lose its end token."""

    def room(self, frame: Frame, limit: int, side: Side) -> int:
        return limit - len(frame.before) if side == "right" else super().room(frame, limit, side)

    def closing(self, after: list[int], kept: int, room: int, side: Side) -> list[int]:
        return after[: room - kept] if side == "right" else after


class ParlAITokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that gives ParlAI's ids.

    Importing this package registers it with `AutoTokenizer`. Its tokenizer_config.json names the aliases: `num_aliases`
    ids from `first_alias` on stand for the unknown token, except those that `special_aliases` maps to another id. One
    without aliases was not converted, and is a plain one: AutoTokenizer loads it with this class where a Poly-encoder's
    folder names none.
    """

    _real_ids: np.ndarray | None = None  # what each id of the vocabulary stands for

    @property
    def cutting(self) -> Cutting:
        """How the models of this package cut a text that is too long."""
        return _ParlAICutting() if "num_aliases" in self.init_kwargs else Cutting()

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        if "num_aliases" not in self.init_kwargs:
            return super()._encode_plus(text, text_pair, **options)
        text, text_pair = _readable(text), _readable(text_pair)
        if self._cuts_on_the_right(text, text_pair, options):
            return self._cut_on_the_right(text, **options)
        encoded = super()._encode_plus(text, text_pair, **options)
        if self._real_ids is None or len(self._real_ids) < len(self):  # tokens may have been added since
            first, number = self.init_kwargs["first_alias"], self.init_kwargs["num_aliases"]
            real = np.arange(max(len(self), first + number))
            real[first : first + number] = self.unk_token_id
            for alias, target in self.init_kwargs["special_aliases"].items():
                real[int(alias)] = target
            self._real_ids = real
        encoded["input_ids"] = _looked_up(encoded["input_ids"], self._real_ids)
        return encoded

    def _cuts_on_the_right(self, text: Any, text_pair: Any, options: dict[str, Any]) -> bool:
        pairs = text_pair is not None or (not isinstance(text, str) and any(isinstance(item, tuple) for item in text))
        no_cut = TruncationStrategy.DO_NOT_TRUNCATE
        return (
            not pairs
            and self.truncation_side == "right"
            and options.get("add_special_tokens", True)
            and options.get("truncation_strategy", no_cut) != no_cut
            and options.get("max_length") is not None
            and not options.get("return_overflowing_tokens", False)
        )

    def _cut_on_the_right(
        self, text: Any, *, max_length: int, truncation_strategy: TruncationStrategy, **options: Any
    ) -> BatchEncoding:
        """Encoded whole, then cut, then padded."""
        padding = {name: options.pop(name, None) for name in ("pad_to_multiple_of", "padding_side", "return_tensors")}
        padding["padding"] = options.pop("padding_strategy", False)
        single = isinstance(text, str) or (options.get("is_split_into_words") and isinstance(text[0], str))
        rows = self._encode_plus([text] if single else text, **{**options, "verbose": False})
        cut = {name: [row[:max_length] for row in rows[name]] for name in rows if name != "length"}
        if "length" in rows:
            cut["length"] = [min(length, max_length) for length in rows["length"]]
        mask = options.get("return_attention_mask")
        padded = self.pad(cut, max_length=max_length, return_attention_mask=mask, verbose=False, **padding)
        if not single or padding["return_tensors"] is not None:
            return padded
        return BatchEncoding({name: row[0] if isinstance(row[0], list) else row for name, row in padded.items()})

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's. The new tokenizer has a vocabulary of its own, without aliases, and is a plain one."""
        tokenizer = super().train_new_from_iterator(*args, **kwargs)
        for name in ("first_alias", "num_aliases", "special_aliases"):
            tokenizer.init_kwargs.pop(name, None)
        return tokenizer


def _readable(text: Any) -> Any:
    """`text` with a blank for every empty string, because `tokenizers` skips an empty text's special tokens."""
    if isinstance(text, str):
        return text or " "
    return type(text)(map(_readable, text)) if isinstance(text, (list, tuple)) else text


def _looked_up(ids: Any, table: np.ndarray) -> Any:
    """`table[ids]` for ids in any of the containers that a tokenizer returns."""
    if isinstance(ids, torch.Tensor):
        return torch.from_numpy(table)[ids]
    if isinstance(ids, np.ndarray):
        return table[ids]
    if ids and isinstance(ids[0], list):
        return [table[row].tolist() for row in ids]
    return table[ids].tolist() if ids else ids


class Vocabulary(NamedTuple):
    """A tokenizer's vocabulary: ParlAI's ids first, then the aliases."""

    ids: dict[str, int]  # piece, as the `tokenizers` library writes it -> id
    num_rows: int  # rows of embeddings in the checkpoint; aliases begin here
    alias_targets: list[int]  # the id that each alias stands for


def dictionary_tokens(settings: Settings, lines: list[str]) -> list[str]:
    """ParlAI's tokens in the order of their ids: the special ones first, then the lines of model.dict, each once."""
    lowered = settings.null_token == settings.null_token.lower()
    special = [settings.null_token, settings.start_token, settings.end_token, settings.unk_token]
    written = [token.lower() if lowered and token in _SPECIAL_TOKENS else token for token in lines]
    return list(dict.fromkeys(chain(special, written)))


def vocabulary(tokens: list[str], merges: list[tuple[str, str]], settings: Settings, num_rows: int) -> Vocabulary:
    """The vocabulary for `num_rows` embeddings; those beyond the dictionary are padding, to which no text leads.

    Raises:
        ValueError: the dictionary has more tokens than there are rows, or a piece that reads like a special token.
    """
    if len(tokens) > num_rows:
        raise ValueError(
            f"The dictionary has {len(tokens)} tokens, but the model embeds only {num_rows}: model.dict belongs to "
            "another checkpoint. Put the right one beside the model."
        )
    special = {settings.null_token, settings.start_token, settings.end_token, settings.unk_token}
    _mention_gaps([token for token in tokens if token not in special], merges, num_rows - len(tokens))
    padding = [f"__fp16_pad_{i}__" for i in range(num_rows - len(tokens))]
    names = [token if token in special else _piece(token) for token in tokens] + padding
    ids = {name: position for position, name in enumerate(names)}
    if len(ids) < len(names):
        twice = next(name for position, name in enumerate(names) if ids[name] != position)
        raise ValueError(f"Two tokens of the dictionary read {twice!r}, so they cannot be told apart.")
    real = {_piece(token): position for position, token in enumerate(tokens)}  # as merging writes special tokens too
    targets = []
    for symbol in dict.fromkeys(chain(chain.from_iterable(merges), map("".join, merges))):
        if symbol in ids and symbol not in real:
            raise ValueError(f"The merges lead to {symbol!r} within a word, which reads like a special token.")
        if symbol not in ids:
            ids[symbol] = len(ids)
            targets.append(real.get(symbol, ids[settings.unk_token]))
    return Vocabulary(ids, num_rows, targets)


def _mention_gaps(tokens: list[str], merges: list[tuple[str, str]], surplus: int) -> None:
    """Warn where model.dict, model.dict.codecs and the weights look as if lines were missing."""
    if surplus > _MOST_PADDING:
        logger.warning(
            "The model embeds %d more tokens than model.dict has. They are taken for padding, of which half-precision "
            "training adds at most %d: is the file complete?",
            surplus,
            _MOST_PADDING,
        )
    made = set(map("".join, merges))
    pieces = [_piece(token) for token in tokens if not token.lower().startswith("__fp16_pad_")]
    if lost := [piece for piece in pieces if len(piece.removesuffix(END_OF_WORD)) > 1 and piece not in made]:
        some = f"{len(lost)} tokens of model.dict, such as {', '.join(map(repr, lost[:3]))}"
        logger.warning("No text leads to %s: is model.dict.codecs complete?", some)


def _piece(token: str) -> str:
    """A token of the dictionary as subword-nmt writes it while it merges."""
    return token.removesuffix(_MORE_OF_WORD) if token.endswith(_MORE_OF_WORD) else token + END_OF_WORD


def build_tokenizer(
    words: Vocabulary, merges: list[tuple[str, str]], settings: Settings, max_length: int
) -> ParlAITokenizer:
    """The tokenizer of a checkpoint; it reads at most `max_length` tokens, and cuts on the left."""
    backend = Tokenizer(
        models.BPE(vocab=words.ids, merges=merges, unk_token=settings.unk_token, end_of_word_suffix=END_OF_WORD)
    )
    lower = [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()] if settings.lower else []
    backend.normalizer = normalizers.Sequence([*lower, normalizers.Replace("\n", " __newln__ ")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    backend.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    start, end = settings.start_token, settings.end_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0",
        pair=f"{start}:0 $A:0 {end}:0 {start}:1 $B:1 {end}:1",
        special_tokens=[(token, words.ids[token]) for token in dict.fromkeys([start, end])],
    )
    return ParlAITokenizer(
        tokenizer_object=backend,
        pad_token=settings.null_token,
        unk_token=settings.unk_token,
        bos_token=start,
        eos_token=end,
        # "__start__" in a text is a word like any other to ParlAI: merged, not recognised.
        split_special_tokens=True,
        model_max_length=max_length,
        truncation_side="left",
        padding_side="right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        first_alias=words.num_rows,
        num_aliases=len(words.alias_targets),
        special_aliases={
            str(alias): target
            for alias, target in enumerate(words.alias_targets, start=words.num_rows)
            if target != words.ids[settings.unk_token]
        },
    )
