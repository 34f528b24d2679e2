"""The paper's tasks, read from tiny files in the formats that their authors publish."""

import json

import pytest

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.modeling.text_poly_encoder import CheckedText
from poly_encoders.tasks import TASKS, read_task

CONVAI2 = """1 your persona: i have two cats.
2 your persona: i like tea.
3 hello !\thi , how are you ?\t\tno|hi , how are you ?|tea
4 fine . you ?\tgreat . i have tea .\t\tgreat . i have tea .|no|cats
1 your persona: i swim.
2 good evening\\nall\tgood evening .\t\tyes|good evening .
"""

DSTC7 = [
    {
        "example-id": 7,
        "messages-so-far": [
            {"speaker": "participant_1", "utterance": "it does not boot"},
            {"speaker": "participant_2", "utterance": "which release?"},
        ],
        "options-for-next": [
            {"candidate-id": "A", "utterance": "reboot"},
            {"candidate-id": "B", "utterance": " 18.04 "},
        ],
    }
]

UBUNTU_V2 = """Context,Ground Truth Utterance,Distractor_0,Distractor_1
"hi __eou__ it fails __eou__ __eot__ what does ? __eou__ __eot__ ",apt __eou__,"no, never __eou__",yes __eou__
"""

SETS = '{"context": ["a", "b"], "candidates": ["x", "y"], "label": 1}\n\n{"context": "c", "candidates": ["z"]}\n'
CONTENTS = {
    "convai2": [CONVAI2],
    "dstc7": [json.dumps(DSTC7), "7\tB\t 18.04 \n"],
    "ubuntu-v2": [UBUNTU_V2],
    "jsonl": [SETS],
}


@pytest.fixture
def files(tmp_path):
    paths = {task: [tmp_path / f"{task}-{place}.txt" for place in range(len(CONTENTS[task]))] for task in CONTENTS}
    for task, texts in CONTENTS.items():
        for path, text in zip(paths[task], texts, strict=True):
            path.write_text(text, encoding="utf-8")
    return paths


def test_convai2(files):
    """Persona and message are one turn, as the original reads them; replies become turns of what follows."""
    persona = "your persona: i have two cats.\nyour persona: i like tea.\nhello !"
    assert read_task("convai2", files["convai2"]) == [
        {"context": [persona], "candidates": ["no", "hi , how are you ?", "tea"], "label": 1},
        {
            "context": [persona, "hi , how are you ?", "fine . you ?"],
            "candidates": ["great . i have tea .", "no", "cats"],
            "label": 0,
        },
        {
            "context": ["your persona: i swim.\ngood evening\nall"],
            "candidates": ["yes", "good evening ."],
            "label": 1,
        },
    ]
    assert len(read_task("convai2", files["convai2"], max_examples=2)) == 2


def test_dstc7_with_its_answers_apart(files):
    (sample,) = read_task("dstc7", files["dstc7"])
    assert sample["context"] == "participant 1: it does not boot\nparticipant 2: which release?\n"
    assert sample["candidates"] == ["reboot", " 18.04 "]
    assert sample["label"] == 1


def test_dstc7_with_its_answers_inside(files):
    example = DSTC7[0] | {"options-for-correct-answers": [{"candidate-id": "C", "utterance": "none of these"}]}
    files["dstc7"][0].write_text(json.dumps([example]))
    (sample,) = read_task("dstc7", files["dstc7"][:1])
    assert sample["candidates"] == ["none of these", "reboot", " 18.04 "]
    assert sample["label"] == 0


def test_ubuntu_v2(files):
    (sample,) = read_task("ubuntu-v2", files["ubuntu-v2"])
    assert sample["context"] == "hi . it fails . \n what does ? ."
    assert sample["candidates"] == ["apt .", "no, never .", "yes ."]
    assert sample["label"] == 0


def test_sets_of_ones_own_need_no_other_look(files):
    sets = read_task("jsonl", files["jsonl"])
    assert [(sample["context"], sample["candidates"], sample["label"]) for sample in sets] == [
        (["a", "b"], ["x", "y"], 1),
        ("c", ["z"], 0),
    ]
    texts = [*sets[0]["context"], sets[1]["context"], *sets[0]["candidates"], *sets[1]["candidates"]]
    assert all(isinstance(text, CheckedText) for text in texts)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_evaluated(task, files, poly_encoder):
    evaluator = CandidateRankingEvaluator(read_task(task, files[task]), at_k=TASKS[task].at_k, show_progress_bar=False)
    assert set(evaluator(poly_encoder)) == {f"recall@{k}" for k in TASKS[task].at_k} | {"mrr"}


@pytest.mark.parametrize(
    ("task", "content", "match"),
    [
        ("convai2", "hello\thi\t\thi|no\n", "Line 1.*begins with its number"),
        ("convai2", "1 hello\thi\n", "Line 1.*no_cands"),
        ("convai2", "1 hello\thi\t\tyes|no\n", "Line 1.*does not have its reply among its candidates"),
        ("convai2", "", "holds no example of ConvAI2"),
        ("dstc7", "{}", "must hold a list"),
        ("dstc7", "[", "is not JSON"),
        ("dstc7", '[{"example-id": 1}]', "Example 0.*messages-so-far"),
        ("dstc7", json.dumps(DSTC7), "Example 0.*lacks '7'.*second file"),
        ("dstc7", json.dumps(DSTC7).replace('"which release?"', "null"), "Example 0.*must be a string"),
        ("dstc7", json.dumps(DSTC7).replace('"reboot"', "3"), "Example 0.*must be a string"),
        ("dstc7", '["text"]', "Example 0"),
        ("ubuntu-v2", "Context,Utterance,Label\na,b,1\n", "Line 2.*distractors"),
        ("jsonl", "{\n", "Line 1.*JSON object"),
        ("jsonl", "[]\n", "Line 1.*JSON object"),
        ("jsonl", '{"context": 5, "candidates": ["a"]}\n', "Line 1.*A context is"),
        ("jsonl", '{"context": "a", "candidates": [null]}\n', "Line 1.*must be a string"),
        ("jsonl", '{"context": "a", "candidates": ["a"], "label": "0"}\n', "Line 1.*label is '0'"),
        ("jsonl", '{"context": "a"}\n', "Line 1.*lacks 'candidates'"),
        ("jsonl", '{"context": "a", "candidates": ["b"], "label": 1}\n', "Line 1.*1 candidates, but its label is 1"),
        ("ubuntu-v2", "Context,Reply,Distractor\n" + "a" * 200_000 + ",b,c\n", "Line 2.*no CSV"),
    ],
)
def test_files_of_another_format(task, content, match, files):
    files[task][0].write_text(content)
    paths = files[task][:1] if task == "dstc7" else files[task]
    with pytest.raises(ValueError, match=match):
        read_task(task, paths)


@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_is_no_text(task, files):
    files[task][0].write_bytes(b"\x1f\x8b\x08\x00 an archive")
    with pytest.raises(ValueError, match=r"UTF-8|not JSON"):
        read_task(task, files[task])


def test_other_tasks_and_numbers_of_files(files):
    with pytest.raises(ValueError, match="no task 'squad'"):
        read_task("squad", files["jsonl"])
    with pytest.raises(ValueError, match=r"subtask_1.json ubuntu_responses_subtask_1.tsv, but got 4"):
        read_task("dstc7", files["dstc7"] * 2)
