"""The paper's four ranking tasks, read from the files that their authors publish (Humeau et al., section 5).

| task | candidates | files |
| --- | --- | --- |
| ConvAI2 (Dinan et al., 2019) | 20 | valid_self_original.txt |
| DSTC7 track 1, Ubuntu (Yoshino et al., 2019) | 100 | ubuntu_test_subtask_1.json, ubuntu_responses_subtask_1.tsv |
| Ubuntu V2 (Lowe et al., 2015) | 10 | test.csv |
| Wikipedia article search (Wu et al., 2018) | 10,001 | wikipedia_test10k.txt, wikipedia_test_basedocs.txt |

Texts are put together as the original implementation does, so that a model it trained reads what it was trained on.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from poly_encoders.conversations import candidate_texts, checked_text, context_text

Sample = dict[str, Any]  # {"context": ..., "candidates": [...], "label": index}


@dataclass
class RankingSets:
    """The ranking sets of a task."""

    samples: list[Sample]
    shared_candidates: list[str] = field(default_factory=list)  # further candidates of every set


@dataclass(frozen=True)
class RankingTask:
    """One of the tasks: what to give it, and what the paper reports."""

    title: str
    num_candidates: int | None  # C of R@k/C
    at_k: tuple[int, ...]
    files: tuple[str, ...]  # names as published, in the order of `read`'s arguments
    read: Callable[..., RankingSets]
    num_optional: int = 0  # how many of the files, the last ones, may be left out


def read_task(name: str, files: Sequence[Path], max_examples: int | None = None) -> RankingSets:
    """Read a task's files.

    Args:
        name: A key of `TASKS`.
        files: Paths in the order of the task's `files`.
        max_examples: How many examples to keep, the first ones; all when left out.

    Raises:
        ValueError: an unknown task, another number of files, or files of another format.
        OSError: a file cannot be read.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    task = TASKS[name]
    if not len(task.files) - task.num_optional <= len(files) <= len(task.files):
        raise ValueError(f"Expected the files of {task.title}, {' '.join(task.files)}, but got {len(files)}.")
    sets = task.read(*files)
    if not sets.samples:
        raise ValueError(f"{files[0]} holds no example of {task.title}. Check that it is {task.files[0]}.")
    return RankingSets(sets.samples[:max_examples], sets.shared_candidates)


def read_convai2(path: Path) -> RankingSets:
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
        reply = fields[1].split("|")[0]
        samples.append(_sample(turns, fields[3].split("|"), reply, path, position))
        turns, pending = [*turns, reply], []
    return RankingSets(samples)


def read_dstc7(path: Path, answers: Path | None = None) -> RankingSets:
    """Track 1, subtask 1: JSON with `messages-so-far` and `options-for-next`.

    The test set's right answers are a file of their own; the development set's are in the JSON.
    """
    replies: dict[str, str] = {}
    if answers is not None:
        for position, line in _lines(answers):
            fields = line.split("\t")
            if len(fields) < 3:
                raise _wrong(answers, position, "example id, candidate id and reply between tabs", line)
            replies[fields[0]] = fields[2]
    samples = []
    for position, example in enumerate(_json(path)):
        try:
            context = "".join(
                f"{checked_text(message['speaker']).replace('_', ' ')}: {checked_text(message['utterance'])}\n"
                for message in example["messages-so-far"]
            )
            options = candidate_texts([option["utterance"] for option in example["options-for-next"]])
            own = [option["utterance"] for option in example.get("options-for-correct-answers", [])]
            right = checked_text(own[0] if own else replies[str(example["example-id"])])
        except KeyError as error:
            raise ValueError(
                f"Example {position} of {path} lacks {error}. Expected DSTC7's subtask 1; its test set needs the "
                "answers as a second file, ubuntu_responses_subtask_1.tsv."
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"Example {position} of {path}: {error}") from error
        if right not in options:
            options = [right, *options]
        samples.append({"context": context, "candidates": options, "label": options.index(right)})
    return RankingSets(samples)


def read_ubuntu_v2(path: Path) -> RankingSets:
    """CSV with a context, the reply to it and nine distractors; `__eou__` ends an utterance, `__eot__` a turn."""
    samples = []
    with _opened(path, newline="") as stream:
        for position, row in _rows(path, csv.reader(stream)):
            fields = [_ubuntu_text(text) for text in row]
            if len(fields) < 4:
                raise _wrong(path, position, "a context, a reply and distractors (valid.csv or test.csv)", str(row))
            samples.append({"context": fields[0], "candidates": fields[1:], "label": 0})
    return RankingSets(samples)


def ubuntu_v2_pairs(path: Path) -> Iterator[Sample]:
    """The right pairs of Ubuntu V2's `train.csv`, one at a time: `Context,Utterance,Label`, label 1 (1.0) for right."""
    with _opened(path, newline="") as stream:
        for position, row in _rows(path, csv.reader(stream)):
            if len(row) != 3 or row[2].strip() not in ("0", "0.0", "1", "1.0"):
                raise _wrong(path, position, "a context, an utterance and the label 0 or 1 (train.csv)", str(row))
            if row[2].strip().startswith("1"):
                context, reply = (_ubuntu_text(text) for text in row[:2])
                yield {"context": context, "candidates": [reply], "label": 0}


def read_wikipedia(path: Path, documents: Path) -> RankingSets:
    """Articles as `wikipedia_pairs` reads them, and the documents that every set shares."""
    shared = [" ".join(line.split("\t")).strip() for _, line in _lines(documents)]
    return RankingSets(list(wikipedia_pairs(path)), shared)


def wikipedia_pairs(path: Path, skip_short: bool = False) -> Iterator[Sample]:
    """Articles, a line each, with tabs between their sentences: one sentence is the query, the rest its article.

    Which sentence is drawn by a generator seeded with the line's number, where StarSpace draws anew in every run.

    Args:
        path: The file.
        skip_short: Pass over articles of one sentence, as StarSpace does, where otherwise they are an error.
    """
    for position, line in _lines(path):
        sentences = [text.strip() for text in line.split("\t") if text.strip()]
        if len(sentences) < 2:
            if skip_short:
                continue
            raise _wrong(path, position, "an article of two sentences or more, with tabs between them", line)
        query = random.Random(position).randrange(len(sentences))
        article = " ".join(sentences[:query] + sentences[query + 1 :])
        yield {"context": sentences[query], "candidates": [article], "label": 0}


def read_json_lines(path: Path) -> RankingSets:
    """Ranking sets of one's own, a JSON object a line: `{"context": ..., "candidates": [...], "label": index}`."""
    samples = []
    for position, line in _lines(path):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise _wrong(path, position, "a JSON object", line) from error
        if not isinstance(sample, dict):
            raise _wrong(path, position, "a JSON object", line)
        try:
            context_text(sample["context"])
            candidate_texts(sample["candidates"])
        except KeyError as error:
            raise ValueError(f"Line {position} of {path} lacks {error}, it has only {sorted(sample)}.") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"Line {position} of {path}: {error}") from error
        if isinstance(label := sample.get("label", 0), bool) or not isinstance(label, int):
            raise ValueError(f"Line {position} of {path}: label is {label!r}, expected the right candidate's position.")
        if not 0 <= label < (number := len(sample["candidates"])):
            raise ValueError(f"Line {position} of {path} has {number} candidates, but its label is {label}.")
        samples.append(sample)
    return RankingSets(samples)


TASKS = {
    "convai2": RankingTask("ConvAI2", 20, (1,), ("valid_self_original.txt",), read_convai2),
    "dstc7": RankingTask(
        "DSTC7 track 1",
        100,
        (1,),
        ("ubuntu_test_subtask_1.json", "ubuntu_responses_subtask_1.tsv"),
        read_dstc7,
        num_optional=1,
    ),
    "ubuntu-v2": RankingTask("Ubuntu V2", 10, (1, 2, 5), ("test.csv",), read_ubuntu_v2),
    "wikipedia": RankingTask(
        "Wikipedia article search",
        10_001,
        (1,),
        ("wikipedia_test10k.txt", "wikipedia_test_basedocs.txt"),
        read_wikipedia,
    ),
    "jsonl": RankingTask("ranking sets of one's own", None, (1, 2, 5, 10), ("sets.jsonl",), read_json_lines),
}


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    with path.open(encoding="utf-8", newline=newline) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}). Unpack it first if it is an archive.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, without their ends, and their numbers from 1."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file after its header, and their lines' numbers."""
    try:
        next(reader, None)
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {path} is no CSV ({error}).") from error


def _json(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of examples, but holds a {type(content).__name__}.")
    return content


def _ubuntu_text(text: str) -> str:
    return text.replace("__eou__", ".").replace("__eot__", "\n").strip()


def _sample(turns: list[str], candidates: list[str], reply: str, path: Path, position: int) -> Sample:
    if reply not in candidates:
        raise ValueError(f"Line {position} of {path} does not have its reply among its candidates: {reply[:80]!r}.")
    return {"context": list(turns), "candidates": candidates, "label": candidates.index(reply)}


def _wrong(path: Path, position: int, expected: str, line: str) -> ValueError:
    return ValueError(f"Line {position} of {path} should be {expected}, but is {line[:80]!r}.")
