"""Training data and ranking sets of the paper's tasks, from tiny files in the formats that their authors publish."""

import json
from pathlib import Path

import pytest

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.data.task_files import TASK_FILES
from poly_encoders.training.train import parse_options

CONFIGS = Path(__file__).parents[3] / "training" / "configs"

CONVAI2 = """1 your persona: i swim.
2 hello !\thi , you ?\t\tno|tea|hi , you ?
3 fine .\tgreat .\t\tcats|great .|great .
1 your persona: i ski.
2 good evening\tgood evening .\t\tyes|perhaps|good evening .
"""


def dstc7(right, *wrong, inside=True):
    options = [{"candidate-id": text, "utterance": text} for text in (*wrong, right)]
    example = {
        "example-id": 7,
        "messages-so-far": [{"speaker": "participant_1", "utterance": "it does not boot"}],
        "options-for-next": options,
    }
    return example | ({"options-for-correct-answers": [options[-1]]} if inside else {})


UBUNTU_TRAIN = """Context,Utterance,Label
hi __eou__ it fails __eou__ __eot__ ,"apt, then __eou__",1.0
hi __eou__ __eot__ ,never __eou__,0.0
what ? __eou__ __eot__ ,yes __eou__,1
"""
UBUNTU_SETS = """Context,Ground Truth Utterance,Distractor_0,Distractor_1
hi __eou__ __eot__ ,apt __eou__,never __eou__,yes __eou__
"""
CONTENTS = {
    "convai2": {"train_self_original.txt": CONVAI2, "valid_self_original.txt": CONVAI2},
    "dstc7": {
        "ubuntu_train_subtask_1.json": json.dumps([dstc7("reboot", "no", "yes"), dstc7("wait", "maybe", "so")]),
        "ubuntu_dev_subtask_1.json": json.dumps([dstc7("reboot", "no")]),
        "ubuntu_test_subtask_1.json": json.dumps([dstc7("reboot", "no", inside=False)]),
        "ubuntu_responses_subtask_1.tsv": "7\tA\treboot\n",
    },
    "ubuntu-v2": {"train.csv": UBUNTU_TRAIN, "valid.csv": UBUNTU_SETS, "test.csv": UBUNTU_SETS},
}
ALL_SPLITS = [(task, split) for task, files in TASK_FILES.items() for split, names in files.items() if names]


@pytest.fixture
def folder(tmp_path):
    for task, files in CONTENTS.items():
        (tmp_path / task).mkdir()
        for name, text in files.items():
            (tmp_path / task / name).write_text(text, encoding="utf-8")
    return tmp_path


def examples(folder, task, split="train", **options):
    return DataSource(task, split, data_dir=str(folder / task), **options).examples()


def test_convai2(folder):
    """A second copy of the reply is no negative: the row is filled up with another's reply."""
    data = examples(folder, "convai2")
    assert data.column_names == ["context", "response", "negative_1", "negative_2"]
    persona = "your persona: i swim.\nhello !"
    assert data[0] == {"context": [persona], "response": "hi , you ?", "negative_1": "no", "negative_2": "tea"}
    assert data[1]["context"] == [persona, "hi , you ?", "fine ."]
    assert data[1]["negative_1"] == "cats"
    assert data[1]["negative_2"] in ("hi , you ?", "good evening .")
    assert examples(folder, "convai2")[:] == data[:]


def test_dstc7(folder):
    row = {
        "context": "participant 1: it does not boot\n",
        "response": "wait",
        "negative_1": "maybe",
        "negative_2": "so",
    }
    assert examples(folder, "dstc7")[1] == row
    augmented = folder / "dstc7" / "ubuntu_train_subtask_1_sampled.json"
    augmented.write_text(json.dumps([dstc7("later", "no")]))
    assert examples(folder, "dstc7")["response"][:] == ["later"]


def test_ubuntu_v2_keeps_the_positives_and_sees_that_a_file_changed(folder):
    data = examples(folder, "ubuntu-v2")
    assert data[:] == {"context": ["hi . it fails .", "what ? ."], "response": ["apt, then .", "yes ."]}
    (folder / "ubuntu-v2" / "train.csv").write_text(UBUNTU_TRAIN + "more __eot__,of it,1\n")
    assert len(examples(folder, "ubuntu-v2")) == 3


@pytest.mark.parametrize("task", TASK_FILES)
def test_fewer_negatives(task, folder):
    for number in (0, 1):
        own = number if task in ("convai2", "dstc7") else 0
        names = ["context", "response", *(f"negative_{i + 1}" for i in range(own))]
        assert examples(folder, task, max_negatives=number).column_names == names


@pytest.mark.parametrize(("task", "split"), ALL_SPLITS)
def test_every_split_has_examples_and_sets_of_its_own(task, split, folder, poly_encoder):
    source = DataSource(task, split, data_dir=str(folder / task))
    assert source.examples().column_names[:2] == ["context", "response"]
    assert all(source.examples()["response"])
    if split == "train":
        with pytest.raises(ValueError, match="no ranking sets"):
            source.ranking_sets(20)
        return
    sets = source.ranking_sets(20)
    assert all(len(ranked["candidates"]) > 1 for ranked in sets)
    assert len(source.ranking_sets(20, limit=1)) == 1
    assert 0 < CandidateRankingEvaluator(sets, show_progress_bar=False)(poly_encoder)["mrr"] <= 1


@pytest.mark.parametrize("task", TASK_FILES)
@pytest.mark.parametrize(("architecture", "batch"), [("bi", 512), ("poly", 256), ("cross", 16)])
def test_the_paper_s_recipe_goes_with_every_task(task, architecture, batch):
    files = [CONFIGS / f"paper_{architecture}.yaml", CONFIGS / f"{task.replace('-', '_')}.yaml"]
    model, data, training = parse_options(["--config", *map(str, files)])
    assert model.architecture.startswith(architecture)
    assert data.dataset == task
    assert TASK_FILES[task][data.eval_split]
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("adamax", 5e-5, 0.01)
    assert training.lr_scheduler_kwargs == {"factor": 0.4, "patience": 0}
    assert training.per_device_train_batch_size == batch


def test_what_is_not_there(folder):
    with pytest.raises(ValueError, match=r"give --data_dir, the folder with train_self_original.txt"):
        DataSource("convai2").examples()
    with pytest.raises(ValueError, match="never published"):
        DataSource("convai2", "test", data_dir=str(folder / "convai2")).ranking_sets(20)
    with pytest.raises(ValueError, match="not 'dev'"):
        examples(folder, "dstc7", "dev")
    with pytest.raises(FileNotFoundError, match=r"subtask_1_sampled.json or ubuntu_train_subtask_1.json"):
        DataSource("dstc7", data_dir=str(folder)).examples()
    (folder / "dstc7" / "ubuntu_responses_subtask_1.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"ubuntu_test_subtask_1.json and ubuntu_responses_subtask_1.tsv"):
        examples(folder, "dstc7", "test")


@pytest.mark.parametrize(
    ("task", "name", "content", "match"),
    [
        ("convai2", "train_self_original.txt", "", "holds no example"),
        ("convai2", "train_self_original.txt", "1 hello\thi\n", "Line 1.*no_cands"),
        ("convai2", "train_self_original.txt", "1 a\tb\t\tb|c|d\n2 e\tf\t\tf\n", "Example 2 has 1 negatives.*Lower"),
        ("dstc7", "ubuntu_train_subtask_1.json", "{}", "must hold a list"),
        ("ubuntu-v2", "train.csv", UBUNTU_SETS, "Line 2.*label 0 or 1"),
        ("ubuntu-v2", "train.csv", "Context,Utterance,Label\na,b,2\n", "Line 2.*label 0 or 1"),
        ("ubuntu-v2", "train.csv", "Context,Utterance,Label\na,b,0\n", "holds no example"),
    ],
)
def test_files_of_another_format(task, name, content, match, folder):
    (folder / task / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        examples(folder, task)
