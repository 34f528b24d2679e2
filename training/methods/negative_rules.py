"""Which of a ranking's candidates are hard negatives: the rules, apart from any model.

A near-duplicate has the same words in the same order once case, punctuation and spaces are gone, or sets of words whose
Jaccard similarity reaches a threshold. Of two margins that can be given a candidate has to keep both:

    score <= positive - margin
    score <= positive - relative_margin * |positive|

The second is NV-Retriever's `(1 - relative_margin) * positive` (Moreira et al., arXiv:2407.15831) for positive scores.
Raw scores may be negative, where that product would lie above the positive's score, so the absolute value counts here.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MiningOptions:
    """What counts as a hard negative."""

    num_negatives: int = _option(5, "n, negatives for each row.")
    depth: int = _option(100, "A context's best candidates looked at first; doubled until n are found.")
    skip_top: int = _option(0, "Pass over so many of the best, positives and duplicates of them not counted.")
    margin: float = _option(0.0, "How far below the positive's score a negative's must be; -inf for none.")
    relative_margin: float | None = _option(None, "The same as a share of the positive's score, such as 0.05.")
    max_positive_similarity: float = _option(0.9, "Jaccard similarity of words from which on one is a near-duplicate.")
    sampling: Literal["top", "random"] = _option("top", "The best, or a random choice of those in the first `depth`.")
    too_few: Literal["fill", "drop"] = _option("fill", "Fill rows with others, whatever their scores, or drop them.")
    seed: int = _option(0, "Of everything random.")

    def __post_init__(self) -> None:
        for name, least in (("num_negatives", 1), ("depth", 1), ("skip_top", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if np.isnan(self.margin) or self.margin == np.inf:
            raise ValueError(f"margin must be a number, or -inf for none, got {self.margin}.")
        if self.relative_margin is not None and not 0 <= self.relative_margin < np.inf:
            raise ValueError(f"relative_margin must be at least 0, got {self.relative_margin}.")
        if not 0 < self.max_positive_similarity <= 1:
            raise ValueError(f"max_positive_similarity must be in (0, 1], got {self.max_positive_similarity}.")
        if self.sampling not in ("top", "random") or self.too_few not in ("fill", "drop"):
            raise ValueError(f"There is no sampling={self.sampling!r} or too_few={self.too_few!r}; see --help.")

    def highest_score(self, positive: float) -> float:
        """The highest score that a negative may have beside this one of the positive."""
        relative = -np.inf if self.relative_margin is None else self.relative_margin * abs(positive)
        return positive - max(self.margin, relative)


class Selection(NamedTuple):
    """The negatives of one row."""

    chosen: list[int]  # positions in the ranking; none where the row is dropped
    duplicates: int  # near-duplicates of the positives met on the way, those within the margin
    too_close: int  # candidates met on the way that the margin leaves out
    filled: int  # how many of those chosen, the last, were drawn


def select_negatives(
    ranking: Sequence[tuple[str, float]],
    own: set[str],
    positive: float,
    options: MiningOptions,
    row: int,
    complete: bool,
) -> Selection | None:
    """Choose one row's negatives.

    Args:
        ranking: The best candidates and their scores, best first.
        own: All positives of the context; `positive` is the score of the row's.
        row: Its number, which with the seed makes its draws.
        complete: Whether these are all candidates that there are; if not, `None` where a longer ranking may have more.

    Raises:
        ValueError: there are too few others to fill the row up.
    """
    eligible, spare = list[int](), list[int]()
    highest, rank, duplicates, too_close = options.highest_score(positive), 0, 0, 0

    def is_duplicate(text: str) -> bool:
        return any(is_near_duplicate(text, mine, options.max_positive_similarity) for mine in own)

    for position, (text, score) in enumerate(ranking):
        if text in own:
            continue
        if rank >= options.skip_top and score > highest:  # before comparing words, which takes far longer
            too_close += 1
            spare.append(position)
        elif is_duplicate(text):
            duplicates += 1
        else:
            rank += 1
            (eligible if rank > options.skip_top else spare).append(position)
            if options.sampling == "top" and len(eligible) == options.num_negatives:
                break
    draw, missing = random.Random(f"{options.seed}-{row}"), options.num_negatives - len(eligible)
    if missing > 0 and not complete:
        return None
    if missing > 0 and options.too_few == "drop":
        eligible, missing = [], 0
    elif missing > 0:
        spare = [position for position in spare if not is_duplicate(ranking[position][0])]
        if len(spare) < missing:
            raise ValueError(
                f"Row {row} has only {len(spare) + len(eligible)} candidates that are not its own response, but "
                f"{options.num_negatives} are wanted. Lower num_negatives, or drop such rows (too_few 'drop')."
            )
        eligible += draw.sample(spare, missing)
    elif missing < 0:
        eligible = draw.sample(eligible, options.num_negatives)
    return Selection(eligible, duplicates, too_close, max(missing, 0))


def is_near_duplicate(first: str, second: str, threshold: float) -> bool:
    """Whether two texts have the same words, or sets of words whose Jaccard similarity is at least `threshold`."""
    words, word_set = _words(first)
    other_words, other_set = _words(second)
    return words == other_words or len(word_set & other_set) >= threshold * len(word_set | other_set)


@lru_cache(maxsize=2**17)
def _words(text: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Words in lower case, in order and as a set; a text without any, such as ':-)', is one word."""
    words = tuple(re.findall(r"\w+", text.lower())) or (text.strip(),)
    return words, frozenset(words)
