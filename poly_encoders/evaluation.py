"""Ranking quality over fixed candidate sets: R@k/C and MRR, for the three encoders alike."""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm.auto import tqdm

from poly_encoders.conversations import TURN_SEPARATOR, candidate_texts, context_text

logger = logging.getLogger(__name__)


class CandidateRankingEvaluator(BaseEvaluator):
    """How high the right candidate ranks among those of its set.

    R@k/C is the share of sets in which it is among the first k of C (Humeau et al., section 5); MRR the mean of
    1 / rank. A candidate that scores the same as the right one counts as ranked above it, so a model that cannot tell
    them apart gains nothing by it; one with the right one's very text is no rival of it.

    Args:
        samples: `{"context": ..., "candidates": [...], "label": index}`, one for each set; the context in any form that
            `rank` takes, sets of any size, `label` 0 where left out. A `datasets.Dataset` of these columns will do.
        name: Goes before the names of the metrics and into the file's.
        at_k: The k of R@k.
        batch_size: Texts (pairs, for a Cross-encoder) encoded at once.
        show_progress_bar: Show one bar per pass.
        write_csv: Append the results to a CSV file in the output folder.
        shared_candidates: Further candidates that every set has, after its own.
        dataset: Where the sets are from, a name or a Hub id, for the model's card.
        split: The split of that data, for the card.

    Returns, when called with a model:
        `{"recall@1": ..., "recall@5": ..., "mrr": ...}`, shares between 0 and 1, with `name` in front.

    Raises:
        ValueError: no samples, an empty set, or a label outside its set.
        TypeError: a context or a candidate that is no text.
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Any]],
        name: str = "",
        at_k: Sequence[int] = (1, 2, 5, 10),
        batch_size: int = 64,
        show_progress_bar: bool = True,
        write_csv: bool = True,
        shared_candidates: Sequence[str] = (),
        dataset: str = "",
        split: str = "",
    ) -> None:
        super().__init__()
        self.shared_candidates = candidate_texts(shared_candidates)
        self.samples = [_checked(sample, position) for position, sample in enumerate(samples)]
        if not self.samples:
            raise ValueError("There are no samples to evaluate on. Check the file or the split that they come from.")
        if not at_k or min(at_k) < 1:
            raise ValueError(f"at_k must name at least one k of 1 or more, got {tuple(at_k)}.")
        self.name = name
        self.dataset = dataset
        self.split = split
        self.at_k = sorted(at_k)
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.primary_metric = f"recall@{self.at_k[0]}"
        self.csv_file = f"candidate_ranking{'_' + name if name else ''}.csv"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        ranks = self.ranks(model)
        results = {f"recall@{k}": float((ranks <= k).mean()) for k in self.at_k}
        results["mrr"] = float((1.0 / ranks).mean())
        if output_path is not None and self.write_csv:
            self._append_row(Path(output_path), epoch, steps, results)
        metrics = self.prefix_name_to_metrics(results, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        logger.info("%s: %s", self.name or "ranking", ", ".join(f"{key} {value:.4f}" for key, value in results.items()))
        return metrics

    def ranks(self, model: Any) -> np.ndarray:
        """Rank of the right candidate in each set, `(sets,)` int64, 1 for the best."""
        scores = self._scores_apart(model) if isinstance(model, SentenceTransformer) else self._scores_together(model)
        shared: dict[str, list[int]] = {}
        for position, text in enumerate(self.shared_candidates):
            shared.setdefault(text, []).append(position)
        ranks = []
        for sample, row in zip(self.samples, scores, strict=True):
            own, label = sample["candidates"], sample["label"]
            again = [position for position, text in enumerate(own) if text == own[label] and position != label]
            again += [len(own) + position for position in shared.get(own[label], [])]
            rivals = np.delete(row, [label, *again])
            # Not `>=`: a NaN anywhere must count against the model, and compares as False.
            ranks.append(1 + len(rivals) - int((rivals < row[label]).sum()))
        return np.array(ranks, dtype=np.int64)

    def _scores_apart(self, model: SentenceTransformer) -> Iterable[np.ndarray]:
        """Each text is encoded once, however many sets it is in."""
        texts = list(dict.fromkeys(text for sample in self.samples for text in sample["candidates"]))
        position = {text: index for index, text in enumerate(texts)}
        options: dict[str, Any] = {"batch_size": self.batch_size, "convert_to_tensor": True}
        options["show_progress_bar"] = self.show_progress_bar
        contexts = model.encode_query([self._context(sample, model) for sample in self.samples], **options)
        candidates = model.encode_document(texts, **options)
        shared = model.encode_document(self.shared_candidates, **options) if self.shared_candidates else None
        for first in range(0, len(self.samples), self.batch_size):
            block = contexts[first : first + self.batch_size]
            further = None if shared is None else model.similarity(block, shared)
            for index, sample in enumerate(self.samples[first : first + self.batch_size]):
                own = candidates[[position[text] for text in sample["candidates"]]]
                row = model.similarity(block[index][None], own)[0]
                yield (row if further is None else torch.cat([row, further[index]])).float().cpu().numpy()

    def _scores_together(self, model: Any) -> Iterable[np.ndarray]:
        """A Cross-encoder reads every pair; sets go in groups that fill whole batches."""
        bar = tqdm(total=len(self.samples), desc="Ranking", unit="set", disable=not self.show_progress_bar)
        group: list[dict[str, Any]] = []
        for position, sample in enumerate(self.samples):
            group.append(sample)
            sizes = [len(member["candidates"]) + len(self.shared_candidates) for member in group]
            if sum(sizes) < 16 * self.batch_size and position + 1 < len(self.samples):
                continue
            flat = [
                (self._context(member, model), text)
                for member in group
                for text in [*member["candidates"], *self.shared_candidates]
            ]
            scores = model.predict(flat, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True)
            for part in torch.split(scores.float().cpu(), sizes):
                yield part.numpy()
            bar.update(len(group))
            group = []
        bar.close()

    @staticmethod
    def _context(sample: dict[str, Any], model: Any) -> str:
        separator = getattr(model, "turn_separator", TURN_SEPARATOR)  # upstream's models have no such thing
        return context_text(sample["context"], separator, getattr(model, "max_turns", None))

    def _append_row(self, folder: Path, epoch: float, steps: int, results: dict[str, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / self.csv_file
        is_new = not file.exists()
        with file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if is_new:
                writer.writerow(["epoch", "steps", *results])
            writer.writerow([epoch, steps, *results.values()])

    @property
    def metric_labels(self) -> dict[str, str]:
        """What the metrics are called in tables: R@1/20 where every set has 20 candidates.

        R@k of sets with no more than k candidates is 1 whatever the model does, and is left out.
        """
        sizes = self._set_sizes()
        of = f"/{min(sizes):,}" if len(sizes) == 1 else ""
        return {**{f"recall@{k}": f"R@{k}{of}" for k in self.at_k if k < max(sizes)}, "mrr": "MRR"}

    @property
    def about(self) -> str:
        """What was measured, for the model's card."""
        sizes = self._set_sizes()
        size = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        return (
            f"{len(self.samples):,} contexts, each with {size} candidates, one of them right. R@k is the share of "
            "contexts whose right candidate is among the first k; MRR is the mean of 1 / its rank. A tie counts as "
            "ranked below."
        )

    def _set_sizes(self) -> set[int]:
        return {len(sample["candidates"]) + len(self.shared_candidates) for sample in self.samples}

    def get_config_dict(self) -> dict[str, Any]:
        return {"sets": len(self.samples), "at_k": self.at_k, "shared_candidates": len(self.shared_candidates)}


def _checked(sample: Mapping[str, Any], position: int) -> dict[str, Any]:
    if missing := {"context", "candidates"} - sample.keys():
        raise ValueError(f"Sample {position} has no {sorted(missing)}, only {sorted(sample)}.")
    try:
        context_text(sample["context"])
        candidates = candidate_texts(sample["candidates"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"Sample {position}: {error}") from None
    label = sample.get("label", 0)
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise TypeError(f"Sample {position} has the label {label!r}; expected the position of the right candidate.")
    if not 0 <= label < len(candidates):
        raise ValueError(f"Sample {position} has {len(candidates)} candidates, but its label is {label}.")
    return {"context": sample["context"], "candidates": candidates, "label": int(label)}
