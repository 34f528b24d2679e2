"""Training data from anywhere: ChitChat, a Hub data set, or local JSONL, CSV and Parquet files.

In every data set the first column is the context and the rest are candidates, the right one first.
"""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from poly_encoders.training.chitchat import chitchat_ranking_sets, load_chitchat

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_examples(
    source: str, split: str = "train", columns: list[str] | None = None, config_name: str | None = None
) -> Dataset:
    """A data set of contexts and candidates.

    Args:
        source: `"chitchat"`, a local .jsonl, .json, .csv, .tsv or .parquet file, or a Hub data set id.
        split: Of ChitChat or the Hub data set; a file is one split.
        columns: Context, right candidate, further (wrong) candidates; all columns in their order when left out.
        config_name: The Hub data set's configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or there are fewer than two, or no rows.
    """
    if source == "chitchat":
        data = load_chitchat(split)  # type: ignore[arg-type]
    elif (suffix := Path(source).suffix.lower()) in _LOADERS:
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"There is no file {source}. Give a path to a file, 'chitchat' or a Hub data set id."
            )
        options: dict[str, Any] = {"delimiter": "\t"} if suffix == ".tsv" else {}
        data = load_dataset(_LOADERS[suffix], data_files=source, split="train", **options)
    else:
        data = load_dataset(source, config_name, split=split)
    if columns:
        if missing := [name for name in columns if name not in data.column_names]:
            raise ValueError(f"{source} has no column {missing}; it has {data.column_names}.")
        data = data.select_columns(columns)
    if len(data.column_names) < 2:
        raise ValueError(f"{source} has the columns {data.column_names}; training needs a context and a candidate.")
    if len(data) == 0:
        raise ValueError(f"{source} has no rows in split {split!r}.")
    return data


def sample_examples(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """A seeded sample of at most `limit` rows."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=seed).select(range(limit))


def load_ranking_sets(
    source: str,
    split: str,
    size: int,
    seed: int,
    limit: int | None = None,
    columns: list[str] | None = None,
    config_name: str | None = None,
) -> list[dict[str, Any]]:
    """Ranking sets for `CandidateRankingEvaluator`: the right candidate first, wrong ones filled up to `size`.

    Wrong candidates of the row's own columns come first; the rest are the right ones of other rows, seeded.

    Raises:
        ValueError: the data holds fewer different candidates than a set needs.
    """
    if source == "chitchat":
        return chitchat_ranking_sets(split, size, seed, limit)  # type: ignore[arg-type]
    data = load_examples(source, split, columns, config_name)
    context_column, right_column, *wrong_columns = data.column_names
    pool = list(dict.fromkeys(data[right_column]))
    if len(pool) < size:
        raise ValueError(
            f"{source} has {len(pool)} different candidates, but a set of {size} was asked for. Lower eval_set_size."
        )
    draw = random.Random(seed)
    sets = []
    for row in sample_examples(data, limit, seed):
        candidates = [row[right_column], *(row[name] for name in wrong_columns)][:size]
        others = (
            (text for text in draw.sample(pool, min(len(pool), size + len(candidates))) if text not in candidates)
            if len(candidates) < size
            else ()
        )
        for text in others:
            candidates.append(text)
            if len(candidates) == size:
                break
        sets.append({"context": row[context_column], "candidates": candidates, "label": 0})
    return sets
