"""What the pages in docs/ tell a reader to run, runs."""

import re
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser
from typer.testing import CliRunner

from parlai_original import FIXTURES
from poly_encoders.cli import app
from poly_encoders.tasks import TASKS
from poly_encoders.training import pretrain, train
from poly_encoders.training.distill import read_plan
from poly_encoders.training.mine_negatives import MiningArguments

DOCS = Path(__file__).parent.parent / "docs"
DOWNLOAD = "data/models/pretrained_transformers/model_poly/model"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_way_from_a_download_to_auto_model(tmp_path, capsys):
    """The page's commands and code, in their order, on a checkpoint that ParlAI saved."""
    text = page("parlai.md")
    here = {DOWNLOAD: str(FIXTURES / "poly_codes8" / "model"), "my-poly-encoder": str(tmp_path / "my-poly-encoder")}

    def filled(code: str) -> str:
        for name, path in here.items():
            code = code.replace(name, path)
        return code

    (command,) = re.findall(r"^poly-encoders (convert-parlai .*)$", text, flags=re.MULTILINE)
    result = CliRunner().invoke(app, filled(command).split())
    assert result.exit_code == 0, result.output
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(filled(block), "parlai.md", "exec"), names)
    assert names["scores"].shape == (1, 2)
    assert "green tea" in capsys.readouterr().out


def test_every_task_has_its_command():
    text = page("evaluation.md")
    for name, task in TASKS.items():
        assert f"poly-encoders evaluate MODEL {name} {' '.join(task.files)}" in text, name


@pytest.mark.parametrize("name", ["parlai.md", "evaluation.md", "training.md"])
def test_links_and_paths_are_there(name):
    text = page(name)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (DOCS / target).exists(), target
    for path in re.findall(r"`((?:tests|docs|training)/[\w/.]+)`", text):
        assert (DOCS.parent / path).exists(), path


def test_training_commands_are_understood():
    """Every command of the page that trains something, as far as reading its options."""
    commands = re.findall(r"^accelerate launch ((?:[^\n]*\\\n)*[^\n]*)", page("training.md"), flags=re.MULTILINE)
    scripts = []
    for command in commands:
        words = command.replace("\\\n", " ").split()
        script = next(word for word in words if word.endswith(".py"))
        launcher, options = words[: words.index(script)], words[words.index(script) + 1 :]
        assert all((DOCS.parent / word).is_file() for word in [*launcher, script] if "/" in word)
        options = [str(DOCS.parent / word) if word.endswith(".yaml") else word for word in options]
        read = {
            "train.py": train.parse_options,
            "pretrain.py": pretrain.parse_options,
            "mine_negatives.py": HfArgumentParser(MiningArguments).parse_args_into_dataclasses,
            "distill.py": lambda options: read_plan(options[options.index("--config") + 1]),
        }[Path(script).name]
        assert read(options)
        scripts.append(Path(script).name)
    assert set(scripts) == {"train.py", "pretrain.py", "mine_negatives.py", "distill.py"}


def test_the_hub_page(saved_poly_encoder):
    """Its Python runs in its order, without the push, which tests/hub does; its commands' options are there."""
    text = page("hub.md")
    push, *blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "push_to_hub" in push
    assert len(blocks) == 4
    names: dict = {}
    before = sys.path.copy()
    try:
        for block in blocks:
            code = re.sub(r"org/my-poly-encoder|models/chitchat-poly", str(saved_poly_encoder), block)
            exec(compile(code, "hub.md", "exec"), names)
    finally:
        sys.path[:] = before
        sys.modules.pop("handler", None)
    assert [entry["index"] for entry in names["ranking"]] == [names["best"][0]["index"]]
    assert len(names["scores"]) == 3
    assert names["refused"]["error"]["status"] == 400
    assert len(names["rankings"]) == 2
    assert sum(names["why"].token_weights) == pytest.approx(1.0, abs=1e-4)
    rows = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    options = {name for row in rows for name in re.findall(r"`(--[\w-]+)", row)}
    help_text = CliRunner().invoke(app, ["push", "--help"], env={"COLUMNS": "200"}).output
    assert options
    assert all(name in help_text for name in options)
    for command in re.findall(r"^accelerate launch training/train.py (.*?)$", text.replace("\\\n", ""), re.MULTILINE):
        parsed = train.parse_options(command.split())
        assert parsed.training.push_to_hub
        assert parsed.training.hub_private_repo
