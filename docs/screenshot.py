"""Take the README's pictures of the demo: docs/images/space.png and space-phone.png.

    python docs/screenshot.py MODEL [--output docs/images]

MODEL is the folder of a trained Poly-encoder, such as the quick start's. It needs Debian's chromium and
chromium-driver, and the development extra.
"""

import argparse
import base64
import io
import sys
from pathlib import Path

from PIL import Image
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import headless_browser, running_demo  # noqa: E402

# Name, width of the window, and the part that is kept: from the top, or from the ranking on.
PICTURES = (("space", 1180, None), ("space-phone", 390, "#bars"))
PHONE_HEIGHT = 2300
COLOURS = 256  # of a palette: a page of few colours stays sharp and becomes small


def take(url: str, width: int, start: str | None) -> Image.Image:
    """The page with its first example ranked, whole, or a phone's few screens from the element `start` on."""
    with headless_browser(width, 900) as driver:
        driver.get(url)
        WebDriverWait(driver, 120).until(lambda page: page.find_elements("css selector", ".pe-heat td"))
        driver.execute_async_script("document.fonts.ready.then(() => setTimeout(arguments[0], 1000))")
        height = driver.execute_script("return document.documentElement.scrollHeight")
        top = 0
        if start is not None:
            top = driver.execute_script(
                "return document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY - 60", start
            )
            height = min(height - top, PHONE_HEIGHT)
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def main() -> None:
    """Take and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with running_demo(options.model) as url:
        for name, width, start in PICTURES:
            picture = take(url, width, start).quantize(COLOURS, dither=Image.Dither.NONE)
            picture.save(options.output / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
