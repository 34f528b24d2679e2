"""Which of a ranking's candidates are hard negatives: the rules, apart from any model.

A near-duplicate has the same words in the same order once case, punctuation and spaces are gone, or sets of words whose
Jaccard similarity reaches a threshold.

Two margins can be given, and a candidate has to keep both:

    score <= positive - margin
    score <= positive - relative_margin * |positive|

The second is NV-Retriever's `(1 - relative_margin) * positive` (Moreira et al., arXiv:2407.15831) for positive scores.
Raw scores may be negative, where that product would lie above the positive score, so the absolute value counts here.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class MiningOptions:
    """What counts as a hard negative.

    Args:
        num_negatives: n, how many for each row.
        depth: How many of a context's best to look at first; doubled until n are found or there are no more.
        skip_top: Pass over so many of the best, counted without right candidates and duplicates of them.
        margin: How far below the right candidate's score a negative's must be. 0 leaves out those that score higher
            than it; `-inf` none.
        relative_margin: The same as a share of the right candidate's score, such as 0.05.
        max_positive_similarity: Jaccard similarity of the sets of words from which on a candidate is a near-duplicate.
        sampling: `"top"`, the best n, or `"random"`, n of those found among the first `depth`.
        too_few: What to do with a row for which n cannot be found: `"fill"` it with other candidates at random, those
            within the margin among them, or `"drop"` it.
        seed: Of everything random.
    """

    num_negatives: int = 5
    depth: int = 100
    skip_top: int = 0
    margin: float = 0.0
    relative_margin: float | None = None
    max_positive_similarity: float = 0.9
    sampling: Literal["top", "random"] = "top"
    too_few: Literal["fill", "drop"] = "fill"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_negatives", 1), ("depth", 1), ("skip_top", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if np.isnan(self.margin) or self.margin == np.inf:
            raise ValueError(f"margin must be a number, or -inf for none, got {self.margin}.")
        if self.relative_margin is not None and not 0 <= self.relative_margin < np.inf:
            raise ValueError(f"relative_margin must be at least 0, got {self.relative_margin}.")
        if not 0 < self.max_positive_similarity <= 1:
            raise ValueError(
                f"max_positive_similarity must be above 0 and at most 1, got {self.max_positive_similarity}."
            )
        if self.sampling not in ("top", "random") or self.too_few not in ("fill", "drop"):
            raise ValueError(
                f"sampling is 'top' or 'random', too_few 'fill' or 'drop', got {self.sampling!r} and {self.too_few!r}."
            )

    def highest_score(self, positive: float) -> float:
        """The highest score that a negative may have beside this right candidate's."""
        highest = positive - self.margin
        return (
            highest if self.relative_margin is None else min(highest, positive - self.relative_margin * abs(positive))
        )


class Selection(NamedTuple):
    """The negatives of one row."""

    chosen: list[int]  # positions in the ranking
    duplicates: int  # near-duplicates of the right candidates met on the way, those within the margin
    too_close: int  # candidates met on the way that the margin leaves out


def select_negatives(
    texts: Sequence[str],
    scores: Sequence[float],
    own: set[str],
    positive: float,
    options: MiningOptions,
    seed: str,
    *,
    complete: bool,
) -> Selection | None:
    """Choose one row's negatives from a ranking.

    Args:
        texts: The best candidates, best first.
        scores: Theirs.
        own: All right candidates of the context.
        positive: The score of the row's.
        options: What counts as a hard negative.
        seed: Of the row's own draw.
        complete: Whether the ranking holds all candidates there are.

    Returns:
        The selection, with fewer than n candidates where no more are to be had, or `None` where a longer ranking may
        have more.
    """
    highest, eligible, rank, duplicates, too_close = options.highest_score(positive), [], 0, 0, 0
    for position, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if text in own:
            continue
        if rank >= options.skip_top and score > highest:  # before comparing words, which takes far longer
            too_close += 1
            continue
        if any(is_near_duplicate(text, right, options.max_positive_similarity) for right in own):
            duplicates += 1
            continue
        rank += 1
        if rank <= options.skip_top:
            continue
        eligible.append(position)
        if options.sampling == "top" and len(eligible) == options.num_negatives:
            break
    if len(eligible) < options.num_negatives and not complete:
        return None
    if options.sampling == "random" and len(eligible) > options.num_negatives:
        eligible = random.Random(seed).sample(eligible, options.num_negatives)
    return Selection(eligible, duplicates, too_close)


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
