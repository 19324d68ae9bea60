"""What a person does on the page, and what stands on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")
SECONDS = 30


class Page:
    """The page in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.address = ""
        self.expects_refusals = False
        """Whether responses with an error status, which Chromium writes to the console, are what the test is about."""

    def open(self, address: str, *, ready: bool = True) -> Page:
        self.address = address
        self.driver.get(address)
        if ready:
            self.wait(lambda: self.element("health").text == "Ready" and self.element("model").text)
        return self

    def leave(self) -> None:
        """Close the connections of the page and forget what it has stored."""
        if self.address:
            self.script("localStorage.clear(); sessionStorage.clear()")
        self.driver.get("about:blank")

    # What stands there

    def element(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements, read at one moment."""
        texts: list[str] = self.script("return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector)
        return texts

    @property
    def answers(self) -> list[str]:
        """The answers, those of the newest conversation first."""
        return self.texts(".turn .answer")

    @property
    def notice(self) -> str:
        """The fault that stands above the question, or an empty text."""
        return self.element("notice").text

    @property
    def is_busy(self) -> bool:
        return self.element("stop").is_displayed()

    @property
    def is_wider_than_the_window(self) -> bool:
        return bool(self.script("return document.scrollingElement.scrollWidth > document.documentElement.clientWidth"))

    # What a person does

    def click(self, name: str) -> None:
        self.element(name).click()

    def upload(self, path: Path) -> None:
        before = self.element("still").get_attribute("src")
        self.element("file").send_keys(str(path))
        self.wait(lambda: self.notice or (self.element("still").is_displayed() and self.element("still").get_attribute("src") != before))

    def start_camera(self) -> None:
        self.click("camera")
        self.wait(lambda: self.script("return document.getElementById('video').videoWidth > 0"))

    def ask(self, question: str, *, wait: bool = True) -> None:
        box = self.element("question")
        box.clear()
        box.send_keys(question)
        self.click("send")
        if wait:
            self.wait(lambda: not self.is_busy)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, name: str) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(40):
            if self.script("return document.activeElement.id") == name:
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{name} cannot be reached with Tab")

    # The browser

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def wait(self, condition: Callable[[], T], seconds: float = SECONDS) -> T:
        """What a condition gives as soon as it is true."""
        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: condition(), f"on the page: {self._content()}")

    def _content(self) -> str:
        return " | ".join(self.texts("#health, #notice, .turn"))

    def use_width(self, width: int, height: int = 740) -> None:
        """Behave as a phone of this width, in CSS pixels. 0: the window again."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        if width:
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        else:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def prefer(self, scheme: str) -> None:
        """Tell the page that the user prefers "dark" or "light"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def forget_logs(self) -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")

    def check_logs(self) -> None:
        """Nothing went to another host, no policy was violated, and nothing failed in the console."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert urls, "the log of requests is empty"
        own = urlsplit(self.address).netloc
        assert [url for url in urls if not url.startswith(("data:", "about:")) and urlsplit(url).netloc != own] == []
        messages = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        if self.expects_refusals:
            messages = [text for text in messages if "Failed to load resource" not in text]
        assert messages == []
