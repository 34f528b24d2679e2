"""The demo's page as a person uses it, in a real browser, and its API as a client does."""

import json
import os
from urllib.parse import urlsplit

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from browser import find_browser, headless_browser, running_demo
from poly_encoders import PolyEncoder

TURNS = ["hello", "do you like tea?"]
CANDIDATES = ["yes, green tea", "<img src=x onerror=document.title='broken'>", "${1+1} {{value}} `x`", "w" * 300, "no"]

pytestmark = pytest.mark.slow
# In CI a missing browser is an error, not a reason to leave the page untested.
needs_browser = pytest.mark.skipif(
    find_browser() is None and not os.environ.get("CI"),
    reason="no Chromium with its driver: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def address(saved_poly_encoder):
    with running_demo(str(saved_poly_encoder)) as url:
        yield url


@pytest.fixture(scope="module")
def model(saved_poly_encoder):
    return PolyEncoder(str(saved_poly_encoder), device="cpu")


def test_the_api(address, model):
    """What “Use via API” tells: lists in, the ranking out."""
    client = Client(address, verbose=False)
    ranking = client.predict(dialogue=TURNS, candidates=CANDIDATES, api_name="/rank")
    expected = model.rank(TURNS, CANDIDATES, return_documents=True)
    assert [entry["text"] for entry in ranking] == [entry["text"] for entry in expected]
    assert [entry["score"] for entry in ranking] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    with pytest.raises(AppError, match="There is no candidate"):
        client.predict(dialogue=TURNS, candidates=[], api_name="/rank")


class Page:
    """The demo's page in a browser."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.all("#why section"))  # it opens with an example, ranked

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

    def hosts(self):
        """Every machine that the page asked over a network."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname for url in sent if url.startswith(("http", "ws"))}

    def width(self):
        """Of all there is: a phone's window grows with what is too wide for it, so that is no measure."""
        return self.driver.execute_script("return Math.max(document.documentElement.scrollWidth, window.innerWidth)")


@needs_browser
def test_type_a_dialogue_rank_and_look_into_a_candidate(address, model, saved_poly_encoder):
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

        best, last = expected[0]["text"], expected[-1]["text"]
        page.wait(lambda: best in page.texts("#why .pe-chosen q")[0])
        row = page.all("#bars button")[-1]
        row.send_keys(Keys.ENTER)  # by the keyboard, as a mouse's click would
        page.wait(lambda: last in page.texts("#why .pe-chosen q")[0])
        assert row.get_attribute("aria-pressed") == "true"
        assert driver.switch_to.active_element == row  # and the keyboard stays where it was
        tokens = model.explain(TURNS, last).tokens
        assert len(page.all(".pe-heat td")) == len(TURNS) * len(tokens)
        assert "".join(page.texts(".pe-context")).replace("\n", "") == "".join(tokens).replace("\n", "")

        assert driver.title == f"{saved_poly_encoder.name} · poly-encoders"  # the candidate's script did not run
        assert not page.all("img[src=x]")
        page.fill("#candidates", "")
        page.press("#rank")
        page.wait(lambda: "There is no candidate" in page.texts("#bars [role=alert]")[0])
        assert not page.all("#why section")
        assert page.hosts() == {"127.0.0.1"}
        assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
def test_a_phone_reads_it_without_scrolling_sideways(address):
    with headless_browser(390, 844) as driver:
        page = Page(driver, address)
        assert page.width() == 390
        page.rank(["w" * 200, "and many words, more than fit a phone's width"], CANDIDATES)
        page.wait(lambda: len(page.all("#bars button")) == len(CANDIDATES) and page.all(".pe-heat"))
        page.press("#all-vectors input")
        page.wait(lambda: page.all(".pe-heat td"))
        assert page.width() == 390
        (box,) = page.all(".pe-scroll")
        inside = driver.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", box)
        assert inside[0] > inside[1]  # the map does scroll, in its own box
