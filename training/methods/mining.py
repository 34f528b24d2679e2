"""Hard negatives: for each context the candidates of others that a trained model ranks highest.

Every different candidate text of a data set is encoded once, and each context's exact best of them are found with
`poly_encoders.scoring.top_k`. Left out are all positives of the same context, near-duplicates of them, and candidates
that score too close to the positive, because a negative that a good model prefers to the positive often is right as
well (Moreira et al., NV-Retriever, arXiv:2407.15831); `negative_rules` says which those are.

The result depends on the data, the model and the seed, not on the number of processes: texts are encoded in blocks that
are the same whoever encodes them.
"""

from collections.abc import Iterable
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
from poly_encoders.scoring import prepare, top_k
from poly_encoders.training.data.checks import checked_examples, settled, text_columns
from poly_encoders.training.methods.negative_rules import MiningOptions, Selection, select_negatives

TEXTS_AT_ONCE = 4096  # candidate texts in a block
CONTEXTS_AT_ONCE = 512  # contexts in a block: their vectors are held, and a Poly-encoder has m of them for each
SCORES_AT_ONCE = 2**24  # of one search


@dataclass
class MiningReport:
    """What mining found, summed over all rows."""

    rows: int  # kept
    dropped_rows: int
    positive_score: float  # mean over the rows kept
    negative_score: float  # mean over their negatives
    duplicates: int
    too_close: int
    filled: int  # negatives drawn at random


class _Row(NamedTuple):
    row: int
    positive: float
    negatives: list[tuple[int, float]]  # positions in the pool, and scores; none where the row is dropped
    selection: Selection


def mine_negatives(
    model: Any, data: Dataset, options: MiningOptions, batch_size: int = 64, show_progress_bar: bool = True
) -> tuple[Dataset, MiningReport]:
    """Find hard negatives for every row; all processes call it together and all get the result.

    Args:
        model: A `PolyEncoder`, or a `BiEncoder` that scores by the dot product or the cosine.
        data: Contexts in the first column, positives in the second; any further columns are negatives, which only join
            the texts that are chosen from.
        options: What counts as a hard negative.
        batch_size: Texts encoded at once.
        show_progress_bar: Show bars, in the main process.

    Returns:
        The data set of the first two columns and `negative_1` ... `negative_n`, best first where `sampling` is `"top"`,
        in the order of the rows; and what was found.

    Raises:
        TypeError: a model that cannot encode candidates apart, such as a Cross-encoder.
        ValueError: fewer different candidates than a row needs, or data that cannot be read.
    """
    check_miner(model)
    data = settled(checked_examples(data, "The data set"))
    context_column, positive_column, *further = text_columns(data)
    positives = list(data[positive_column])
    pool = list(dict.fromkeys([*positives, *(text for name in further for text in data[name])]))
    if options.num_negatives >= len(pool):
        raise ValueError(f"There are only {len(pool)} different candidates. Lower num_negatives below that.")
    miner = _Miner(model, pool, positives, options, batch_size, show_progress_bar)
    found = miner.mine(model.context_texts(data[context_column]))
    kept = [row for row in found if row.negatives]
    if not kept:
        raise ValueError(
            "Every row was dropped for want of hard negatives. Lower skip_top or the margins, or fill the rows up."
        )
    result = data.select([row.row for row in kept]).select_columns([context_column, positive_column])
    for place in range(options.num_negatives):
        result = result.add_column(f"negative_{place + 1}", [pool[row.negatives[place][0]] for row in kept])
    return result, MiningReport(
        rows=len(kept),
        dropped_rows=len(found) - len(kept),
        positive_score=float(np.mean([row.positive for row in kept])),
        negative_score=float(np.mean([score for row in kept for _, score in row.negatives])),
        duplicates=sum(row.selection.duplicates for row in found),
        too_close=sum(row.selection.too_close for row in found),
        filled=sum(row.selection.filled for row in kept),
    )


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
        self,
        model: Any,
        pool: list[str],
        positives: list[str],
        options: MiningOptions,
        batch_size: int,
        show_progress_bar: bool,
    ) -> None:
        self.model, self.pool, self.positives, self.options = model, pool, positives, options
        self.state = process_state()
        self.encoding = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        self.show_progress_bar = show_progress_bar and self.state.is_main_process
        self.scale = float(model.final_scale) if isinstance(model, PolyEncoder) else 1.0
        self.is_cosine = isinstance(model, BiEncoder) and model.similarity_fn_name == "cosine"
        self.index = {text: position for position, text in enumerate(pool)}
        self.candidates = prepare(self._encoded_pool())

    def mine(self, contexts: list[str]) -> list[_Row]:
        """Rows in their order, those of all processes."""
        rows: dict[str, list[int]] = {}
        for row, context in enumerate(contexts):
            rows.setdefault(context, []).append(row)
        found: list[_Row] = []
        for block in self._own_blocks(list(rows), CONTEXTS_AT_ONCE, "Mining"):
            vectors = self._directed(self.model.encode_query(block, **self.encoding))
            vectors = vectors if vectors.dim() == 3 else vectors[:, None]  # (b, m, dim), m = 1 for a Bi-encoder
            found += self._mine_block(vectors, [rows[context] for context in block])
        return sorted(gather_object(found), key=lambda entry: entry[0])

    def _encoded_pool(self) -> Tensor:
        """`(n, dim)` float32, the same in all processes."""
        blocks = self._own_blocks(self.pool, TEXTS_AT_ONCE, "Encoding candidates")
        encoded = [self._directed(self.model.encode_document(block, **self.encoding)) for block in blocks]
        width, processes = self.model.get_embedding_dimension(), self.state.num_processes
        own = torch.cat(encoded) if encoded else torch.empty((0, width), device=self.state.device)
        if processes == 1:
            return own
        gathered = gather(pad_across_processes(own.to(self.state.device)))
        parts = [part.split(TEXTS_AT_ONCE) for part in gathered.chunk(processes)]
        numbers = range(-(-len(self.pool) // TEXTS_AT_ONCE))
        return torch.cat([parts[n % processes][n // processes] for n in numbers])[: len(self.pool)].to(own.device)

    def _own_blocks(self, texts: list[str], size: int, title: str) -> Iterable[list[str]]:
        """This process's share of the texts, in blocks that are the same for any number of processes."""
        blocks = [texts[first : first + size] for first in range(0, len(texts), size)]
        mine = blocks[self.state.process_index :: self.state.num_processes]
        return tqdm(mine, desc=title, unit="block", disable=not self.show_progress_bar)

    def _directed(self, vectors: Tensor) -> Tensor:
        """Vectors whose dot product is the model's score."""
        return normalize(vectors.float(), dim=-1) if self.is_cosine else vectors.float()

    def _mine_block(self, contexts: Tensor, rows: list[list[int]]) -> list[_Row]:
        """The rows of some contexts; those that need a longer ranking come again with one."""
        scored = [self._positives(vectors, own) for vectors, own in zip(contexts, rows, strict=True)]
        found: list[_Row] = []
        waiting, depth = dict(enumerate(scored)), min(self.options.depth, len(self.pool))
        while waiting:
            again: dict[int, dict[int, float]] = {}
            at_once = max(1, SCORES_AT_ONCE // depth)
            for first in range(0, len(waiting), at_once):
                places = list(waiting)[first : first + at_once]
                best = top_k(contexts[places], self.candidates, depth, scale=self.scale)
                for place, scores, indices in zip(places, best.scores.tolist(), best.indices.tolist(), strict=True):
                    ranking = [(self.pool[index], score) for index, score in zip(indices, scores, strict=True)]
                    own, complete = {self.positives[row] for row in rows[place]}, depth == len(self.pool)
                    for row, positive in waiting[place].items():
                        selection = select_negatives(ranking, own, positive, self.options, row, complete)
                        if selection is None:
                            again.setdefault(place, {})[row] = positive
                        else:
                            negatives = [(indices[position], scores[position]) for position in selection.chosen]
                            found.append(_Row(row, positive, negatives, selection))
            waiting, depth = again, min(2 * depth, len(self.pool))
        return found

    def _positives(self, context: Tensor, rows: list[int]) -> dict[int, float]:
        """A context's rows and the scores of their positives, rounded as `top_k` does: equal vectors, equal scores."""
        vectors = torch.as_tensor(self.candidates.vectors)[[self.index[self.positives[row]] for row in rows]]
        scores = poly_score(context[None].double(), vectors.double(), scale=self.scale)
        return dict(zip(rows, scores[0].float().tolist(), strict=True))
