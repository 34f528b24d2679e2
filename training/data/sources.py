"""Training data from anywhere: ChitChat, the paper's tasks, the Hub, saved data sets, JSONL, CSV and Parquet files.

In every data set the first column is the context and the rest are candidates, the positive first.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from poly_encoders.modeling.text_poly_encoder import checked_count
from poly_encoders.tasks import json_objects
from poly_encoders.training.data.checks import LABELS, NO_TEXTS, SCORES, check_scores, checked_examples, text_columns
from poly_encoders.training.data.chitchat import chitchat_ranking_sets, load_chitchat
from poly_encoders.training.data.task_files import TASK_FILES, load_task_examples, load_task_sets

__all__ = ["SCORES", "DataSource", "text_columns"]

_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # or replies such as "None", "null" and "NA" would count as missing
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}


@dataclass(frozen=True)
class DataSource:
    """Examples, and ranking sets of them; read once, when first asked for.

    Args:
        name: `"chitchat"`; one of the paper's tasks, `"convai2"`, `"dstc7"` or `"ubuntu-v2"`; a .jsonl, .json, .csv,
            .tsv or .parquet file; a folder that `save_to_disk` wrote; or a Hub data set id.
        split: Which one; a file or a folder with a single data set is one split, whatever this says.
        columns: Context, positive, negatives; all columns in their order when left out.
        config_name: The Hub data set's configuration.
        data_dir: The folder with a task's files as published.
        max_negatives: Columns of negatives in the examples, the first ones; all when left out.
        max_examples: At most so many examples, a seeded sample; all when left out.
        seed: Of the sample, and of the candidates drawn for ranking sets.
    """

    name: str
    split: str = "train"
    columns: list[str] | None = None
    config_name: str | None = None
    data_dir: str | None = None
    max_negatives: int | None = None
    max_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked_count(self.max_negatives, "max_negatives", 0)
        checked_count(self.max_examples, "max_examples", 0)

    def examples(self) -> Dataset:
        """A data set of contexts, positives and negatives, and a teacher's scores of them where it brings some.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a column is missing, or there are fewer than two, or no rows; otherwise as `checked_examples`.
        """
        return self._examples

    def ranking_sets(self, size: int, limit: int | None = None) -> list[dict[str, Any]]:
        """Ranking sets of `size` candidates for `CandidateRankingEvaluator`, or a seeded sample of `limit` of them.

        The row's positive comes first, then its negatives; the rest are positives of other rows, seeded. ChitChat's
        sets are its protocol's; the paper's tasks have sets of their own, of a size of their own.

        Raises:
            ValueError: the data holds fewer different candidates than a set needs; otherwise as `examples`.
        """
        checked_count(size, "eval_set_size")
        if self.name == "chitchat":
            return chitchat_ranking_sets(self.split, size, self.seed, limit)
        draw = random.Random(self.seed)
        if self.name in TASK_FILES:
            own = load_task_sets(self.name, self.split, self.data_dir)
            return own if limit is None or limit >= len(own) else draw.sample(own, limit)
        data = self._checked(None)
        context, positive, *negatives = text_columns(data)
        pool = list(dict.fromkeys(data[positive]))
        if len(pool) < size:
            raise ValueError(
                f"{self.name} has {len(pool)} different candidates for sets of {size}. Lower eval_set_size."
            )
        sets = []
        for row in _sample(data, limit, self.seed):
            candidates = [row[name] for name in (positive, *negatives)][:size]
            if len(candidates) < size:
                others = draw.sample(pool, min(len(pool), size + len(candidates)))
                candidates += [text for text in others if text not in candidates][: size - len(candidates)]
            sets.append({"context": row[context], "candidates": candidates, "label": 0})
        return sets

    @cached_property
    def _examples(self) -> Dataset:
        return _sample(self._checked(self.max_negatives), self.max_examples, self.seed)

    @cached_property
    def _loaded(self) -> Dataset:
        if self.name == "chitchat":
            data = load_chitchat(self.split)
        elif self.name in TASK_FILES:
            data = load_task_examples(self.name, self.split, self.data_dir, self.max_negatives)
        elif Path(self.name).suffix.lower() in _LOADERS:
            data = self._load_file(Path(self.name))
        elif any(Path(self.name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            data = self._load_saved(Path(self.name))
        else:
            data = load_dataset(self.name, self.config_name, split=self.split)
        if not data:
            raise ValueError(
                f"{self.name} has no rows in split {self.split!r}. Name another split or file; to train without "
                "evaluation, give --eval_split null."
            )
        return data

    def _checked(self, max_negatives: int | None) -> Dataset:
        """All rows, with the columns asked for and the first so many negatives, after a look at every cell."""
        data = self._loaded
        if missing := [name for name in self.columns or () if name not in data.column_names]:
            raise ValueError(f"{self.name} has no column {missing}; it has {data.column_names}.")
        names, before = self.columns or data.column_names, text_columns(data)[1:]
        texts = [name for name in names if name not in NO_TEXTS][: None if max_negatives is None else 2 + max_negatives]
        scores = [SCORES] if SCORES in names else []
        chosen = data.select_columns([*texts, *scores, *(name for name in data.column_names if name in LABELS)])
        if scores and texts[1:] != before:
            check_scores(data, self.name)
            if missing := [name for name in texts[1:] if name not in before]:
                raise ValueError(f"{self.name} has no teacher's scores of the columns {missing}. Score them first.")
            places = [before.index(name) for name in texts[1:]]
            chosen = chosen.map(lambda row: {SCORES: [row[place] for place in places]}, input_columns=SCORES)
        unread = [name for name in LABELS if self.columns and name not in self.columns]
        return chosen if self.name in ("chitchat", *TASK_FILES) else checked_examples(chosen, self.name, unread=unread)

    def _load_file(self, path: Path) -> Dataset | None:
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {path}. Give a path to a file, 'chitchat', one of {', '.join(TASK_FILES)}, a folder "
                "of save_to_disk, or a Hub data set id."
            )
        kind, options = _LOADERS[path.suffix.lower()]
        try:
            return load_dataset(kind, data_files=self.name, split="train", **options) if path.stat().st_size else None
        except (DatasetGenerationError, ValueError, TypeError) as error:
            if "corresponds to no data" in str(error):  # there is nothing but a header, or blank lines
                return None
            for _ in json_objects(path) if path.suffix.lower() == ".jsonl" else ():
                pass  # a line that is no object is named
            raise ValueError(f"{path} cannot be read: {error.__cause__ or error}. Check the file.") from error

    def _load_saved(self, folder: Path) -> Dataset | None:
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            if self.split not in splits:
                raise ValueError(
                    f"{folder} has the splits {', '.join(splits)}, but not {self.split!r}. Name one of them."
                )
            folder /= self.split
        try:
            return load_from_disk(str(folder))
        except IndexError:  # upstream's for a data set without rows, which has no file
            return None


def _sample(data: Dataset, limit: int | None, seed: int) -> Dataset:
    return data if limit is None or limit >= len(data) else data.shuffle(seed=seed).select(range(limit))
