"""The conversation page as a person uses it, in a real browser."""

import json
import os
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from browser import find_browser, headless_browser
from index_rows import rows_of
from poly_encoders import PolyEncoder
from poly_encoders.index import CandidateIndex
from served import running

CANDIDATES = ["yes, green tea", "<img src=x onerror=document.title='broken'>", "${1+1} {{value}} `x`", "no"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None and not os.environ.get("CI"),
        reason="no Chromium with its driver: apt-get install chromium chromium-driver",
    ),
]


class Page:
    """The page in a browser."""

    def __init__(self, driver, server, key="secret"):
        self.driver = driver
        driver.get(f"http://127.0.0.1:{server.port}/")
        self.wait(lambda: self.one("#locked").is_displayed())  # it opens with an example, which needs the key
        self.fill("#key", key)
        self.one("#unlock").click()

    def wait(self, condition):
        return WebDriverWait(self.driver, 60, ignored_exceptions=[Exception]).until(lambda _: condition())

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return [element.text for element in self.driver.find_elements("css selector", selector)]

    def fill(self, selector, text):
        box = self.one(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE)

    def say(self, text):
        said = len(self.texts("#bubbles li"))
        self.fill("#turn", text)
        self.one("#turn").send_keys(Keys.ENTER)
        self.wait(lambda: len(self.texts("#bubbles li")) == said + 1)

    def hosts(self):
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname for url in sent if url.startswith(("http", "ws"))}


def test_a_conversation_over_an_index(saved_poly_encoder, tmp_path):
    model = PolyEncoder(str(saved_poly_encoder), device="cpu")
    index = CandidateIndex.build(model, rows_of(60), tmp_path / "index", show_progress_bar=False)
    with running(saved_poly_encoder, "--index", tmp_path / "index") as server, headless_browser() as driver:
        page = Page(driver, server)
        page.wait(lambda: page.texts("#ranking .pe-text"))
        page.one("#clear").click()
        page.say("hello there")
        page.say("how are you")

        def expected(turns, condition=None):
            [hits] = index.search([turns], 10, condition)
            return [hit["text"] for hit in hits]

        turns = ["hello there", "how are you"]
        page.wait(lambda: page.texts("#ranking .pe-text") == expected(turns))
        assert "Of 60 candidates; none of the others is better." in page.texts("#note")
        best = expected(turns)[0]
        page.wait(lambda: best in page.texts("#why .pe-chosen q")[0])
        driver.find_elements("css selector", "#ranking button")[2].click()
        page.wait(lambda: expected(turns)[2] in page.texts("#why .pe-chosen q")[0])
        page.one("#take").click()
        page.wait(lambda: page.texts("#bubbles li span") == [*turns, best])
        page.wait(lambda: page.texts("#ranking .pe-text") == expected([*turns, best]))
        page.fill("#filter", "year = 2003")
        page.one("#ask").click()
        page.wait(lambda: page.texts("#ranking .pe-text") == expected([*turns, best], "year = 2003"))
        page.fill("#filter", "nowhere = 2003")
        page.one("#ask").click()
        page.wait(lambda: "The filter cannot be read" in page.texts("#message")[0])
        assert page.hosts() == {"127.0.0.1"}


def test_candidates_that_are_typed(saved_poly_encoder):
    model = PolyEncoder(str(saved_poly_encoder), device="cpu")
    with running(saved_poly_encoder) as server, headless_browser(390, 844) as driver:
        page = Page(driver, server, "wrong")
        page.wait(lambda: "API key" in page.texts("#message")[0])
        page.fill("#key", "secret")
        page.one("#unlock").click()
        page.wait(lambda: page.texts("#ranking .pe-text"))
        page.fill("#candidates", "\n".join(CANDIDATES))
        page.one("#clear").click()
        page.say("do you like tea?")
        expected = model.rank(["do you like tea?"], CANDIDATES, return_documents=True)
        page.wait(lambda: page.texts("#ranking .pe-text") == [row["text"] for row in expected])
        assert driver.title.endswith("poly-encoders")  # the candidate's script did not run
        assert not driver.find_elements("css selector", "img[src=x]")
        width = driver.execute_script("return Math.max(document.documentElement.scrollWidth, window.innerWidth)")
        assert width == 390  # a phone reads it without scrolling sideways
        errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert all("401" in message or "favicon" in message for message in errors)
