"""From rows of text to a batch of tokens: what the data loader's workers do, ahead of the step."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

TRIES = 20  # to draw a text that is not the right one again; a data set of one text has none


@dataclass
class ContextFirstCollator(SentenceTransformerDataCollator):
    """Tokenizes the first column as contexts and the others as candidates."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or ("query" if column_position == 0 else "document")


@dataclass
class PairCollator(CrossEncoderDataCollator):
    """Pairs each context with its own candidates and with drawn ones, and tokenizes the pairs.

    What is drawn depends on the seed, the epoch and the row's texts alone, so neither the number of workers nor a
    resumed run changes it.

    Args:
        preprocess_fn: `CrossEncoder.preprocess`.
        pool: Texts to draw wrong candidates from: the data set's right ones (Humeau et al., section 5.2).
        num_negatives: Wrong candidates of each context. Those that the row brings come first, all of them; the rest are
            drawn.
        seed: Of the draw.

    Returns, when called with rows:
        Features of `rows * (1 + wrong)` pairs, row after row, the right candidate first; `candidate_mask`, `(rows,
        1 + wrong)`, false for a wrong candidate that is the right one's text; `label`, where a row brings scores.
    """

    pool: Sequence[str] = ()
    num_negatives: int = 15
    seed: int = 0
    epoch: int = field(default=0, init=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        columns = super().__call__(features)
        options = {name: columns.pop(name) for name in ("prompt", "task") if name in columns}
        labels, dataset_name = columns.pop("label", None), columns.pop("dataset_name", None)
        contexts, *own = columns.values()
        pairs, masks = [], []
        for context, *candidates in zip(contexts, *own, strict=True):
            right = candidates[0]
            missing = self.num_negatives - len(candidates) + 1
            candidates += draw_candidates(self.pool, context, right, missing, self.seed, self.epoch)
            pairs += [(context, candidate) for candidate in candidates]
            masks.append([position == 0 or text != right for position, text in enumerate(candidates)])
        batch: dict[str, Any] = {"features": self.preprocess_fn(pairs, **options)}
        batch["features"]["candidate_mask"] = torch.tensor(masks)
        if labels is not None:
            batch["label"] = torch.stack(list(labels))
        if dataset_name is not None:
            batch["dataset_name"] = dataset_name
        return batch


def draw_candidates(pool: Sequence[str], context: Any, right: str, number: int, seed: int, epoch: int = 0) -> list[str]:
    """Wrong candidates for a context: `number` texts of the pool, none of them the right one if there is another.

    Raises:
        ValueError: an empty pool.
    """
    if number <= 0:
        return []
    if not pool:
        raise ValueError(
            "There is nothing to draw wrong candidates from. Train on one Dataset, or bring num_negatives in each row."
        )
    key = hashlib.blake2b(repr((seed, epoch, context, right)).encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(key, "big"))
    return [_another(draw, pool, right) for _ in range(number)]


def _another(draw: random.Random, pool: Sequence[str], right: str) -> str:
    for _ in range(TRIES):
        if (text := draw.choice(pool)) != right:
            break
    return text


def text_length(text: Any) -> int:
    """Characters in a context of any form, or in a candidate: near enough to sort by."""
    if isinstance(text, str):
        return len(text)
    if isinstance(text, dict):
        return text_length(text.get("content", ""))
    return sum(text_length(turn) for turn in text)


def row_lengths(data: Any, most: Sequence[int]) -> list[int]:
    """A number for each row of a data set that grows with the tokens that its texts will have.

    Args:
        data: Rows of a context and candidates.
        most: The most characters that count of a context and of a right candidate.
    """
    lengths = [0] * len(data)
    for name, limit in zip(data.column_names[:2], most, strict=True):
        for row, text in enumerate(data[name]):
            lengths[row] += min(text_length(text), limit)
    return lengths
