"""NVIDIA's live-vlm-webui, as it is: an answer of the demo model about a frame of the camera appears in its page."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import MODEL
from tests.browser.conftest import FAKE_CAMERA, browser, free_port

pytestmark = pytest.mark.clients
T = TypeVar("T")


@contextmanager
def live_vlm_webui(program: Path, home: Path, *options: str) -> Iterator[str]:
    """The program with a certificate of its own; gives the address of its page."""
    port = free_port()
    fixed = ("--host", "127.0.0.1", "--port", str(port), "--ssl-cert", str(home / "cert.pem"), "--ssl-key", str(home / "key.pem"))
    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([program, *fixed, *options], env={**os.environ, "HOME": str(home)}, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not _accepts(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"https://127.0.0.1:{port}/"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # it waits for open connections
            process.kill()
            process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_camera_is_answered_in_its_page(clients: Path, served: str, demo_question: tuple[Path, str], tmp_path: Path) -> None:
    picture, question = demo_question
    base = f"{served}v1"
    camera = tmp_path / "camera.mjpeg"
    camera.write_bytes(picture.read_bytes())  # a film of one picture, again and again
    options = ("--api-base", base, "--model", "fastvlm-demo", "--prompt", question)
    with (
        browser(*FAKE_CAMERA, f"--use-file-for-fake-video-capture={camera}") as driver,
        live_vlm_webui(clients / "live-vlm-webui", tmp_path, *options) as address,
    ):
        # The page takes its icons from another host, and stops without them. They are left out if that host cannot be reached.
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": "window.lucide ??= {createIcons() {}}"})
        driver.get(address)
        _wait(driver, lambda: _text(driver, "connectionStatus").lower() == "connected")
        field = driver.find_element(By.ID, "apiBaseUrl")
        _wait(driver, lambda: field.get_attribute("value") == base)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(base, Keys.ENTER)
        _wait(driver, lambda: _text(driver, "modelSelect").strip() == "fastvlm-demo")
        driver.find_element(By.ID, "bigStartBtn").click()
        expected = FastVLM.load(MODEL, "ort").generate(question, image=picture).text
        _wait(driver, lambda: _text(driver, "resultTextContent") == expected)
        assert int(_text(driver, "countValue")) > 0


def _text(driver: webdriver.Chrome, name: str) -> str:
    return driver.find_element(By.ID, name).text


def _wait(driver: webdriver.Chrome, condition: Callable[[], T]) -> T:
    return WebDriverWait(driver, 60, poll_frequency=0.1).until(
        lambda _: condition(), f"{_text(driver, 'connectionStatus')}: {_text(driver, 'resultTextContent')}"
    )
