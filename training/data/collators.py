"""From rows of text to a batch of tokens: what the data loader's workers do, ahead of the step."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from poly_encoders.modeling.text_poly_encoder import context_text
from poly_encoders.training.data.checks import NO_TEXTS, cells, text_columns

TRIES = 20  # to draw a text that is not the positive again; a data set of one text has none


@dataclass
class ContextFirstCollator(SentenceTransformerDataCollator):
    """Tokenizes the first column as contexts and the others as candidates."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or ("query" if column_position == 0 else "document")


@dataclass
class FrozenCandidatesCollator(ContextFirstCollator):
    """Tokenizes the contexts alone: a candidate is a row of the index of vectors that were computed before.

    Args:
        rows: The row of each candidate's text.
        positives: By `context_key`, the rows of the positives of every context that has several.

    Returns, when called with rows:
        Features of the contexts; `candidate_rows`, `(batch, 1 + n)` int64, the positive first; `known_positives`,
        `(batch, k)` int64, rows of the positives of each context, in any number; `label` where there are scores.
    """

    rows: Mapping[str, int] = field(default_factory=dict, repr=False)
    positives: Mapping[bytes, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        context, *columns = [name for name in features[0] if name not in NO_TEXTS]
        batch = super().__call__([{name: row[name] for name in row if name not in columns} for row in features])
        try:
            rows = [[self.rows[row[name]] for name in columns] for row in features]
        except KeyError as error:
            raise ValueError(
                f"The candidate {error.args[0]!r:.80} has no vector: those of the training and the evaluation data "
                "that the trainer was built with have one. Give it all data that it is to evaluate on."
            ) from error
        known = [self.positives.get(context_key(row[context]), ()) for row in features]
        width = max(1, *map(len, known))
        known = [(*some, *own[:1] * (width - len(some))) for some, own in zip(known, rows, strict=True)]
        return {**batch, "candidate_rows": torch.tensor(rows), "known_positives": torch.tensor(known)}


def context_key(context: Any) -> bytes:
    """A short name of a context of any form."""
    return hashlib.blake2b(context_text(context).encode(), digest_size=8).digest()


@dataclass
class PairCollator(CrossEncoderDataCollator):
    """Pairs each context with its own candidates and with drawn ones, and tokenizes the pairs.

    What is drawn depends on the seed, the epoch and the row's texts alone, so neither the number of workers nor a
    resumed run changes it.

    Args:
        preprocess_fn: `CrossEncoder.preprocess`.
        pool: Texts to draw negatives from: the data set's positives (Humeau et al., section 5.2).
        num_negatives: Negatives of each context. Those that the row brings come first, all of them; the rest are drawn.
        seed: Of the draw.

    Returns, when called with rows:
        Features of `rows * (1 + n)` pairs, row after row, the positive first; `candidate_mask`, `(rows, 1 + n)`, false
        for a negative that is the positive's text; `label`, `(rows, ...)`, where the rows bring scores.
    """

    pool: Sequence[str] = ()
    num_negatives: int = 15
    seed: int = 0
    epoch: int = field(default=0, init=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        columns = super().__call__(features)
        options = {name: columns.pop(name) for name in ("prompt", "task") if name in columns}
        others = {name: columns.pop(name) for name in ("label", "dataset_name") if name in columns}
        pairs, masks = [], []
        for context, *candidates in zip(*columns.values(), strict=True):
            positive, missing = candidates[0], self.num_negatives + 1 - len(candidates)
            candidates += draw_candidates(self.pool, context, positive, missing, self.seed, self.epoch)
            pairs += [(context, candidate) for candidate in candidates]
            masks.append([place == 0 or text != positive for place, text in enumerate(candidates)])
        if isinstance(others.get("label"), list):  # upstream's, of scores
            others["label"] = torch.stack(others["label"])
        batch = {"features": self.preprocess_fn(pairs, **options), **others}
        batch["features"]["candidate_mask"] = torch.tensor(masks)
        return batch


def draw_candidates(
    pool: Sequence[str], context: Any, positive: str, number: int, seed: int, epoch: int = 0
) -> list[str]:
    """Negatives for a context: `number` texts of the pool, which may not be empty; the positive only if all are."""
    if number <= 0:
        return []
    if not pool:
        raise ValueError("There is nothing to draw negatives from. Train on one Dataset, or bring num_negatives a row.")
    key = hashlib.blake2b(repr((seed, epoch, context, positive)).encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(key, "big"))
    drawn = ((draw.choice(pool) for _ in range(TRIES)) for _ in range(number))
    return [next((text for text in tries if text != positive), positive) for tries in drawn]


def text_length(text: Any) -> int:
    """Characters in a context of any form, or in a candidate: near enough to sort by."""
    if isinstance(text, str):
        return len(text)
    turns = [text.get("content") or ""] if isinstance(text, dict) else text
    return sum(map(text_length, turns))


def row_lengths(data: Any, most: Sequence[int]) -> list[int]:
    """A number for each row of a data set that grows with the tokens of its context and its positive.

    At `most` so many characters of a context, and so many of a positive, count.
    """
    sides = [map(text_length, cells(data, name)) for name in text_columns(data)[:2]]
    return [sum(map(min, lengths, most)) for lengths in zip(*sides, strict=True)]
