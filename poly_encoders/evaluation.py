"""Ranking quality over fixed candidate sets: R@k/C and MRR, for the three encoders alike."""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from poly_encoders.modeling.text_poly_encoder import candidate_texts, context_text, context_texts

logger = logging.getLogger(__name__)


class CandidateRankingEvaluator(BaseEvaluator):
    """How high the positive, the candidate that was the real answer, ranks in its set.

    R@k/C is the share of sets in which it is among the first k of C (Humeau et al., section 5); MRR the mean of
    1 / rank. A candidate that scores the same as the positive counts as ranked above it, so a model that cannot tell
    them apart gains nothing by it; one with the positive's very text counts as the positive.

    Args:
        samples: `{"context": ..., "candidates": [...], "label": index}` for each set, such as a `datasets.Dataset`: the
            context in any form that `rank` takes, sets of any size, the positive at `label`, 0 where left out.
        name: Goes before the names of the metrics and into the file's.
        at_k: The k of R@k.
        batch_size, show_progress_bar: Texts (pairs, for a Cross-encoder) encoded at once; one bar for each pass.
        write_csv: Append the results to a CSV file in the output folder.
        dataset, split: Where the sets are from, a name or a Hub id and its split, for the model's card.

    Returns, when called with a model, one of ours or of sentence-transformers':
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
        dataset: str = "",
        split: str = "",
    ) -> None:
        super().__init__()
        self.samples = [_checked(sample, position) for position, sample in enumerate(samples)]
        if not self.samples:
            raise ValueError("There are no samples to evaluate on. Check the file or the split that they come from.")
        self.set_sizes = [len(sample["candidates"]) for sample in self.samples]
        if not at_k or min(at_k) < 1:
            raise ValueError(f"at_k must name at least one k of 1 or more, got {tuple(at_k)}.")
        self.name, self.dataset, self.split, self.at_k = name, dataset, split, sorted(at_k)
        self.batch_size, self.show_progress_bar, self.write_csv = batch_size, show_progress_bar, write_csv
        self.primary_metric = f"recall@{self.at_k[0]}"
        self.csv_file = f"candidate_ranking{'_' + name if name else ''}.csv"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        ranks = self.ranks(model)
        results = {f"recall@{k}": float((ranks <= k).mean()) for k in self.at_k}
        results["mrr"] = float((1.0 / ranks).mean())
        if output_path is not None and self.write_csv:
            file = Path(output_path, self.csv_file)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                if stream.tell() == 0:
                    writer.writerow(["epoch", "steps", *results])
                writer.writerow([epoch, steps, *results.values()])
        metrics = self.prefix_name_to_metrics(results, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        logger.info("%s: %s", self.name or "ranking", ", ".join(f"{key} {value:.4f}" for key, value in results.items()))
        return metrics

    def ranks(self, model: Any) -> np.ndarray:
        """Rank of the positive in each set, `(sets,)` int64, 1 for the best."""
        join = getattr(model, "context_texts", context_texts)  # upstream's models have no way of their own
        contexts = join([sample["context"] for sample in self.samples])
        score = self._scores_apart if isinstance(model, SentenceTransformer) else self._scores_together
        options = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar}
        ranks = []
        for sample, scores in zip(self.samples, score(model, contexts, options), strict=True):
            positive = scores[sample["label"]]
            rivals = scores[[text != sample["candidates"][sample["label"]] for text in sample["candidates"]]]
            # Not `>=`: a NaN anywhere must count against the model, and compares as False.
            ranks.append(1 + len(rivals) - int((rivals < positive).sum()))
        return np.array(ranks, dtype=np.int64)

    def _scores_apart(self, model: Any, contexts: Sequence[str], options: dict[str, Any]) -> Iterable[Tensor]:
        """Each text is encoded once, however many sets it is in."""
        texts = list(dict.fromkeys(text for sample in self.samples for text in sample["candidates"]))
        place = {text: index for index, text in enumerate(texts)}
        queries = model.encode_query(contexts, convert_to_tensor=True, **options)
        documents = model.encode_document(texts, convert_to_tensor=True, **options)
        for query, sample in zip(queries, self.samples, strict=True):
            own = documents[[place[text] for text in sample["candidates"]]]
            yield model.similarity(query[None], own)[0].float().cpu()

    def _scores_together(self, model: Any, contexts: Sequence[str], options: dict[str, Any]) -> Iterable[Tensor]:
        """A Cross-encoder reads every pair."""
        sets = zip(contexts, self.samples, strict=True)
        pairs = [(context, text) for context, sample in sets for text in sample["candidates"]]
        return model.predict(pairs, convert_to_tensor=True, **options).float().cpu().split(self.set_sizes)

    @property
    def metric_labels(self) -> dict[str, str]:
        """What the metrics are called in tables, R@1/20 where every set has 20; without R@k that is 1 for any model."""
        least, most = min(self.set_sizes), max(self.set_sizes)
        of = f"/{most:,}" if least == most else ""
        return {**{f"recall@{k}": f"R@{k}{of}" for k in self.at_k if k < most}, "mrr": "MRR"}

    @property
    def about(self) -> str:
        """What was measured, for the model's card."""
        least, most = min(self.set_sizes), max(self.set_sizes)
        size = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        return (
            f"{len(self.samples):,} contexts, each with {size} candidates, one of them the positive. R@k is the share "
            "of those whose positive is among the first k, MRR the mean of 1 / its rank. A tie counts as ranked below."
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"sets": len(self.samples), "at_k": self.at_k}


def _checked(sample: Mapping[str, Any], position: int) -> dict[str, Any]:
    if missing := {"context", "candidates"} - sample.keys():
        raise ValueError(f"Sample {position} has no {sorted(missing)}, only {sorted(sample)}.")
    context, label = sample["context"], sample.get("label", 0)
    try:
        text, candidates = context_text(context), candidate_texts(sample["candidates"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"Sample {position}: {error}") from None
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise TypeError(f"Sample {position} has the label {label!r}; expected the position of the positive.")
    if not 0 <= label < len(candidates):
        raise ValueError(f"Sample {position} has {len(candidates)} candidates, but its label is {label}.")
    return {"context": text if isinstance(context, str) else context, "candidates": candidates, "label": int(label)}
