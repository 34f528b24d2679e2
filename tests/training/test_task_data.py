"""Training data and ranking sets of the paper's tasks, from tiny files in the formats that their authors publish."""

import json
from pathlib import Path

import pytest

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.training.data_sources import load_examples, load_ranking_sets, load_shared_candidates
from poly_encoders.training.task_data import TASK_FILES, load_task_examples
from poly_encoders.training.train import parse_options

CONFIGS = Path(__file__).parent.parent.parent / "training" / "configs"

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
ARTICLES = "the cat sat .\tit slept .\nrain fell .\tthe sea rose .\n"
CONTENTS = {
    "convai2": {"train_self_original.txt": CONVAI2, "valid_self_original.txt": CONVAI2},
    "dstc7": {
        "ubuntu_train_subtask_1.json": json.dumps([dstc7("reboot", "no", "yes"), dstc7("wait", "maybe", "so")]),
        "ubuntu_dev_subtask_1.json": json.dumps([dstc7("reboot", "no")]),
        "ubuntu_test_subtask_1.json": json.dumps([dstc7("reboot", "no", inside=False)]),
        "ubuntu_responses_subtask_1.tsv": "7\tA\treboot\n",
    },
    "ubuntu-v2": {"train.csv": UBUNTU_TRAIN, "valid.csv": UBUNTU_SETS, "test.csv": UBUNTU_SETS},
    "wikipedia": {
        "wikipedia_train250k.txt": ARTICLES + "alone .\n",
        "wikipedia_dev10k.txt": ARTICLES,
        "wikipedia_dev_basedocs.txt": "ships sail .\tthey sink .\n",
        "wikipedia_test10k.txt": ARTICLES,
        "wikipedia_test_basedocs.txt": "wind blows .\n",
    },
}
ALL_SPLITS = [(task, split) for task, files in TASK_FILES.items() for split, names in files._asdict().items() if names]


@pytest.fixture
def folder(tmp_path):
    for task, files in CONTENTS.items():
        (tmp_path / task).mkdir()
        for name, text in files.items():
            (tmp_path / task / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_convai2(folder):
    """A second copy of the reply is no wrong candidate: the row is filled up with another's reply."""
    data = load_examples("convai2", "train", data_dir=str(folder / "convai2"))
    assert data.column_names == ["context", "response", "negative_1", "negative_2"]
    persona = "your persona: i swim.\nhello !"
    assert data[0] == {"context": [persona], "response": "hi , you ?", "negative_1": "no", "negative_2": "tea"}
    assert data[1]["context"] == [persona, "hi , you ?", "fine ."]
    assert data[1]["negative_1"] == "cats"
    assert data[1]["negative_2"] in ("hi , you ?", "good evening .")
    assert load_examples("convai2", data_dir=str(folder / "convai2"))[:] == data[:]


def test_dstc7(folder):
    data = load_examples("dstc7", "train", data_dir=str(folder / "dstc7"))
    assert data[1] == {
        "context": "participant 1: it does not boot\n",
        "response": "wait",
        "negative_1": "maybe",
        "negative_2": "so",
    }
    augmented = folder / "dstc7" / "ubuntu_train_subtask_1_sampled.json"
    augmented.write_text(json.dumps([dstc7("later", "no")]))
    assert load_examples("dstc7", "train", data_dir=str(folder / "dstc7"))["response"][:] == ["later"]


def test_ubuntu_v2_keeps_the_right_pairs(folder):
    data = load_examples("ubuntu-v2", "train", data_dir=str(folder / "ubuntu-v2"))
    assert data[:] == {"context": ["hi . it fails .", "what ? ."], "response": ["apt, then .", "yes ."]}


def test_wikipedia_leaves_out_a_sentence_and_skips_short_articles(folder):
    data = load_examples("wikipedia", "train", data_dir=str(folder / "wikipedia"))
    assert len(data) == 2
    for row, line in zip(data, ARTICLES.splitlines(), strict=True):
        assert sorted([row["context"], row["response"]]) == sorted(line.split("\t"))


@pytest.mark.parametrize("task", TASK_FILES)
@pytest.mark.parametrize("number", [0, 1])
def test_fewer_wrong_candidates(task, number, folder):
    data = load_examples(task, "train", data_dir=str(folder / task), max_negatives=number)
    own = number if task in ("convai2", "dstc7") else 0
    assert data.column_names == ["context", "response", *(f"negative_{i + 1}" for i in range(own))]


@pytest.mark.parametrize(("task", "split"), ALL_SPLITS)
def test_every_split_has_examples(task, split, folder):
    data = load_examples(task, split, data_dir=str(folder / task))
    assert data.column_names[:2] == ["context", "response"]
    assert all(text for text in data["response"])


@pytest.mark.parametrize(("task", "split"), [pair for pair in ALL_SPLITS if pair[1] != "train"])
def test_evaluation_is_on_the_tasks_own_sets(task, split, folder, poly_encoder):
    where = str(folder / task)
    sets = load_ranking_sets(task, split, size=20, seed=0, data_dir=where)
    shared = load_shared_candidates(task, split, where)
    assert bool(shared) == (task == "wikipedia")
    assert all(len(ranked["candidates"]) + len(shared) > 1 for ranked in sets)
    assert len(load_ranking_sets(task, split, size=20, seed=0, limit=1, data_dir=where)) == 1
    evaluator = CandidateRankingEvaluator(sets, shared_candidates=shared, show_progress_bar=False)
    assert 0 < evaluator(poly_encoder)["mrr"] <= 1


@pytest.mark.parametrize("task", TASK_FILES)
@pytest.mark.parametrize("architecture", ["bi", "poly", "cross"])
def test_the_paper_s_recipe_goes_with_every_task(task, architecture):
    files = [CONFIGS / f"paper_{architecture}.yaml", CONFIGS / f"{task.replace('-', '_')}.yaml"]
    model, data, training = parse_options(["--config", *map(str, files)])
    assert model.architecture.startswith(architecture)
    assert data.dataset == task
    assert TASK_FILES[task]._asdict()[data.eval_split]
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("adamax", 5e-5, 0.01)
    assert training.lr_scheduler_kwargs == {"factor": 0.4, "patience": 0}
    batch = {"bi": 512, "poly": 256, "cross": 16}[architecture]
    assert training.per_device_train_batch_size == batch


def test_a_file_that_changed_is_read_again(folder):
    where = folder / "ubuntu-v2"
    assert len(load_task_examples("ubuntu-v2", "train", str(where))) == 2
    (where / "train.csv").write_text(UBUNTU_TRAIN + "more __eot__,of it,1\n")
    assert len(load_task_examples("ubuntu-v2", "train", str(where))) == 3


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(ValueError, match=r"give --data_dir, the folder with train_self_original.txt"):
        load_examples("convai2")
    with pytest.raises(ValueError, match="never published"):
        load_ranking_sets("convai2", "test", 20, 0, data_dir=str(folder / "convai2"))
    with pytest.raises(ValueError, match="not 'dev'"):
        load_examples("dstc7", "dev", data_dir=str(folder / "dstc7"))
    with pytest.raises(ValueError, match="no ranking sets"):
        load_ranking_sets("dstc7", "train", 20, 0, data_dir=str(folder / "dstc7"))
    with pytest.raises(FileNotFoundError, match=r"wikipedia_shuf_train5M.txt or wikipedia_train250k.txt"):
        load_examples("wikipedia", data_dir=str(tmp_path))
    (folder / "wikipedia" / "wikipedia_test_basedocs.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test10k.txt and wikipedia_test_basedocs.txt"):
        load_ranking_sets("wikipedia", "test", 20, 0, data_dir=str(folder / "wikipedia"))
    with pytest.raises(ValueError, match="max_negatives must be at least 0"):
        load_examples("convai2", data_dir=str(folder / "convai2"), max_negatives=-1)


@pytest.mark.parametrize(
    ("task", "name", "content", "match"),
    [
        ("convai2", "train_self_original.txt", "", "holds no example"),
        ("convai2", "train_self_original.txt", "1 hello\thi\n", "Line 1.*no_cands"),
        ("convai2", "train_self_original.txt", "1 a\tb\t\tb|c|d\n2 e\tf\t\tf\n", "Example 2 has 1 wrong.*Lower"),
        ("dstc7", "ubuntu_train_subtask_1.json", "{}", "must hold a list"),
        ("ubuntu-v2", "train.csv", UBUNTU_SETS, "Line 2.*label 0 or 1"),
        ("ubuntu-v2", "train.csv", "Context,Utterance,Label\na,b,2\n", "Line 2.*label 0 or 1"),
        ("ubuntu-v2", "train.csv", "Context,Utterance,Label\na,b,0\n", "holds no example"),
        ("wikipedia", "wikipedia_train250k.txt", "alone .\n", "holds no example"),
    ],
)
def test_files_of_another_format(task, name, content, match, folder):
    (folder / task / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        load_examples(task, "train", data_dir=str(folder / task))
