"""Hard negatives: for each context the wrong candidates that a trained model ranks highest.

Every different candidate text of a data set is encoded once, and each context's exact best of them are found with
`poly_encoders.scoring.top_k`. Left out are all right candidates of the same context, near-duplicates of them, and
candidates that score too close to the right one, because a wrong candidate that a good model prefers to the right one
often is right as well (Moreira et al., NV-Retriever, arXiv:2407.15831).

`poly_encoders.training.negative_rules` says which those are.

The result depends on the data, the model and the seed, not on the number of processes: texts are encoded in blocks that
are the same whoever encodes them.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.modeling import poly_score
from poly_encoders.scoring import PreparedCandidates, prepare, top_k
from poly_encoders.training.data_sources import text_columns
from poly_encoders.training.negative_rules import MiningOptions, is_near_duplicate, select_negatives

TEXTS_AT_ONCE = 4096  # candidate texts in a block
CONTEXTS_AT_ONCE = 512  # contexts in a block: their vectors are held, and a Poly-encoder has m of them for each
SCORES_AT_ONCE = 2**24  # of one search


@dataclass
class MiningReport:
    """What mining found, summed over all rows."""

    rows: int = 0  # kept
    dropped_rows: int = 0
    positive_score: float = 0.0  # mean over the rows kept
    negative_score: float = 0.0  # mean over their negatives
    duplicates: int = 0
    too_close: int = 0
    filled: int = 0  # negatives drawn at random


class _Ranking(NamedTuple):
    """The best candidates of a context, best first."""

    texts: list[str]
    scores: list[float]
    indices: list[int]  # in the pool


class _Row(NamedTuple):
    row: int
    positive: float
    negatives: list[int]  # positions in the pool; none where the row is dropped
    scores: list[float]
    duplicates: int
    too_close: int
    filled: int


def mine_negatives(
    model: Any,
    data: Dataset,
    options: MiningOptions,
    batch_size: int = 64,
    show_progress_bar: bool = True,
) -> tuple[Dataset, MiningReport]:
    """Find hard negatives for every row; all processes call it together and all get the result.

    Args:
        model: A `PolyEncoder`, or a `BiEncoder` that scores by the dot product or the cosine.
        data: Contexts in the first column, right candidates in the second; any further columns are wrong candidates,
            which only join the texts that are chosen from.
        options: What counts as a hard negative.
        batch_size: Texts encoded at once.
        show_progress_bar: Show bars, in the main process.

    Returns:
        The data set of the first two columns and `negative_1` ... `negative_n`, best first where `sampling` is `"top"`,
        in the order of the rows; and what was found.

    Raises:
        TypeError: a model that cannot encode candidates apart, such as a Cross-encoder.
        ValueError: fewer different candidates than a row needs.
    """
    check_miner(model)
    context_column, right_column, *further = text_columns(data)
    responses = list(data[right_column])
    pool = list(dict.fromkeys([*responses, *(text for name in further for text in data[name])]))
    if options.num_negatives >= len(pool):
        raise ValueError(
            f"The data holds {len(pool)} different candidates, so that a row cannot have {options.num_negatives} wrong "
            "ones. Lower num_negatives."
        )
    miner = _Miner(model, pool, options, batch_size, show_progress_bar)
    found = miner.mine(model.context_texts(data[context_column]), responses)
    kept = [row for row in found if row.negatives]
    if not kept:
        raise ValueError(
            "Every row was dropped for want of hard negatives. Lower skip_top or the margins, or fill the rows up."
        )
    result = data.select([row.row for row in kept]).select_columns([context_column, right_column])
    for place in range(options.num_negatives):
        result = result.add_column(f"negative_{place + 1}", [pool[row.negatives[place]] for row in kept])
    return result, _report(found, kept)


def process_state() -> PartialState:
    """The state of this process among its likes, on the accelerator where there is one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def check_miner(model: Any) -> None:
    """See that a model can mine.

    Raises:
        TypeError: it is none that encodes candidates apart from contexts.
        ValueError: its similarity is no product of vectors.
    """
    if not isinstance(model, PolyEncoder | BiEncoder):
        raise TypeError(
            f"A {type(model).__name__} cannot mine: it would have to read every pair of a context and a candidate. "
            "Mine with a PolyEncoder or a BiEncoder, and train the Cross-encoder on what it finds."
        )
    if isinstance(model, BiEncoder) and model.similarity_fn_name not in ("dot", "cosine"):
        raise ValueError(f"Mining scores by 'dot' or 'cosine', but the model's is {model.similarity_fn_name!r}.")


class _Miner:
    """The encoded candidates, and the search for those of each context."""

    def __init__(
        self, model: Any, pool: list[str], options: MiningOptions, batch_size: int, show_progress_bar: bool
    ) -> None:
        self.model, self.pool, self.options = model, pool, options
        self.state = process_state()
        self.encode_options: dict[str, Any] = {
            "batch_size": batch_size,
            "convert_to_tensor": True,
            "show_progress_bar": False,
        }
        self.show_progress_bar = show_progress_bar and self.state.is_main_process
        self.scale = model.final_scale if isinstance(model, PolyEncoder) else 1.0
        self.index = {text: position for position, text in enumerate(pool)}
        self.candidates: PreparedCandidates = prepare(self._encode_pool())

    def mine(self, contexts: list[str], responses: list[str]) -> list[_Row]:
        """Rows in their order, those of all processes."""
        rows: dict[str, list[int]] = {}
        for row, context in enumerate(contexts):
            rows.setdefault(context, []).append(row)
        found: list[_Row] = []
        for block in self._own_blocks(list(rows), CONTEXTS_AT_ONCE, "Mining"):
            vectors = self._as_several(self.model.encode_query(block, **self.encode_options))
            found += self._mine_block(vectors, [rows[context] for context in block], responses)
        return sorted(gather_object(found), key=lambda entry: entry[0])

    def _encode_pool(self) -> Tensor:
        """`(n, dim)` float32, the same in all processes."""
        blocks = self._own_blocks(self.pool, TEXTS_AT_ONCE, "Encoding candidates")
        encoded = [self._directed(self.model.encode_document(block, **self.encode_options)) for block in blocks]
        width = self.model.get_embedding_dimension()
        own = torch.cat(encoded) if encoded else torch.empty((0, width), device=self.state.device)
        if self.state.num_processes == 1:
            return own
        parts = gather(pad_across_processes(own.to(self.state.device))).chunk(self.state.num_processes)
        size, processes = TEXTS_AT_ONCE, self.state.num_processes
        slices = [
            parts[number % processes][number // processes * size :][: min(size, len(self.pool) - number * size)]
            for number in range(-(-len(self.pool) // size))
        ]
        return torch.cat(slices).to(own.device)

    def _own_blocks(self, texts: list[str], size: int, title: str) -> Iterable[list[str]]:
        """This process's share of the texts, in blocks that are the same for any number of processes."""
        blocks = [texts[first : first + size] for first in range(0, len(texts), size)]
        mine = blocks[self.state.process_index :: self.state.num_processes]
        return tqdm(mine, desc=title, unit="block", disable=not self.show_progress_bar)

    def _directed(self, vectors: Tensor) -> Tensor:
        """Vectors whose dot product is the model's score."""
        vectors = vectors.float()
        is_cosine = isinstance(self.model, BiEncoder) and self.model.similarity_fn_name == "cosine"
        return normalize(vectors, dim=-1) if is_cosine else vectors

    def _as_several(self, contexts: Tensor) -> Tensor:
        """`(b, m, dim)`; a Bi-encoder is a Poly-encoder with one vector."""
        contexts = self._directed(contexts)
        return contexts if contexts.dim() == 3 else contexts[:, None]

    def _mine_block(self, contexts: Tensor, rows: list[list[int]], responses: list[str]) -> list[_Row]:
        """The rows of some contexts; those that need a longer ranking come again with one."""
        owns = [{responses[row] for row in own} for own in rows]
        positives = [
            dict(zip(own, self._positive_scores(vectors, own, responses), strict=True))
            for vectors, own in zip(contexts, rows, strict=True)
        ]
        found: list[_Row] = []
        waiting = dict(enumerate(rows))  # place of a context in the block -> its rows without negatives
        depth = min(self.options.depth, len(self.pool))
        while waiting:
            again: dict[int, list[int]] = {}
            for place, scores, indices in self._rankings(contexts, list(waiting), depth):
                ranking = _Ranking([self.pool[index] for index in indices], scores, indices)
                for row in waiting[place]:
                    done = self._mine_row(row, positives[place][row], owns[place], ranking)
                    if done is None:
                        again.setdefault(place, []).append(row)
                    else:
                        found.append(done)
            waiting, depth = again, min(2 * depth, len(self.pool))
        return found

    def _rankings(
        self, contexts: Tensor, places: list[int], depth: int
    ) -> Iterator[tuple[int, list[float], list[int]]]:
        """For each of these contexts its place, and the scores and positions of its best candidates."""
        at_once = max(1, SCORES_AT_ONCE // depth)
        for first in range(0, len(places), at_once):
            which = places[first : first + at_once]
            best = top_k(contexts[which], self.candidates, depth, scale=self.scale)
            for place, scores, indices in zip(which, best.scores, best.indices, strict=True):
                yield place, scores.tolist(), indices.tolist()

    def _positive_scores(self, context: Tensor, rows: list[int], responses: list[str]) -> list[float]:
        """In float64 and then rounded, as `top_k` has them: equal vectors must get equal scores."""
        vectors = torch.as_tensor(self.candidates.vectors)[[self.index[responses[row]] for row in rows]]
        scores = poly_score(context[None].double(), vectors.double(), scale=self.scale)
        return scores[0].float().tolist()

    def _mine_row(self, row: int, positive: float, own: set[str], ranking: _Ranking) -> _Row | None:
        """One row, or `None` where it needs a longer ranking."""
        options, seed = self.options, f"{self.options.seed}-{row}"
        complete = len(ranking.texts) == len(self.pool)
        selection = select_negatives(ranking.texts, ranking.scores, own, positive, options, seed, complete=complete)
        if selection is None:
            return None
        chosen, missing = selection.chosen, options.num_negatives - len(selection.chosen)
        if missing and options.too_few == "drop":
            chosen = []
        elif missing:
            chosen = [*chosen, *self._others(ranking.texts, own, chosen, missing, seed, row)]
        return _Row(
            row,
            positive,
            [ranking.indices[position] for position in chosen],
            [ranking.scores[position] for position in chosen],
            selection.duplicates,
            selection.too_close,
            missing if chosen else 0,
        )

    def _others(
        self, texts: list[str], own: set[str], chosen: list[int], missing: int, seed: str, row: int
    ) -> list[int]:
        """Positions of wrong candidates that were not chosen, at random."""
        threshold = self.options.max_positive_similarity
        taken = set(chosen)
        others = [
            position
            for position, text in enumerate(texts)
            if position not in taken and not any(is_near_duplicate(text, right, threshold) for right in own)
        ]
        if len(others) < missing:
            raise ValueError(
                f"Row {row} has only {len(others) + len(chosen)} candidates that are not its own response, but "
                f"{self.options.num_negatives} are wanted. Lower num_negatives, or drop such rows (too_few 'drop')."
            )
        return random.Random(seed).sample(others, missing)


def _report(found: list[_Row], kept: list[_Row]) -> MiningReport:
    return MiningReport(
        rows=len(kept),
        dropped_rows=len(found) - len(kept),
        positive_score=float(np.mean([row.positive for row in kept])),
        negative_score=float(np.mean([row.scores for row in kept])),
        duplicates=sum(row.duplicates for row in found),
        too_close=sum(row.too_close for row in found),
        filled=sum(row.filled for row in kept),
    )
