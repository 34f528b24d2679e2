"""`poly-encoders index`, as a user types it."""

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from poly_encoders.cli import app

pytest.importorskip("lance")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["index", *map(str, arguments)], env={"COLUMNS": "150"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr if code else result.output


def test_an_index_from_beginning_to_end(poly_encoder, tmp_path):
    model, index, rows = tmp_path / "model", tmp_path / "index", tmp_path / "rows.jsonl"
    poly_encoder.save(str(model))
    texts = ["fine thanks", "the weather is nice", "a film perhaps", "what about dinner"]
    rows.write_text("".join(json.dumps({"id": n, "text": text, "tag": n % 2}) + "\n" for n, text in enumerate(texts)))
    assert "4 candidates" in run("build", model, rows, index)
    found = run("search", index, "how are you", "fine thanks", "--top-k", 2)  # with the model that it was built with
    assert "Proven" in found
    assert sum(text in found for text in texts) == 2
    assert "tag" in found
    if importlib.util.find_spec("pymilvus"):
        again = run("search", index, "how are you", "fine thanks", "--top-k", 2, "--milvus", tmp_path / "milvus.db")
        assert again[again.index("score") :] == found[found.index("score") :]
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": 9, "text": "late", "tag": 1}) + "\n")
    assert "1 new or changed; 5 candidates" in run("add", index, more, "--model", model)
    assert "0 new or changed" in run("add", index, more, "--model", model)
    more.write_text(json.dumps({"id": 9, "text": "later", "tag": 1}) + "\n")
    assert "--replace" not in run("add", index, more, "--model", model, code=1)
    assert "1 new or changed; 5 candidates" in run("add", index, more, "--replace", "--model", model)
    assert "1 deleted; 4 candidates" in run("delete", index, 9)
    assert "2 deleted; 2 candidates" in run("delete", index, "--where", "tag = 1")
    assert "2 candidates" in run("compact", index, "--keep-days", 0)
    shown = run("info", index, "--verify")
    assert "All is as it was written" in shown
    assert "float16" in shown


def test_errors_are_a_line(tmp_path):
    assert "does not exist" in run("info", tmp_path / "nowhere", code=1)
    assert "does not exist" in run("search", tmp_path / "nowhere", "hello", code=1)
