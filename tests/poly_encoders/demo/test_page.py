"""The demo's page without a browser: what it ranks, explains and draws; and what the Space is made of."""

import json
import re
import runpy
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from huggingface_hub import SpaceCard

from parlai_original import FIXTURES
from poly_encoders import PolyEncoder
from poly_encoders.demo import drawing
from poly_encoders.demo.page import Demo, Ranked, add_turn, build, remove_turn
from poly_encoders.explaining import Explanation
from poly_encoders.parlai import convert_parlai_checkpoint

ROOT = Path(__file__).parents[3]
SPACE = ROOT / "hub_cards" / "space"

TURNS = ["hello", "do you like tea?"]


def test_nothing_typed_becomes_html(poly_encoder):
    nasty = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${x} {{x}} `x`", "&lt;"]
    bars, why, _ = Demo(poly_encoder).show_ranking("\n".join(nasty), "\n".join(nasty), True)
    for page in (bars, why, drawing.draw("dialogue", nasty), drawing.draw("message", nasty[1])):
        assert not re.search(r"<(script|img)", page)
        assert not re.search(r"[${}`]", page)
    assert "&amp;lt;" in bars


def test_the_bars_are_the_ranking(poly_encoder):
    bars, why, ranked = Demo(poly_encoder).show_ranking("\n".join(TURNS), "a\nbc\n\n  d ", False)
    expected = poly_encoder.rank(TURNS, ["a", "bc", "d"], return_documents=True)
    assert re.findall(r'data-candidate="(\d)"', bars) == [str(entry["corpus_id"]) for entry in expected]
    assert re.findall(r'title="score">([-\d.]+)<', bars) == [f"{entry['score']:.2f}" for entry in expected]
    shares = re.findall(r'softmax of 20 times the scores">([\d.]+)%', bars)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5 * len(shares))
    assert ranked == Ranked(TURNS, ["a", "bc", "d"], expected[0]["corpus_id"])
    assert f"For <q>{expected[0]['text']}</q>" in why


@pytest.mark.parametrize("kind", ["learnt_codes", "first_m", "last_m", "first_and_last_m", "turns", "turns_and_codes"])
def test_what_decided_is_drawn_first_and_deepest(kind, checkpoints):
    model = PolyEncoder(checkpoints("bert"), num_codes=40, context_vectors=kind, device="cpu")
    dialogue = "\n".join("abcdefghijklmnopqrst")
    why = model.explain(dialogue.splitlines(), "a")
    order = [place for place in np.argsort(-why.final_attention, kind="stable") if why.vectors[place] != "padding"]
    names = [why.vectors[place].partition(": ")[0] for place in order]
    for all_vectors, rows, listed in ((False, drawing.TOP_ROWS, drawing.LISTED), (True, len(order), len(order))):
        _, page, _ = Demo(model).show_ranking(dialogue, "a", all_vectors)
        drawn = re.findall(r'<tr><th scope="row".*?>(\w+ \d+) (.*?)</tr>', page)
        assert [name for name, _ in drawn] == names[:rows]
        assert re.findall(r'<span class="pe-vector">(.*?)<', page) == names[:listed]
        for place, (_, cells) in zip(order, drawn, strict=False):
            depths = [float(re.search(r"--w:([\d.]+)|$", cell)[1] or 0) for cell in cells.split("<td")[1:]]
            assert len(depths) == len(why.tokens)
            assert depths[int(why.code_attention[place].argmax())] == max(depths)


def test_turns_are_shown_by_what_was_said(checkpoints):
    model = PolyEncoder(checkpoints("bert"), last_turn_share=0.25, turn_separator="\n", device="cpu")
    _, page, _ = Demo(model).show_ranking("hi <b>\ndo you?", "a", False)
    words = re.findall(r'<span class="pe-words"><span>(.*?)</span>', page)
    assert sorted(words) == ["do you?", "hi &lt;b&gt;"]
    assert sorted(re.findall(r'<th scope="row" title="(.*?)">(turn \d)', page)) == [
        ("do you?", "turn 2"),
        ("hi &lt;b&gt;", "turn 1"),
    ]
    assert "What is in each turn’s vector" in page
    assert "25% of each is the last turn" in Demo(model).words.how
    assert "code" not in re.sub(r"<[^>]+>", "", page) + Demo(model).words.how


def test_the_text_is_shown_whole_and_once(checkpoints):
    """Also what was cut off, before the tokens or behind a prompt; and letters that are two tokens, as bytes may be."""
    model = PolyEncoder(checkpoints("bert"), num_codes=4, max_context_length=6, device="cpu")
    even = np.full(3, 1 / 3, dtype=np.float32)
    arrays = {"code_attention": even[None], "final_attention": np.ones(1), "dots": np.ones(1), "token_weights": even}
    offsets, lists = [(0, 1), (1, 2), (1, 2)], {"special": [False] * 3, "turns": [1] * 3, "vectors": ["code 0"]}
    for why, words, unread in (
        (model.explain("beginning and end", "x"), "&lt;s&gt;beginning and end&lt;/s&gt;", ["beginning and"]),
        (model.explain("the end", "x", prompt="q:"), "&lt;s&gt;q:the end&lt;/s&gt;", ["the e"]),
        (Explanation("aé", ["a", "é", "é"], offsets, **lists, score=1.0, **arrays), "aé", []),
    ):
        page = drawing.draw("context", drawing.pieces(why))
        assert re.sub(r"<[^>]+>", "", page) == words
        assert re.findall(r'class="pe-unread"[^>]*>([^<]*)<', page) == unread


@pytest.mark.parametrize(("weights", "depth"), [([0.5, 0.5], [0, 0]), ([1, 0, 0], [1, 0, 0]), ([1], [1])])
def test_even_attention_looks_even(weights, depth):
    assert drawing.depths(np.array(weights, dtype=float)).tolist() == depth


@pytest.mark.parametrize(("kind", "sentence"), [("bi_mean", "This is a Bi-encoder"), ("cross_first", "Cross-encoder")])
def test_the_other_encoders_rank_and_say_why_there_is_no_map(kind, sentence, tmp_path):
    model = convert_parlai_checkpoint(FIXTURES / kind, tmp_path / "model")
    bars, why, _ = Demo(model).show_ranking("hi", "i like tea\nno", False)
    expected = [entry["text"] for entry in model.rank(["hi"], ["i like tea", "no"], return_documents=True)]
    assert re.findall(r'class="pe-text">([^<]*)<', bars) == expected
    assert "data-candidate" not in bars
    assert sentence in why
    assert "<table" not in why


@pytest.mark.parametrize(
    ("dialogue", "candidates", "message"),
    [
        (" \n ", "a", "There is no turn"),
        (None, None, "There is no turn"),
        ("hi", "", "There is no candidate"),
        ("hi\n" * 101, "a", "101 turns of 202 characters; this page takes up to 100"),
        ("hi", "a\n" * 101, "101 candidates of 101 characters; this page takes up to 100"),
        ("hi", "a" * 20_001, "20,001 characters; this page takes up to 100 of 20,000 in all"),
        ("hi", "\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_ranked_is_said(dialogue, candidates, message, poly_encoder):
    bars, why, ranked = Demo(poly_encoder).show_ranking(dialogue, candidates, False)
    assert message in bars
    assert 'role="alert"' in bars
    assert (why, ranked) == ("", None)


def test_a_click_explains_its_candidate(poly_encoder):
    demo, ranked = Demo(poly_encoder), Ranked(["hi"], ["a", "b"], 0)
    why, after = demo.choose(ranked, False, gr.EventData(None, {"candidate": 1}))
    assert "For <q>b</q>" in why
    assert after == Ranked(["hi"], ["a", "b"], 1)
    for wrong in ({"candidate": 9}, {"candidate": -1}, {"candidate": "0"}, {}):
        assert demo.choose(ranked, False, gr.EventData(None, wrong))[1] is ranked


def test_turns():
    assert add_turn("a", " b \n\nc") == ("a\nb\nc", "")
    assert add_turn("a", "") == ("a", "")
    assert remove_turn("a\nb") == "a"
    assert remove_turn("") == ""
    assert "No turn yet" in drawing.draw("dialogue", [])


def test_the_api_is_the_ranking_alone(poly_encoder):
    page = build(poly_encoder, "a <b> model")
    assert list(page.get_api_info()["named_endpoints"]) == ["/rank"]
    assert not page.analytics_enabled
    assert "a &lt;b&gt; model" in json.dumps(page.get_config_file(), default=str)
    with pytest.raises(gr.Error, match="must be a string"):
        Demo(poly_encoder).rank(TURNS, [["a"]])


def test_the_space_serves_its_model(saved_poly_encoder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("poly_encoders.demo.page.serve", lambda model, name, *address: served.append((model, name)))
    for name, code in ((str(saved_poly_encoder), 0), ("/nowhere", 1)):
        monkeypatch.setenv("MODEL_ID", name)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
        assert stop.value.code == code
    ((model, name),) = served
    assert (type(model), name) == (PolyEncoder, str(saved_poly_encoder))
    assert "no saved model at /nowhere" in capsys.readouterr().err


def test_the_card_and_the_requirements_of_the_space():
    data = SpaceCard.load(SPACE / "README.md").data
    assert data.models == [runpy.run_path(str(SPACE / data.app_file))["MODEL"]]
    assert (data.sdk, data.license) == ("gradio", "apache-2.0")
    assert len(data.short_description) <= 60  # what the Hub takes
    assert {"poly-encoder", "arxiv:1905.01969"} <= set(data.tags)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^demo = \["gradio>={data.sdk_version.split(".")[0]}\.', project, flags=re.MULTILINE)
    assert re.search(rf'^requires-python = ">={data.python_version}"', project, flags=re.MULTILINE)
    version = re.search(r'^version = "(\d+\.\d+)', project, flags=re.MULTILINE)[1]
    assert (SPACE / "requirements.txt").read_text().split() == [f"poly-encoders[demo]>={version}"]
