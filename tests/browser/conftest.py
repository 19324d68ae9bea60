"""A headless Chromium, and servers for its page: the real one with the demo model, and one whose answers a test writes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from fastvlm_edge.commands.demo import MODEL
from tests.browser.page_object import Page
from tests.browser.scripted import Script, make_scripted_app

BROWSERS = ("chromium", "google-chrome", "chromium-browser")
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
BOARD = "board.test"
"""Another name of 127.0.0.1 in the browser. Unlike localhost, it is not trusted without https."""
_FIXED = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,900",
    f"--host-resolver-rules=MAP {BOARD} 127.0.0.1",
)


_ANY_CERTIFICATE = ssl.create_default_context()
_ANY_CERTIFICATE.check_hostname, _ANY_CERTIFICATE.verify_mode = False, ssl.CERT_NONE


@contextmanager
def browser(*options: str) -> Iterator[webdriver.Chrome]:
    """Chromium with console and network logs. Skips the test if it is not installed."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium and its driver are not installed; make test-browser installs them")
    chosen = Options()
    chosen.binary_location = program
    for option in (*_FIXED, *options):
        chosen.add_argument(option)
    chosen.accept_insecure_certs = True
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=chosen, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    with browser(*FAKE_CAMERA) as started:
        yield started


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Page]:
    """The page, not opened yet. Afterwards: nothing went to another host, no policy was violated, and nothing failed in the console."""
    page = Page(chromium)
    page.forget_logs()
    yield page
    page.check_logs()
    page.leave()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


StartServer = Callable[..., str]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Start `fastvlm-edge serve` with the demo model and options; returns its address once it is ready."""
    running: list[subprocess.Popen[bytes]] = []
    cache = tmp_path_factory.mktemp("cache")

    def start(*options: str, scheme: str = "http") -> str:
        port = free_port()
        command = [sys.executable, "-m", "fastvlm_edge", "serve", str(MODEL), "--port", str(port), "--allowed-host", BOARD, *options]
        log = cache / f"{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env={**os.environ, "FASTVLM_EDGE_CACHE": str(cache)}, stdout=file, stderr=file)
        running.append(process)
        address = f"127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not _accepts(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        while _status(f"{scheme}://{address}/health") != 200:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return f"{scheme}://{address}/"

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(timeout=30)


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10, context=_ANY_CERTIFICATE) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="session")
def served(start_server: StartServer) -> str:
    """Address of a real server without further options."""
    return start_server()


@pytest.fixture
def script() -> Iterator[Script]:
    """A server whose answers the test writes."""
    script = Script()
    config = uvicorn.Config(make_scripted_app(script), host="127.0.0.1", port=free_port(), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    script.address = f"http://127.0.0.1:{config.port}/"
    while not server.started:
        time.sleep(0.01)
    yield script
    server.force_exit = server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="session")
def demo_question() -> tuple[Path, str]:
    """The picture of a meter and a question about it."""
    row = json.loads((MODEL.parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return MODEL.parent / row["image"], row["prompt"]
