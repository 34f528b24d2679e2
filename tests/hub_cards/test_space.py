"""The Space: its functions, and its page as a person uses it, in a real browser."""

import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import app
import drawing
from browser import find_browser, headless_browser, running_demo
from parlai_original import FIXTURES
from poly_encoders import CrossEncoder, PolyEncoder
from poly_encoders.parlai import convert_parlai_checkpoint

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub_cards" / "space"

TURNS = ["hello", "do you like tea?"]
CANDIDATES = ["yes, green tea", "<img src=x onerror=document.title='broken'>", "${1+1} {{value}} `x`", "w" * 300, "no"]

# In CI a missing browser is an error, not a reason to leave the page untested.
needs_browser = pytest.mark.skipif(
    find_browser() is None and not os.environ.get("CI"),
    reason="no Chromium with its driver: apt-get install chromium chromium-driver",
)


# --- what the page shows ---------------------------------------------------------------------------------------------


def test_nothing_typed_becomes_html(poly_encoder):
    demo = app.Demo(poly_encoder)
    nasty = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${x} {{x}} `x`", "&lt;"]
    bars, why, _ = demo.show_ranking("\n".join(nasty), "\n".join(nasty), True)
    for page in (bars, why, drawing.dialogue(nasty), drawing.message(nasty[1])):
        assert not re.search(r"<(script|img)", page)
        assert not re.search(r"[${}`]", page)
    assert "&amp;lt;" in bars


def test_the_bars_are_the_ranking(poly_encoder):
    bars, _, ranked = app.Demo(poly_encoder).show_ranking("\n".join(TURNS), "a\nbc\n\n  d ", False)
    expected = poly_encoder.rank(TURNS, ["a", "bc", "d"])
    assert re.findall(r'data-candidate="(\d)"', bars) == [str(entry["corpus_id"]) for entry in expected]
    assert re.findall(r'raw score">([-\d.]+)<', bars) == [f"{entry['score']:.2f}" for entry in expected]
    assert ranked == app.Ranked(TURNS, ["a", "bc", "d"], expected[0]["corpus_id"])
    assert sum(drawing.shares([entry["score"] for entry in expected])) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["learnt_codes", "first_m", "last_m", "first_and_last_m"])
def test_every_kind_of_context_vectors_is_drawn(kind, checkpoints):
    model = PolyEncoder(checkpoints("bert"), num_codes=40, context_vectors=kind, device="cpu")
    number = model[0].config.num_context_vectors
    for all_codes, rows in ((False, drawing.TOP_CODES), (True, number)):
        _, why, _ = app.Demo(model).show_ranking("hi", "a", all_codes)
        assert why.count('<th scope="row">') == rows
        assert why.count("<td") == rows * len("<hi>")
    assert ("code" if kind == "learnt_codes" else "vector") + " 0" in why


def test_the_text_is_shown_whole_and_once(checkpoints):
    """Also what was cut off before the tokens, and what lies between them."""
    model = PolyEncoder(checkpoints("bert"), num_codes=4, max_context_length=6, device="cpu")
    page = drawing.coloured_text(model.explain("beginning and end", "x"))
    words = re.sub(r"<[^>]+>", "", page.replace('<span class="pe-token pe-special"', "<span"))
    assert words == "&lt;s&gt;beginning and end&lt;/s&gt;"
    assert re.search(r'class="pe-unread"[^>]*>beginning and</span>', page)


@pytest.mark.parametrize(("weights", "depth"), [([0.5, 0.5], [0, 0]), ([1, 0, 0], [1, 0, 0]), ([1], [1])])
def test_even_attention_looks_even(weights, depth):
    assert drawing.depths(np.array(weights, dtype=float)).tolist() == depth


@pytest.mark.parametrize(("kind", "sentence"), [("bi_mean", "This is a Bi-encoder"), ("cross_first", "Cross-encoder")])
def test_the_other_encoders_rank_and_say_why_there_is_no_map(kind, sentence, tmp_path):
    model = convert_parlai_checkpoint(FIXTURES / kind, tmp_path / "model")
    bars, why, _ = app.Demo(model).show_ranking("hi", "i like tea\nno", False)
    best = model.rank(["hi"], ["i like tea", "no"], return_documents=True)[0]
    assert bars.index(best["text"]) == min(bars.index("i like tea"), bars.index(">no<") + 1)
    assert "data-candidate" not in bars
    assert sentence in why
    assert "<table" not in why


@pytest.mark.parametrize(
    ("dialogue", "candidates", "message"),
    [
        ("", "a", "The dialogue is empty"),
        (" \n ", "a", "The dialogue is empty"),
        ("hi", "", "There is no candidate"),
        (None, None, "The dialogue is empty"),
        ("hi\n" * 101, "a", "101 turns; this page takes up to 100"),
        ("hi", "a\n" * 101, "101 candidates; this page takes up to 100"),
        ("hi", "a" * 20_001, "20,001 characters"),
        ("hi", "\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_ranked_is_said(dialogue, candidates, message, poly_encoder):
    bars, why, ranked = app.Demo(poly_encoder).show_ranking(dialogue, candidates, False)
    assert message in bars
    assert 'role="alert"' in bars
    assert (why, ranked) == ("", None)


@pytest.mark.parametrize("chosen", [{"candidate": 9}, {"candidate": -1}, {"candidate": "0"}, {}])
def test_a_click_that_names_no_candidate_changes_nothing(chosen, poly_encoder):
    demo, ranked = app.Demo(poly_encoder), app.Ranked(["hi"], ["a"], 0)
    _, after = demo.choose(ranked, False, app.gr.EventData(None, chosen))
    assert after is ranked


def test_turns():
    assert app.add_turn("a", " b \n\nc") == ("a\nb\nc", "")
    assert app.add_turn("a", "") == ("a", "")
    assert app.remove_turn("a\nb") == "a"
    assert app.remove_turn("") == ""
    assert "No turn yet" in drawing.dialogue([])


# --- what a Space is made of -----------------------------------------------------------------------------------------


def test_the_card_of_the_space():
    data = SpaceCard.load(SPACE / "README.md").data
    assert data.sdk == "gradio"
    assert (SPACE / data.app_file).is_file()
    assert data.license == "apache-2.0"
    assert data.models == [app.DEFAULT_MODEL]
    assert len(data.short_description) <= 60  # what the Hub takes
    assert {"poly-encoder", "arxiv:1905.01969"} <= set(data.tags)
    floor = re.search(r"gradio>=(\d+)", (SPACE / "requirements.txt").read_text())
    assert data.sdk_version.split(".")[0] == floor[1]


def test_the_requirements_are_the_packages_own():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(\d+\.\d+)', project, flags=re.MULTILINE)[1]
    (demo,) = re.findall(r"^demo = (\[.*\])$", project, flags=re.MULTILINE)
    assert (SPACE / "requirements.txt").read_text().split() == [f"poly-encoders>={version}", *json.loads(demo)]


def test_a_model_that_is_not_there_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"no saved model.*\n.*MODEL_ID"):
        app.main([])


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(saved_poly_encoder):
    with running_demo(str(saved_poly_encoder)) as url:
        yield url


def test_the_api(address, saved_poly_encoder):
    """What “Use via API” tells: lists in, the ranking out."""
    client = Client(address, verbose=False)
    ranking = client.predict(dialogue=TURNS, candidates=CANDIDATES, api_name="/rank")
    expected = PolyEncoder(str(saved_poly_encoder), device="cpu").rank(TURNS, CANDIDATES, return_documents=True)
    assert [entry["text"] for entry in ranking] == [entry["text"] for entry in expected]
    assert [entry["score"] for entry in ranking] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    with pytest.raises(AppError, match="There is no candidate"):
        client.predict(dialogue=TURNS, candidates=[], api_name="/rank")
    with pytest.raises(AppError, match="must be a string"):
        client.predict(dialogue=TURNS, candidates=[["a"]], api_name="/rank")


class Page:
    """The demo's page in a browser."""

    def __init__(self, driver, url, ready="#why section"):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.all(ready))  # it opens with an example, ranked

    def wait(self, condition):
        return WebDriverWait(self.driver, 60, ignored_exceptions=[Exception]).until(lambda _: condition())

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        return [element.text for element in self.all(selector)]

    def fill(self, selector, text):
        (box,) = self.all(f"{selector} textarea, {selector} input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE)

    def press(self, selector):
        (button,) = self.all(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def rank(self, turns, candidates):
        self.press("#clear")
        self.wait(lambda: not self.all("#bubbles li"))
        for number, turn in enumerate(turns, start=1):
            self.fill("#turn", turn)
            self.press("#add")
            self.wait(lambda number=number: len(self.all("#bubbles li")) == number)
        self.fill("#candidates", "\n".join(candidates))
        self.press("#rank")

    def width(self):
        """Of all there is: a phone's window grows with what is too wide for it, so that is no measure."""
        return self.driver.execute_script("return Math.max(document.documentElement.scrollWidth, window.innerWidth)")


@needs_browser
def test_type_a_dialogue_rank_and_look_into_a_candidate(address, saved_poly_encoder):
    model = PolyEncoder(str(saved_poly_encoder), device="cpu")
    expected = model.rank(TURNS, CANDIDATES, return_documents=True)
    with headless_browser() as driver:
        page = Page(driver, address)
        page.rank(TURNS, CANDIDATES)
        page.wait(lambda: page.texts("#bars .pe-text") == [entry["text"] for entry in expected])
        assert page.texts("#bubbles li span") == TURNS
        assert page.texts("#bars .pe-score") == [f"{entry['score']:.2f}" for entry in expected]
        widths = [bar.size["width"] for bar in page.all("#bars .pe-bar > span")]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > widths[-1]

        best, last = expected[0]["text"], expected[-1]
        page.wait(lambda: best in page.texts("#why .pe-chosen q")[0])
        row = page.all("#bars button")[-1]
        row.send_keys(Keys.ENTER)  # by the keyboard, as a mouse's click would
        page.wait(lambda: last["text"] in page.texts("#why .pe-chosen q")[0])
        assert row.get_attribute("aria-pressed") == "true"
        assert driver.switch_to.active_element == row  # and the keyboard stays where it was
        why = model.explain(TURNS, last["text"])
        order = sorted(range(4), key=lambda code: -why.final_attention[code])
        heads = page.texts(".pe-heat tbody th")
        assert [head.split()[1] for head in heads] == [str(code) for code in order]
        assert len(page.all(".pe-heat thead th")) == 1 + len(why.tokens)
        assert len(page.all(".pe-heat td")) == 4 * len(why.tokens)
        darkest = [
            max(
                range(len(why.tokens)),
                key=lambda j: float(cells[j].get_attribute("style").partition("--w:")[2].strip(" ;") or 0),
            )
            for cells in (row.find_elements("css selector", "td") for row in page.all(".pe-heat tbody tr"))
        ]
        assert darkest == [int(why.code_attention[code].argmax()) for code in order]
        assert "".join(page.texts(".pe-context")).replace("\n", "") == "".join(why.tokens).replace("\n", "")

        assert driver.title == f"{saved_poly_encoder.name} · poly-encoders"  # the candidate's script did not run
        assert not page.all("img[src=x]")

        page.fill("#candidates", "")
        page.press("#rank")
        page.wait(lambda: "There is no candidate" in page.texts("#bars [role=alert]")[0])
        assert not page.all("#why section")
        asked = {urlsplit(url).hostname for url in _requests(driver)}
        assert asked == {"127.0.0.1"}
        errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []


@needs_browser
def test_a_phone_reads_it_without_scrolling_sideways(address):
    with headless_browser(390, 844) as driver:
        page = Page(driver, address)
        assert page.width() == 390
        page.rank(["w" * 200, "and many words, more than fit a phone's width"], CANDIDATES)
        page.wait(lambda: len(page.all("#bars button")) == len(CANDIDATES) and page.all(".pe-heat"))
        page.press("#all-codes input")
        page.wait(lambda: page.all(".pe-heat td"))
        assert page.width() == 390
        (box,) = page.all(".pe-scroll")
        inside = driver.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", box)
        assert inside[0] > inside[1]  # the map does scroll, in its own box


@needs_browser
def test_a_cross_encoder_in_the_browser(tmp_path):
    convert_parlai_checkpoint(FIXTURES / "cross_first", tmp_path / "model")
    expected = CrossEncoder(str(tmp_path / "model"), device="cpu").rank(["hi"], ["i like tea", "no"])
    with running_demo(str(tmp_path / "model")) as url, headless_browser() as driver:
        page = Page(driver, url, ready="#bars li")
        page.rank(["hi"], ["i like tea", "no"])
        page.wait(lambda: len(page.all("#bars li")) == 2)
        assert page.texts("#bars .pe-score") == [f"{entry['score']:.2f}" for entry in expected]
        assert "Cross-encoder" in page.all("#why")[0].text
        assert not page.all(".pe-heat, #bars button")


def _requests(driver):
    """Every address that the page asked for over a network."""
    for entry in driver.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if url.startswith(("http", "ws")):
                yield url
