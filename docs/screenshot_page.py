"""Photographs the page that README shows: `python -m docs.screenshot_page` asks the demo model in headless Chromium.

It writes docs/images/page.png and docs/images/page-dark.png.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from PIL import Image

from fastvlm_edge.commands.demo import HOME, MODEL, QUESTIONS
from tests.browser.conftest import browser
from tests.browser.page_object import Page

IMAGES = Path(__file__).resolve().parent / "images"
SIZE = (1180, 760)
LARGEST = 150_000
"""Bytes of a picture in the repository."""
FOLLOW_UP = "What colour is the circle?"


def ask_all(page: Page) -> None:
    """The three questions of the demo, and one more about the last picture."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        page.upload(HOME / row["image"])
        page.ask(row["prompt"])
    page.ask(FOLLOW_UP)
    page.element("question").clear()
    page.script("document.activeElement.blur(); scrollTo(0, 0)")


def photograph(page: Page, path: Path) -> None:
    """Write what the window shows, with the 256 colours that fit best."""
    picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST, f"{path} has {path.stat().st_size} bytes"


def main() -> int:
    """Photograph the page in light and in dark."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "fastvlm_edge", "serve", str(MODEL), "--port", str(port)], env=dict(os.environ))
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{address}health").close()
                break
            time.sleep(0.1)
        with browser() as driver:
            page = Page(driver)
            metrics = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            page.prefer("light")
            ask_all(page.open(address))
            photograph(page, IMAGES / "page.png")
            page.prefer("dark")
            photograph(page, IMAGES / "page-dark.png")
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
