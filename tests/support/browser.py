"""A headless Chromium, and the demo's page in a process of its own. Nothing here leaves this machine."""

import os
import shutil
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import forks

# No address but this machine's resolves, so that a page that needs another fails.
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def find_browser() -> tuple[str, str] | None:
    """The browser and its driver, `None` where either is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def headless_browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile, its window `width` by `height` CSS pixels, also where it is a phone's."""
    found = find_browser()
    if found is None:
        raise RuntimeError("No Chromium with its driver: apt-get install chromium chromium-driver.")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        for flag in [*_FLAGS, f"--user-data-dir={profile}", *(["--force-dark-mode"] if dark else [])]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(found[1]))
        try:
            # A window can be no narrower than 500 pixels; what a page sees can.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            yield driver
        finally:
            driver.quit()


@contextmanager
def running_demo(model: str, seconds: float = 300) -> Iterator[str]:
    """The address of `poly-encoders demo` with this model, a folder, until the block ends.

    Raises:
        RuntimeError: it stopped, or did not answer in time; with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = forks.Process(["-m", "poly_encoders", "demo", model, *options], env=_environment())
    try:
        url, start = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(url):
            if process.poll() is not None or time.monotonic() - start > seconds:
                raise RuntimeError(f"The demo does not answer:\n{process.stderr.read()[-3000:]}")
            time.sleep(0.3)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def _environment() -> dict[str, str]:
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    return {name: value for name, value in os.environ.items() if name.lower() not in proxies}


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(url, timeout=5).status == 200
    except OSError:
        return False
