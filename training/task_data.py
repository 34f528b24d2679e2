"""Training data of the paper's tasks, from the files that their authors publish (Humeau et al., section 5).

The readers are those of the evaluation, `poly_encoders.tasks`, so texts are put together in the same way on both sides.
An example of ConvAI2 or DSTC7 brings its own wrong candidates, one of Ubuntu V2 or Wikipedia brings none.

StarSpace's Wikipedia files hold an article a line, tabs between its sentences. As in its `trainMode 2`, one sentence is
the context and the rest of the article the response. StarSpace draws the sentence anew in every epoch; here an article
keeps it, so more epochs show the same pairs. The names of the validation files are not confirmed: they are taken to be
those of the test files with `dev` for `test`.
"""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from poly_encoders.tasks import (
    RankingSets,
    Sample,
    read_convai2,
    read_dstc7,
    read_task,
    ubuntu_v2_pairs,
    wikipedia_pairs,
)

logger = logging.getLogger(__name__)


class TaskFiles(NamedTuple):
    """File names as published."""

    train: tuple[str, ...]  # the first of these that is there
    validation: tuple[str, ...]  # all of these
    test: tuple[str, ...]  # all of these; none where it was never published


READER = 1  # raise it where a reader gives other rows, or old ones would come from the cache

TASK_FILES: dict[str, TaskFiles] = {
    "convai2": TaskFiles(("train_self_original.txt",), ("valid_self_original.txt",), ()),
    "dstc7": TaskFiles(
        # ParlAI's archive carries the augmented training set, which the authors train on, beside the original one.
        ("ubuntu_train_subtask_1_sampled.json", "ubuntu_train_subtask_1.json"),
        ("ubuntu_dev_subtask_1.json",),
        ("ubuntu_test_subtask_1.json", "ubuntu_responses_subtask_1.tsv"),
    ),
    "ubuntu-v2": TaskFiles(("train.csv",), ("valid.csv",), ("test.csv",)),
    "wikipedia": TaskFiles(
        ("wikipedia_shuf_train5M.txt", "wikipedia_train250k.txt"),
        ("wikipedia_dev10k.txt", "wikipedia_dev_basedocs.txt"),
        ("wikipedia_test10k.txt", "wikipedia_test_basedocs.txt"),
    ),
}


def load_task_examples(task: str, split: str, data_dir: str | None, max_negatives: int | None = None) -> Dataset:
    """A task's examples: columns `context`, `response` and, where the task brings candidates, `negative_1` and so on.

    They are written to the cache of `datasets` and read from there, so a million of them take little memory. A row with
    fewer wrong candidates than others is filled up with right ones of other rows, the same ones in every run.

    Args:
        task: A key of `TASK_FILES`.
        split: `"train"`, `"validation"` or `"test"`.
        data_dir: The folder with the files as published.
        max_negatives: Wrong candidates kept of each row, the first ones; all when left out.

    Raises:
        ValueError: no `data_dir`, another split, a split that was never published, or files of another format.
        FileNotFoundError: a file is not there.
    """
    if max_negatives is not None and max_negatives < 0:
        raise ValueError(f"max_negatives must be at least 0, got {max_negatives}.")
    files = task_files(task, split, data_dir)
    logger.info("%s, %s: reading %s", task, split, ", ".join(file.name for file in files))
    options: dict[str, Any] = {  # the cache's key as well; tuples, because lists would be taken for shards
        "task": task,
        "split": split,
        "files": tuple(str(file.resolve()) for file in files),
        "max_negatives": max_negatives,
        "reader": READER,
        "versions": tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files),  # a changed file is new
    }
    try:
        return Dataset.from_generator(_rows, gen_kwargs=options)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def load_task_sets(task: str, split: str, data_dir: str | None) -> RankingSets:
    """A task's own ranking sets.

    Args:
        task: A key of `TASK_FILES`.
        split: `"validation"` or `"test"`.
        data_dir: The folder with the files as published.

    Raises:
        ValueError, FileNotFoundError: as `load_task_examples`; the training files hold no ranking sets.
    """
    if split == "train":
        raise ValueError(f"The training files of {task} are no ranking sets. Evaluate on validation or test.")
    return read_task(task, task_files(task, split, data_dir))


def task_files(task: str, split: str, data_dir: str | None) -> list[Path]:
    """The paths of a split's files.

    Raises:
        ValueError: no folder, another split, or one that was never published.
        FileNotFoundError: a file is not there.
    """
    known = TASK_FILES[task]._asdict()
    if split not in known:
        raise ValueError(f"{task} has the splits {', '.join(known)}, but not {split!r}.")
    names = known[split]
    if not names:
        raise ValueError(f"The {split} set of {task} was never published. Use validation.")
    choice = split == "train"
    wanted = (" or " if choice else " and ").join(names)
    if data_dir is None:
        raise ValueError(f"{task} is read from its files as published: give --data_dir, the folder with {wanted}.")
    paths = [Path(data_dir, name) for name in names]
    found = [path for path in paths if path.is_file()]
    if not found or (not choice and len(found) < len(paths)):
        raise FileNotFoundError(
            f"{data_dir} must hold {wanted} for the {split} split of {task}. Unpack its archive there."
        )
    return found[:1] if choice else paths


def _rows(
    task: str,
    split: str,
    files: tuple[str, ...],
    max_negatives: int | None,
    reader: int,
    versions: tuple[tuple[int, int], ...],
) -> Iterator[dict[str, Any]]:
    """The rows of the data set, all with the same columns."""
    samples = _samples(task, split, [Path(file) for file in files])
    rows = _with_negatives(samples, max_negatives) if isinstance(samples, list) else map(_pair, samples)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{files[0]} holds no example of {task}. Check that the file is whole.")


def _samples(task: str, split: str, files: list[Path]) -> list[Sample] | Iterator[Sample]:
    """All samples of a file, or, where they are pairs and there are very many, one at a time."""
    if split != "train":
        return read_task(task, files).samples
    if task == "ubuntu-v2":
        return ubuntu_v2_pairs(files[0])
    if task == "wikipedia":
        return wikipedia_pairs(files[0], skip_short=True)
    return (read_convai2 if task == "convai2" else read_dstc7)(files[0]).samples


def _pair(sample: Sample) -> dict[str, Any]:
    return {"context": sample["context"], "response": sample["candidates"][0]}


def _with_negatives(samples: list[Sample], limit: int | None) -> Iterator[dict[str, Any]]:
    wrong = [
        [text for text in sample["candidates"] if text != sample["candidates"][sample["label"]]][:limit]
        for sample in samples
    ]
    number = max(map(len, wrong), default=0)
    responses = list(dict.fromkeys(sample["candidates"][sample["label"]] for sample in samples))
    for position, (sample, texts) in enumerate(zip(samples, wrong, strict=True)):
        right = sample["candidates"][sample["label"]]
        if len(texts) < number:
            drawn = random.Random(position).sample(responses, min(len(responses), number + len(texts) + 1))
            texts = [*texts, *(text for text in drawn if text != right and text not in texts)][:number]
        if len(texts) < number:
            raise ValueError(
                f"Example {position + 1} has {len(texts)} wrong candidates where another has {number}, and there are "
                "too few responses to fill it up. Lower max_negatives."
            )
        negatives = {f"negative_{index}": text for index, text in enumerate(texts, start=1)}
        yield {"context": sample["context"], "response": right, **negatives}
