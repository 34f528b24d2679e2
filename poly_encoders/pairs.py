"""A context and a candidate as the one row of tokens that a Cross-encoder reads."""

from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

from poly_encoders.modeling.configuration_poly_encoder import token_limit
from poly_encoders.modeling.text_poly_encoder import cutting_of, plain_tokens


def pair_room(tokenizer: Any, encoder: PreTrainedModel) -> int:
    """Positions of the encoder beside a pair's special tokens."""
    return token_limit(tokenizer, encoder) - tokenizer.num_special_tokens_to_add(pair=True)


def pair_limits(room: int, max_context_length: int | None, max_candidate_length: int | None) -> tuple[int, int]:
    """Tokens kept at most of a context and of a candidate, special tokens not counted.

    Of a pair that is too long all the same, the context gives way.

    Args:
        room: Positions beside the special tokens, as `pair_room` gives them.
        max_context_length, max_candidate_length: What is wished for. When left out, a candidate may take a quarter of
            the room, a context the rest.

    Raises:
        ValueError: one of them leaves no position for the other.
    """
    candidate = max(1, room // 4) if max_candidate_length is None else max_candidate_length
    context = max(1, room - candidate) if max_context_length is None else max_context_length
    if max(context, candidate) > room - 1:
        raise ValueError(
            f"max_context_length={context} and max_candidate_length={candidate} must each be at most {room - 1}: the "
            f"encoder has positions for {room} tokens beside its special ones, and the other text needs one."
        )
    return context, candidate


class PairTokenizer:
    """Texts to rows of token ids: each side cut on its own side, the tokenizer's own special tokens between.

    Args:
        tokenizer: The pair's tokenizer.
        keep_context, keep_candidate: Tokens kept at most of each, the last and the first, as `pair_limits` gives them.
        room: Positions beside the special tokens, as `pair_room` gives them; if a pair is too long all the same, the
            context gives way.
        prompt: Put before each context, whose room it takes.

    Raises:
        ValueError: the prompt leaves no room.
    """

    def __init__(self, tokenizer: Any, keep_context: int, keep_candidate: int, room: int, prompt: str | None) -> None:
        self.tokenizer = tokenizer
        self.keep_candidate = keep_candidate
        self.prompt: list[int] = self._encoded([prompt])[0] if prompt else []
        self.keep_context = keep_context - len(self.prompt)
        self.room = room - len(self.prompt)
        self.frame = self._frame() if tokenizer.is_fast else None
        if self.keep_context < 1 or self.room < 2:
            raise ValueError(
                f"The prompt {prompt!r} alone fills the {keep_context} tokens kept of a context. Shorten it."
            )

    def __call__(self, contexts: list[str], candidates: list[str]) -> dict[str, list[list[int]]]:
        """`input_ids` and `token_type_ids` of each pair, not padded."""
        texts = list(dict.fromkeys(contexts))  # a ranking has one context, however many candidates there are
        tokens = dict(zip(texts, self._encoded(texts), strict=True))
        pairs = zip(contexts, self._encoded(candidates), strict=True)
        rows = [self._row(tokens[context], candidate) for context, candidate in pairs]
        return {"input_ids": [ids for ids, _ in rows], "token_type_ids": [segments for _, segments in rows]}

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return plain_tokens(self.tokenizer, texts)["input_ids"]

    def _frame(self) -> tuple[list[list[int]], list[list[int]]]:
        """Special token ids before, between and after the two texts, and the segments of all five parts.

        Read off a pair of short texts. Post-processing long ones would pair up all that was cut off them, which takes
        time and memory in the product of their lengths.
        """
        context, candidate = plain_tokens(self.tokenizer, ["a", "a"]).encodings
        row = self.tokenizer.backend_tokenizer.post_process(context, candidate, add_special_tokens=True)
        own = [position for position, special in enumerate(row.special_tokens_mask) if not special]
        first, last = own[: len(context.ids)], own[len(context.ids) :]
        cuts = [0, first[0], first[-1] + 1, last[0], last[-1] + 1, len(row.ids)]
        parts = [slice(start, end) for start, end in pairwise(cuts)]
        return [row.ids[parts[i]] for i in (0, 2, 4)], [row.type_ids[part] for part in parts]

    def _row(self, context: list[int], candidate: list[int]) -> tuple[list[int], list[int]]:
        candidate = candidate[: min(self.keep_candidate, self.room - 1)]
        kept = min(len(context), self.keep_context, self.room - len(candidate))
        context = self.prompt + context[len(context) - kept :]
        if self.frame is None:
            row = self.tokenizer.prepare_for_model(context, candidate, return_token_type_ids=True)
            return row["input_ids"], row["token_type_ids"]
        (before, between, after), (first, second, third, fourth, fifth) = self.frame
        after = cutting_of(self.tokenizer).closing(after, len(candidate), self.keep_candidate, "right")
        ids = [*before, *context, *between, *candidate, *after]
        segments = [*first, *second[:1] * len(context), *third, *fourth[:1] * len(candidate), *fifth[: len(after)]]
        return ids, segments
