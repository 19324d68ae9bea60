"""The page with the real server and the demo model: its answers are those of `FastVLM.generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import MODEL
from tests.browser.conftest import BOARD, StartServer, browser
from tests.browser.page_object import Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def vlm() -> FastVLM:
    return FastVLM.load(MODEL, "ort")


def test_an_uploaded_picture_gets_the_answer_of_generate(page: Page, served: str, demo_question: tuple[Path, str], vlm: FastVLM) -> None:
    picture, question = demo_question
    page.open(served).upload(picture)
    page.ask(question)
    assert page.answers == [vlm.generate(question, image=picture).text]
    (figures,) = page.texts(".figures")
    assert "first token" in figures and "2 tokens" in figures
    assert page.texts("#model")[0].startswith("fastvlm-demo")


def test_a_second_question_is_about_the_same_picture_and_knows_the_first(
    page: Page, served: str, demo_question: tuple[Path, str], vlm: FastVLM
) -> None:
    picture, question = demo_question
    page.open(served).upload(picture)
    page.ask(question)
    page.ask("What colour is the needle?")
    chat = vlm.chat()
    assert page.answers == [chat.ask(question, image=picture).text, chat.ask("What colour is the needle?").text]
    assert len(page.all(".conversation")) == 1
    assert "prompt tokens cached" in page.texts(".figures")[1]


def test_a_frame_of_the_camera_is_asked_about_and_stays_until_the_camera_is_wanted_again(page: Page, served: str) -> None:
    page.open(served).start_camera()
    page.ask("Describe this picture.")
    assert page.answers[0]
    assert page.element("still").is_displayed() and not page.element("video").is_displayed()
    page.ask("Count the objects.")
    assert len(page.all(".conversation")) == 1
    page.click("camera")
    page.wait(lambda: page.element("video").is_displayed())
    page.ask("Count the objects.")
    assert len(page.all(".conversation")) == 2
    page.click("camera")
    page.click("camera")
    assert page.element("empty").is_displayed()
    assert page.script("return document.getElementById('video').srcObject") is None


def test_continuous_mode_asks_about_new_frames_until_it_is_stopped(page: Page, served: str) -> None:
    page.open(served).start_camera()
    page.click("continuous")
    page.script("document.getElementById('interval').value = '0'")
    sent: list[str] = []

    def several() -> bool:
        src = page.script("return document.querySelector('.again img')?.src")
        if src and src not in sent:
            sent.append(src)
        return len(sent) >= 3 and bool(page.texts(".earlier li"))

    page.ask("What number is shown?", wait=False)
    page.wait(several)
    page.click("stop")
    page.wait(lambda: not page.is_busy)
    assert len(page.all(".conversation")) == 1 and page.element("video").is_displayed()


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, start_server: StartServer, demo_question: tuple[Path, str]) -> None:
    page.expects_refusals = True
    address = start_server("--api-key", "secret")
    page.open(address, ready=False)
    page.wait(lambda: page.element("key-form").is_displayed())
    page.element("key").send_keys("wrong\n")
    page.wait(lambda: page.element("key-form").is_displayed() and not page.element("key").get_attribute("value"))
    page.element("key").send_keys("secret\n")
    page.wait(lambda: page.element("model").text.startswith("fastvlm-demo") and not page.element("key-form").is_displayed())
    page.open(address).upload(demo_question[0])
    page.ask(demo_question[1])
    assert page.answers == ["17"]


def test_a_self_signed_certificate_gives_the_camera_to_a_page_that_is_not_on_localhost(page: Page, start_server: StartServer) -> None:
    address = start_server("--tls", "self-signed", scheme="https").replace("127.0.0.1", BOARD)
    page.open(address).start_camera()
    page.ask("Describe this picture.")
    assert page.answers[0]


def test_without_https_the_page_says_why_there_is_no_camera_and_works_with_pictures(
    page: Page, served: str, demo_question: tuple[Path, str]
) -> None:
    page.open(served.replace("127.0.0.1", BOARD)).click("camera")
    assert "only to pages on https or localhost" in page.notice and "--tls self-signed" in page.notice
    assert f"ssh -L {served.split(':')[-1].strip('/')}:localhost" in page.notice
    page.upload(demo_question[0])
    page.ask(demo_question[1])
    assert page.answers == ["17"] and not page.notice


def test_a_camera_that_is_missing_or_not_allowed_is_said_in_words(served: str) -> None:
    with browser() as driver:
        page = Page(driver).open(served)
        page.click("camera")
        page.wait(lambda: page.notice)
        assert "no camera" in page.notice or "not allowed" in page.notice
    with browser("--use-fake-device-for-media-stream", "--deny-permission-prompts") as driver:
        page = Page(driver).open(served)
        page.click("camera")
        page.wait(lambda: "not allowed" in page.notice)
