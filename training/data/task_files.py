"""Training data of the paper's tasks, from the files that their authors publish (Humeau et al., section 5).

The readers are those of the evaluation, `poly_encoders.tasks`, so texts are put together in the same way on both sides.
An example of ConvAI2 or DSTC7 brings its own negatives, one of Ubuntu V2 brings none.
"""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from poly_encoders.tasks import Sample, read_convai2, read_dstc7, read_task, ubuntu_v2_pairs

logger = logging.getLogger(__name__)

READER = 1  # raise it where a reader gives other rows, or old ones would come from the cache
# Names as published: the first of the training files that is there, all of the others; none where there never were any.
TASK_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "convai2": {"train": ("train_self_original.txt",), "validation": ("valid_self_original.txt",), "test": ()},
    "dstc7": {
        # ParlAI's archive carries the augmented training set, which the authors train on, beside the original one.
        "train": ("ubuntu_train_subtask_1_sampled.json", "ubuntu_train_subtask_1.json"),
        "validation": ("ubuntu_dev_subtask_1.json",),
        "test": ("ubuntu_test_subtask_1.json", "ubuntu_responses_subtask_1.tsv"),
    },
    "ubuntu-v2": {"train": ("train.csv",), "validation": ("valid.csv",), "test": ("test.csv",)},
}
_TRAINING_READERS: dict[str, Any] = {"convai2": read_convai2, "dstc7": read_dstc7, "ubuntu-v2": ubuntu_v2_pairs}


def load_task_examples(task: str, split: str, data_dir: str | None, max_negatives: int | None = None) -> Dataset:
    """A task's examples: columns `context`, `response` and, where the task brings candidates, `negative_1` and so on.

    They are written to the cache of `datasets` and read from there, so a million of them take little memory. A row with
    fewer negatives than others is filled up with positives of other rows, the same ones in every run.

    Raises:
        ValueError: no `data_dir` (where the published files are), another split than `"train"`, `"validation"` and
            `"test"`, one that was never published, or files of another format.
        FileNotFoundError: a file is not there.
    """
    files = task_files(task, split, data_dir)
    logger.info("%s, %s: reading %s", task, split, ", ".join(file.name for file in files))
    options: dict[str, Any] = {  # the cache's key as well; tuples, because lists would be taken for shards
        "task": task,
        "split": split,
        "files": tuple(str(file.resolve()) for file in files),
        "max_negatives": max_negatives,
        "versions": (READER, *((file.stat().st_size, file.stat().st_mtime_ns) for file in files)),
    }
    try:
        return Dataset.from_generator(_rows, gen_kwargs=options)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def load_task_sets(task: str, split: str, data_dir: str | None) -> list[Sample]:
    """A task's own ranking sets, of `"validation"` or `"test"`; arguments and errors as for `load_task_examples`."""
    if split == "train":
        raise ValueError(f"The training files of {task} are no ranking sets. Evaluate on validation or test.")
    return read_task(task, task_files(task, split, data_dir))


def task_files(task: str, split: str, data_dir: str | None) -> list[Path]:
    """The paths of a split's files, if they are there."""
    known = TASK_FILES[task]
    if split not in known:
        raise ValueError(f"{task} has the splits {', '.join(known)}, but not {split!r}.")
    if not known[split]:
        raise ValueError(f"The {split} set of {task} was never published. Use validation.")
    wanted = (" or " if split == "train" else " and ").join(known[split])
    if data_dir is None:
        raise ValueError(f"{task} is read from its files as published: give --data_dir, the folder with {wanted}.")
    found = [path for name in known[split] if (path := Path(data_dir, name)).is_file()]
    if len(found) < (1 if split == "train" else len(known[split])):
        raise FileNotFoundError(
            f"{data_dir} must hold {wanted} for the {split} split of {task}. Unpack its archive there."
        )
    return found[:1] if split == "train" else found


def _rows(task: str, split: str, files: tuple[str, ...], max_negatives: int | None, versions: Any) -> Iterator[Any]:
    """The rows of the data set, all with the same columns."""
    paths = [Path(file) for file in files]
    samples = _TRAINING_READERS[task](paths[0]) if split == "train" else read_task(task, paths)
    rows = _filled_up(samples, max_negatives) if isinstance(samples, list) else map(_pair, samples)
    if (first := next(rows, None)) is None:
        raise ValueError(f"{files[0]} holds no example of {task}. Check that the file is whole.")
    yield first
    yield from rows


def _pair(sample: Sample) -> dict[str, Any]:
    return {"context": sample["context"], "response": sample["candidates"][sample["label"]]}


def _filled_up(samples: list[Sample], limit: int | None) -> Iterator[dict[str, Any]]:
    """Rows with equally many negatives."""
    rows = [_pair(sample) for sample in samples]
    negatives = [
        [text for text in sample["candidates"] if text != row["response"]][:limit]
        for sample, row in zip(samples, rows, strict=True)
    ]
    number = max(map(len, negatives), default=0)
    responses = list(dict.fromkeys(row["response"] for row in rows))
    for place, (row, texts) in enumerate(zip(rows, negatives, strict=True)):
        if len(texts) < number:
            drawn = random.Random(place).sample(responses, min(len(responses), number + len(texts) + 1))
            texts += [text for text in drawn if text != row["response"] and text not in texts][: number - len(texts)]
        if len(texts) < number:
            raise ValueError(
                f"Example {place + 1} has {len(texts)} negatives where another has {number}, and there are too few "
                "responses to fill it up. Lower max_negatives."
            )
        yield row | {f"negative_{index}": text for index, text in enumerate(texts, start=1)}
