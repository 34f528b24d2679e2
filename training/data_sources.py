"""Training data from anywhere: ChitChat, the paper's tasks, the Hub, saved data sets, JSONL, CSV and Parquet files.

In every data set the first column is the context and the rest are candidates, the right one first.
"""

import random
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from poly_encoders.training.chitchat import chitchat_ranking_sets, load_chitchat
from poly_encoders.training.data_checks import check_cells, check_json_lines, check_scores, is_json_lines
from poly_encoders.training.task_data import TASK_FILES, load_task_examples, load_task_sets

SCORES = "scores"
LABEL_COLUMNS = ("label", "labels", "score", "scores")  # sentence-transformers' trainers take them for labels
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_examples(
    source: str,
    split: str = "train",
    columns: list[str] | None = None,
    config_name: str | None = None,
    data_dir: str | None = None,
    max_negatives: int | None = None,
) -> Dataset:
    """A data set of contexts and candidates.

    Args:
        source: `"chitchat"`; one of the paper's tasks, `"convai2"`, `"dstc7"`, `"ubuntu-v2"` or `"wikipedia"`; a local
            .jsonl, .json, .csv, .tsv or .parquet file; a folder that `save_to_disk` wrote; or a Hub data set id.
        split: Which one; a file or a folder with a single data set is one split, whatever this says.
        columns: Context, right candidate, further (wrong) candidates; all columns in their order when left out.
        config_name: The Hub data set's configuration.
        data_dir: The folder with a task's files as published.
        max_negatives: Columns of wrong candidates to keep, the first ones; all when left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or there are fewer than two, or no rows; a line or a row that cannot be read.
    """
    if source == "chitchat":
        data = load_chitchat(split)  # type: ignore[arg-type]
    elif source in TASK_FILES:
        data = load_task_examples(source, split, data_dir, max_negatives)
    elif Path(source).suffix.lower() in _LOADERS:
        data = _load_file(source, columns)
    elif _is_saved(source):
        data = _load_saved(source, split)
    else:
        data = load_dataset(source, config_name, split=split)
    before = text_columns(data)[1:]
    if columns:
        if missing := [name for name in columns if name not in data.column_names]:
            raise ValueError(f"{source} has no column {missing}; it has {data.column_names}.")
        data = data.select_columns(columns)
    if len(text_columns(data)) < 2:
        raise ValueError(f"{source} has the columns {data.column_names}; training needs a context and a candidate.")
    if len(data) == 0:
        raise _no_rows(f"{source} has no rows in split {split!r}")
    if max_negatives is not None:
        labels = [name for name in data.column_names if name in LABEL_COLUMNS]
        data = data.select_columns([*text_columns(data)[: 2 + max_negatives], *labels])
    if source != "chitchat" and source not in TASK_FILES:
        check_cells(data.select_columns(text_columns(data)), source)
    return _with_scores_of(data, before, source) if SCORES in data.column_names else data


def _with_scores_of(data: Dataset, before: list[str], source: str) -> Dataset:
    """The data whose teacher's scores, of the candidate columns `before`, are those of the columns that are left."""
    check_scores(data.data.column(SCORES), len(before), source)
    kept = text_columns(data)[1:]
    if missing := [name for name in kept if name not in before]:
        raise ValueError(f"{source} has no teacher's scores of the columns {missing}. Score them with a teacher first.")
    if kept == before:
        return data
    places = [before.index(name) for name in kept]
    return data.map(lambda scores: {SCORES: [scores[place] for place in places]}, input_columns=SCORES)


def text_columns(data: Dataset) -> list[str]:
    """The columns that hold texts: all but those in which a teacher's scores or labels are."""
    return [name for name in data.column_names if name not in LABEL_COLUMNS]


def _load_file(source: str, columns: list[str] | None) -> Dataset:
    path, suffix = Path(source), Path(source).suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {source}. Give a path to a file, 'chitchat', one of {', '.join(TASK_FILES)}, a folder "
            "of save_to_disk, or a Hub data set id."
        )
    if _has_no_rows(path):
        raise _no_rows(f"{source} has no rows")
    options: dict[str, Any] = {"delimiter": "\t"} if suffix == ".tsv" else {}
    if _LOADERS[suffix] == "csv":
        options["keep_default_na"] = False  # or replies such as "None", "null" and "NA" would count as missing
    try:
        return load_dataset(_LOADERS[suffix], data_files=source, split="train", **options)
    except (DatasetGenerationError, ValueError, TypeError) as error:
        if is_json_lines(source):
            check_json_lines(path, columns)
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}. Check the file.") from error


def _has_no_rows(path: Path) -> bool:
    """Whether a file is empty or has nothing but a header, of which upstream's errors tell little."""
    if path.stat().st_size == 0:
        return True
    if path.suffix.lower() == ".parquet":
        return pq.read_metadata(path).num_rows == 0
    header = 0 if _LOADERS[path.suffix.lower()] == "json" else 1
    with path.open("rb") as stream:
        return sum(1 for _ in islice((line for line in stream if line.strip()), header + 1)) <= header


def _is_saved(source: str) -> bool:
    return any(Path(source, name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(source: str, split: str) -> Dataset:
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise _no_rows(f"{source} has the splits {', '.join(splits)}, but not {split!r}")
        folder /= split
    try:
        return load_from_disk(str(folder))
    except IndexError as error:  # upstream's for a data set without rows, which has no file
        raise _no_rows(f"{source} has no rows in split {split!r}") from error


def _no_rows(problem: str) -> ValueError:
    return ValueError(f"{problem}. Name another split or file; to train without evaluation, give --eval_split null.")


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
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Ranking sets for `CandidateRankingEvaluator`: the right candidate first, wrong ones filled up to `size`.

    Wrong candidates of the row's own columns come first; the rest are the right ones of other rows, seeded. The paper's
    tasks have sets of their own, of a size of their own; Wikipedia's go with `load_shared_candidates`.

    Raises:
        ValueError: the data holds fewer different candidates than a set needs; otherwise as `load_examples`.
    """
    if source == "chitchat":
        return chitchat_ranking_sets(split, size, seed, limit)  # type: ignore[arg-type]
    if source in TASK_FILES:
        own = load_task_sets(source, split, data_dir).samples
        return own if limit is None or limit >= len(own) else random.Random(seed).sample(own, limit)
    data = load_examples(source, split, columns, config_name)
    context_column, right_column, *wrong_columns = text_columns(data)
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


def load_shared_candidates(source: str, split: str, data_dir: str | None = None) -> list[str]:
    """Candidates that every ranking set has beside its own: `CandidateRankingEvaluator`'s `shared_candidates`.

    Only Wikipedia's sets have any; elsewhere the list is empty.
    """
    return load_task_sets(source, split, data_dir).shared_candidates if source == "wikipedia" else []
