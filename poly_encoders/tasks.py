"""Ranking tasks of the paper, ConvAI2 (Dinan et al., 2019), DSTC7's track 1 (Yoshino et al., 2019) and Ubuntu V2 (Lowe
et al., 2015), read from the files that their authors publish (Humeau et al., section 5); and ranking sets of one's own.

Texts are put together as the original implementation does, so that a model it trained reads what it was trained on.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poly_encoders.modeling.text_poly_encoder import CheckedText, candidate_texts, checked_text, context_text

Sample = dict[str, Any]  # {"context": ..., "candidates": [...], "label": position of the positive}


@dataclass(frozen=True)
class RankingTask:
    """One of the tasks: what to give it, and what the paper reports."""

    title: str
    num_candidates: int | None  # C of R@k/C
    at_k: tuple[int, ...]
    files: tuple[str, ...]  # names as published, in the order of `read`'s arguments
    read: Callable[..., list[Sample]]
    num_optional: int = 0  # how many of the files, the last ones, may be left out


def read_task(name: str, files: Sequence[Path], max_examples: int | None = None) -> list[Sample]:
    """The first `max_examples` ranking sets of a task of `TASKS`, or all, from its files in their order.

    Raises:
        ValueError: an unknown task, another number of files, or files of another format.
        OSError: a file cannot be read.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    task = TASKS[name]
    if not len(task.files) - task.num_optional <= len(files) <= len(task.files):
        raise ValueError(f"Expected the files of {task.title}, {' '.join(task.files)}, but got {len(files)}.")
    samples = task.read(*files)
    if not samples:
        raise ValueError(f"{files[0]} holds no example of {task.title}. Check that it is {task.files[0]}.")
    return samples[:max_examples]


def read_convai2(path: Path) -> list[Sample]:
    """Conversations in ParlAI's older text format, each line `number text<TAB>reply<TAB><TAB>candidate|candidate|...`.

    Lines without a reply (the persona) belong to the turn that follows. Number 1 begins a conversation.
    """
    samples: list[Sample] = []
    turns: list[str] = []
    pending: list[str] = []
    last_number = 0
    for position, line in _lines(path):
        number, _, rest = line.strip().replace("\\n", "\n").partition(" ")
        if not number.isdecimal():
            raise _wrong(path, position, "a line that begins with its number", line)
        if int(number) <= last_number:
            turns, pending = [], []
        last_number = int(number)
        fields = [part.strip() for part in rest.split("\t")]
        pending.append(fields[0])
        if len(fields) < 2 or not fields[1]:
            continue
        if len(fields) < 4:
            raise _wrong(path, position, "candidates in the fourth column (the file without 'no_cands')", line)
        turns = [*turns, "\n".join(text for text in pending if text)]
        reply, candidates = fields[1].split("|")[0], fields[3].split("|")
        if reply not in candidates:
            raise ValueError(f"Line {position} of {path} does not have its reply among its candidates: {reply[:80]!r}.")
        samples.append({"context": turns, "candidates": candidates, "label": candidates.index(reply)})
        turns, pending = [*turns, reply], []
    return samples


def read_dstc7(path: Path, answers: Path | None = None) -> list[Sample]:
    """Track 1, subtask 1: JSON with `messages-so-far` and `options-for-next`.

    The positives of the test set are a file of their own; those of the development set are in the JSON.
    """
    replies: dict[str, str] = {}
    for position, line in [] if answers is None else _lines(answers):
        fields = line.split("\t")
        if len(fields) < 3:
            raise _wrong(answers, position, "example id, candidate id and reply between tabs", line)
        replies[fields[0]] = fields[2]
    try:
        examples = json.loads("".join(_raw_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(examples, list):
        raise ValueError(f"{path} must hold a list of examples, but holds a {type(examples).__name__}.")
    samples = []
    for place, example in enumerate(examples):
        with _named(f"Example {place} of {path}", "The test set needs its answers as a second file"):
            context = "".join(
                f"{checked_text(message['speaker']).replace('_', ' ')}: {checked_text(message['utterance'])}\n"
                for message in example["messages-so-far"]
            )
            candidates = candidate_texts([option["utterance"] for option in example["options-for-next"]])
            own = [option["utterance"] for option in example.get("options-for-correct-answers", [])]
            positive = checked_text(own[0] if own else replies[str(example["example-id"])])
            candidates = candidates if positive in candidates else [positive, *candidates]
            samples.append({"context": context, "candidates": candidates, "label": candidates.index(positive)})
    return samples


def read_ubuntu_v2(path: Path) -> list[Sample]:
    """CSV with a context, the reply to it and nine distractors; `__eou__` ends an utterance, `__eot__` a turn."""
    samples = []
    for position, row in _csv_rows(path):
        if len(row) < 4:
            raise _wrong(path, position, "a context, a reply and distractors (valid.csv or test.csv)", str(row))
        context, *candidates = map(_ubuntu_text, row)
        samples.append({"context": context, "candidates": candidates, "label": 0})
    return samples


def ubuntu_v2_pairs(path: Path) -> Iterator[Sample]:
    """The positives of Ubuntu V2's `train.csv`, one at a time: `Context,Utterance,Label`, label 1 (1.0) for them."""
    for position, row in _csv_rows(path):
        if len(row) != 3 or row[2].strip() not in ("0", "0.0", "1", "1.0"):
            raise _wrong(path, position, "a context, an utterance and the label 0 or 1 (train.csv)", str(row))
        if row[2].strip().startswith("1"):
            yield {"context": _ubuntu_text(row[0]), "candidates": [_ubuntu_text(row[1])], "label": 0}


def read_json_lines(path: Path) -> list[Sample]:
    """Ranking sets of one's own, a JSON object a line: `{"context": ..., "candidates": [...], "label": index}`."""
    samples = []
    for position, sample in json_objects(path):
        with _named(f"Line {position} of {path}", f"It has only {sorted(sample)}"):
            context, label = sample["context"], sample.get("label", 0)
            text, candidates = context_text(context), candidate_texts(sample["candidates"])
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(candidates):
                raise ValueError(f"there are {len(candidates)} candidates, but its label is {label!r}.")
            if isinstance(context, list):  # joined later, by the model's separator, and not checked again
                context = [CheckedText(turn) if isinstance(turn, str) else turn for turn in context]
            context = text if isinstance(context, str) else context
            samples.append({"context": context, "candidates": candidates, "label": label})
    return samples


TASKS = {
    "convai2": RankingTask("ConvAI2", 20, (1,), ("valid_self_original.txt",), read_convai2),
    "dstc7": RankingTask(
        "DSTC7 track 1", 100, (1,), ("ubuntu_test_subtask_1.json", "ubuntu_responses_subtask_1.tsv"), read_dstc7, 1
    ),
    "ubuntu-v2": RankingTask("Ubuntu V2", 10, (1, 2, 5), ("test.csv",), read_ubuntu_v2),
    "jsonl": RankingTask("ranking sets of one's own", None, (1, 2, 5, 10), ("sets.jsonl",), read_json_lines),
}


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, and their lines' numbers from 1; a ValueError names a line that is none."""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _wrong(path, number, f"a JSON object ({error})", line) from error
        if not isinstance(row, dict):
            raise _wrong(path, number, 'a JSON object such as {"context": ..., ...}', line)
        yield number, row


@contextmanager
def _named(where: str, hint: str) -> Iterator[None]:
    """Say of an error where it is, and of one about a missing key what may help."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}. {hint}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, without their ends, and their numbers from 1."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(_raw_lines(path), start=1) if line.strip())


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file after its header, and their lines' numbers."""
    reader = csv.reader(_raw_lines(path, newline=""))
    try:
        next(reader, None)
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {path} is no CSV ({error}).") from error


def _raw_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Unpack it first if it is an archive.") from error


def _ubuntu_text(text: str) -> str:
    return text.replace("__eou__", ".").replace("__eot__", "\n").strip()


def _wrong(path: Path | None, position: int, expected: str, line: str) -> ValueError:
    return ValueError(f"Line {position} of {path} should be {expected}, but is {line[:80]!r}.")
