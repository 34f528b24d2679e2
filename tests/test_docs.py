"""What the README and the pages in docs/ tell a reader to run, runs, and what they name is there."""

import re
import shlex
from pathlib import Path

import datasets
import mteb
import pytest
from transformers import HfArgumentParser
from typer.testing import CliRunner

from card_snippets import assert_prints_what_it_shows, python_blocks
from parlai_original import FIXTURES
from poly_encoders.cli import app
from poly_encoders.tasks import TASKS
from poly_encoders.training import pretrain, train
from poly_encoders.training.distill import read_plan
from poly_encoders.training.methods.negative_rules import MiningOptions
from poly_encoders.training.mine_negatives import MiningArguments
from small_tasks import mteb_task, write_nano_beir

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run_blocks(blocks: list[str], names_of: dict[str, str]) -> dict:
    """What the blocks define, run in their order with these names replaced."""
    defined: dict = {}
    for block in blocks:
        for name, path in names_of.items():
            block = block.replace(name, path)
        exec(compile(block, "page.md", "exec"), defined)
    return defined


def commands(text: str, start: str) -> list[list[str]]:
    """The words of every command of a page that starts so, after that."""
    return [shlex.split(line, comments=True) for line in re.findall(rf"^{start} (.*)$", text.replace("\\\n", ""), re.M)]


def test_the_readme(saved_poly_encoder, tmp_path, capsys):
    """Its Python in its order: the first block on the MiniLM that it names, and it prints what stands below it."""
    blocks = python_blocks(page("README.md"))
    here = {"models/quickstart-poly-encoder": str(saved_poly_encoder), "models/replies": str(tmp_path / "replies")}
    names = run_blocks(blocks, here)
    assert_prints_what_it_shows(blocks[0], capsys.readouterr().out)
    assert names["scores"].shape == (1, 3)
    assert names["existing_vectors"].shape == (3, 384)
    assert len(names["why"].tokens) == len(names["why"].token_weights)
    assert names["context"].shape == (1, 4, 32)
    assert names["best"].indices.shape == (1, 2)
    assert [hit["id"] for hit in names["hits"]] == names["best"].indices[0].tolist()


def test_the_page_on_the_index(saved_poly_encoder, tmp_path):
    here = {"models/quickstart-poly-encoder": str(saved_poly_encoder), "models/faq": str(tmp_path / "faq")}
    names = run_blocks(python_blocks(page("docs/index.md")), here)
    assert names["hits"].proven
    assert names["hits"][0].keys() == {"id", "score", "text", "year"}
    assert sorted(names["index"].store.hashes()) == ["hike", "no", "pasta"]
    (tmp_path / "candidates.jsonl").write_text('{"text": "Fine.", "year": 2025}\n' * 2)
    (tmp_path / "more.jsonl").write_text('{"id": 1, "text": "Good.", "year": 2025}\n')
    here = {"models/mine": saved_poly_encoder, "candidates.jsonl": tmp_path / "candidates.jsonl"}
    here |= {"more.jsonl": tmp_path / "more.jsonl", "index": tmp_path / "index"}
    run = commands(page("docs/index.md"), "poly-encoders index")
    assert [words[0] for words in run] == ["build", "add", "search", "delete", "info", "compact", "push"]
    for action, *words in run[:-1]:
        result = CliRunner().invoke(app, ["index", action, *(str(here.get(word, word)) for word in words)])
        assert result.exit_code == 0, result.output


def test_the_way_from_a_download_to_auto_model(tmp_path, capsys):
    """The page's commands and code, in their order, on a checkpoint that ParlAI saved."""
    download = "data/models/pretrained_transformers/model_poly/model"
    here = {download: str(FIXTURES / "poly_codes8" / "model"), "my-poly-encoder": str(tmp_path / "my-poly-encoder")}
    (command,) = commands(page("docs/parlai.md"), "poly-encoders convert-parlai")
    result = CliRunner().invoke(app, ["convert-parlai", *(here[word] for word in command)])
    assert result.exit_code == 0, result.output
    assert run_blocks(python_blocks(page("docs/parlai.md")), here)["scores"].shape == (1, 2)
    assert "green tea" in capsys.readouterr().out


def test_every_task_has_its_command():
    text = page("docs/evaluation.md")
    for name, task in TASKS.items():
        assert f"poly-encoders evaluate MODEL {name} {' '.join(task.files)}" in text, name


def test_public_benchmarks(saved_poly_encoder, tmp_path, monkeypatch):
    """The page's code on tasks and a data set that are small and made here, of the kinds that it names."""
    get_tasks = mteb.get_tasks
    monkeypatch.setattr(
        mteb, "get_tasks", lambda **named: [mteb_task(task.metadata.type) for task in get_tasks(**named)]
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    here = {"models/quickstart-poly-encoder": str(saved_poly_encoder)}
    here |= {"sentence-transformers/NanoBEIR-en": str(write_nano_beir(tmp_path))}
    names = run_blocks(python_blocks(page("docs/evaluation.md")), here)
    assert names["scores"].keys() == {"SmallRetrieval", "SmallReranking"}
    assert all(0 < figure < 1 for figure in (*names["scores"].values(), names["ndcg"]))


def test_the_way_of_a_context_leads_through_functions_that_are_there():
    steps = re.findall(r"^\| \d+ \| (.*?) \| `(.*?)` \|", page("docs/architecture.md"), flags=re.MULTILINE)
    assert len(steps) == 14
    for functions, file in steps:
        for owner, name in re.findall(r"`(?:(\w+)\.)?(\w+)`", functions):
            assert f"def {name}(" in page(file), name
            assert not owner or re.search(rf"^class {owner}\b", page(file), flags=re.MULTILINE), owner


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_are_there(name):
    text = page(name)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target
    targets = {target for command in re.findall(r"`make ([\w ]+)`", text) for target in command.split()}
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8") for target in targets), targets
    folders = "tests|docs|training|modeling|poly_encoders|hub_cards|benchmarks"
    for path in re.findall(rf"(?<![\w/:.-])((?:{folders})/[\w/.-]*\w/?)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_training_commands_are_understood(name, monkeypatch):
    """Every command of the page that trains something, as far as reading its options."""
    monkeypatch.chdir(ROOT)
    read = {
        "train.py": train.parse_options,
        "pretrain.py": pretrain.parse_options,
        "mine_negatives.py": HfArgumentParser((MiningArguments, MiningOptions)).parse_args_into_dataclasses,
        "distill.py": lambda options: read_plan(options[options.index("--config") + 1]),
    }
    scripts = set()
    for words in commands(page(name), "accelerate launch"):
        place, script = next((i, Path(word).name) for i, word in enumerate(words) if word.endswith(".py"))
        assert all(Path(word).is_file() for word in words[: place + 1] if "/" in word)
        assert read[script](words[place + 1 :])
        scripts.add(script)
    assert scripts == set(read) or name != "docs/training.md"


def test_the_hub_page(saved_poly_encoder):
    """Its Python runs in its order, without the push, which tests/hub does; its commands' options are there."""
    push, *blocks = python_blocks(page("docs/hub.md"))
    assert "push_to_hub" in push
    saved = str(saved_poly_encoder)
    names = run_blocks(blocks, {"org/my-poly-encoder": saved, "models/chitchat-poly": saved})
    assert len(names["best"]) == 2
    assert len(names["rankings"]) == 2
    assert sum(names["why"].token_weights) == pytest.approx(1.0, abs=1e-4)
    assert sum(names["turns"].values()) == pytest.approx(1.0, abs=1e-4)
    options = set(re.findall(r"^\|.*`(--[\w-]+)", page("docs/hub.md"), flags=re.MULTILINE))
    help_text = CliRunner().invoke(app, ["push", "--help"], env={"COLUMNS": "200"}).output
    assert options
    assert all(name in help_text for name in options)
