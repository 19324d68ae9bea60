"""The page with a server whose answers are written down: what it sends, and what it shows when something goes wrong."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from tests.browser.page_object import Page
from tests.browser.scripted import DECODING_MS, IMAGE_SIZE, Reply, Script

pytestmark = pytest.mark.browser

DROP = """
const [name, type, base64, how] = arguments;
const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type }));
const options = { bubbles: true, cancelable: true };
const pasted = () => new ClipboardEvent("paste", { ...options, clipboardData: transfer });
const dropped = () => new DragEvent("drop", { ...options, dataTransfer: transfer });
document.body.dispatchEvent(how === "paste" ? pasted() : dropped());
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A picture that the model takes as it is."""
    path = tmp_path / "small.png"
    Image.new("RGB", (64, 48), "teal").save(path)
    return path


# Pictures ---------------------------------------------------------------------------------------------------------------


def test_a_small_picture_is_sent_byte_for_byte(page: Page, script: Script, small: Path) -> None:
    page.open(script.address).upload(small)
    page.ask("What is it?")
    assert script.url() == f"data:image/png;base64,{base64.b64encode(small.read_bytes()).decode()}"
    (message,) = script.bodies[0]["messages"]
    assert message["content"][1] == {"type": "text", "text": "What is it?"} and script.bodies[0]["stream"]


def test_a_large_picture_is_reduced_upright_and_on_white(page: Page, script: Script, tmp_path: Path) -> None:
    pixels = np.zeros((600, 900, 4), np.uint8)
    pixels[:, :450] = (255, 0, 0, 255)  # the right half is transparent
    Image.fromarray(pixels).save(tmp_path / "half.png")
    turned = Image.new("RGB", (1200, 800), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: its left edge is up
    turned.save(tmp_path / "turned.jpg", exif=exif)
    page.open(script.address).upload(tmp_path / "half.png")
    page.ask("What is it?")
    sent = script.picture()
    assert (sent.format, sent.size) == ("JPEG", (IMAGE_SIZE, round(600 * IMAGE_SIZE / 900)))
    pixels = np.asarray(sent)
    assert pixels[100, 400].min() > 250 and pixels[100, 100, 0] > 240 and pixels[100, 100, 1:].max() < 15
    page.upload(tmp_path / "turned.jpg")
    page.ask("And this?")
    assert script.picture().size == (round(800 * IMAGE_SIZE / 1200), IMAGE_SIZE)


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_can_be_pasted_and_dropped(page: Page, script: Script, small: Path, how: str) -> None:
    page.open(script.address)
    content = base64.b64encode(small.read_bytes()).decode()
    page.script(DROP, "small.png", "image/png", content, how)
    page.wait(lambda: page.element("still").is_displayed())
    page.ask("What is it?")
    assert script.url().endswith(content)


def test_a_frame_of_the_camera_is_no_larger_than_the_model_can_use(page: Page, script: Script) -> None:
    page.open(script.address).start_camera()
    page.ask("What is it?")
    assert max(script.picture().size) == IMAGE_SIZE and script.picture().format == "JPEG"


def test_what_is_no_picture_is_said_and_a_question_needs_one(page: Page, script: Script, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    page.open(script.address).upload(tmp_path / "notes.txt")
    assert "cannot read notes.txt" in page.notice
    page.ask("What is it?")
    assert "First choose a picture" in page.notice and script.bodies == []


# Conversations ----------------------------------------------------------------------------------------------------------


def test_the_whole_conversation_is_sent_and_an_earlier_picture_can_be_asked_about_again(
    page: Page, script: Script, small: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32), "red").save(other)
    page.open(script.address).upload(small)
    page.ask("One?")
    page.ask("Two?")
    assert [message["role"] for message in script.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert script.bodies[-1]["messages"][1:] == [{"role": "assistant", "content": "An answer."}, {"role": "user", "content": "Two?"}]
    page.upload(other)
    page.ask("Three?")
    assert len(script.bodies[-1]["messages"]) == 1 and script.picture().size == (32, 32)
    assert page.texts(".asked") == ["Three?", "One?", "Two?"]
    page.all(".again")[1].click()
    page.ask("Four?")
    assert len(script.bodies[-1]["messages"]) == 5 and script.picture().size == (64, 48)
    page.click("clear")
    assert page.answers == [] and page.element("nothing").is_displayed()
    page.ask("Five?")
    assert len(script.bodies[-1]["messages"]) == 1 and script.picture().size == (64, 48)


def test_a_preset_asks_its_question(page: Page, script: Script, small: Path) -> None:
    page.open(script.address).upload(small)
    page.all(".presets button")[2].click()
    page.wait(lambda: script.bodies and not page.is_busy)
    assert page.texts(".asked") == ["What does the meter read?"] and page.answers == ["An answer."]


def test_an_answer_appears_while_it_is_written_and_can_be_stopped(page: Page, script: Script, small: Path) -> None:
    script.then(Reply(tuple(f"word{index} " for index in range(200)), pause=0.05))
    page.open(script.address).upload(small)
    page.ask("Tell me all.", wait=False)
    page.wait(lambda: page.answers and "word3" in page.answers[0])
    figures = page.texts(".figures")[0]
    assert "first token" in figures and "tokens/s" in figures, "while it is written"
    page.click("stop")
    page.wait(lambda: not page.is_busy)
    assert page.answers[0].startswith("word0 word1 ") and "word199" not in page.answers[0]
    assert page.texts(".figures")[0].endswith("stopped")
    page.wait(lambda: script.gone == 1)
    script.then(Reply())
    page.ask("And then?")
    assert script.bodies[-1]["messages"][1]["content"] == page.answers[0]


def test_figures_are_those_of_the_server(page: Page, script: Script, small: Path) -> None:
    script.then(Reply(("one", " two", " three"), pause=0.1))
    page.open(script.address).upload(small)
    page.ask("Count.")
    assert page.texts(".figures")[0].endswith(f"{2e3 / DECODING_MS} tokens/s · 3 tokens · 4 prompt tokens cached")


def test_continuous_mode_counts_equal_answers_and_keeps_different_ones(page: Page, script: Script) -> None:
    same = Reply(("17",))
    script.then(same, same, Reply(("18",)), Reply(("18",), pause=600))
    page.open(script.address).start_camera()
    page.click("continuous")
    page.script("document.getElementById('interval').value = '0'")
    page.ask("What does it read?", wait=False)
    page.wait(lambda: len(script.bodies) == 4)
    first, second = page.texts(".earlier li")
    assert first.endswith("18") and second.endswith("17 (2 times)")
    assert {len(body["messages"]) for body in script.bodies} == {1}
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.is_busy)


# Faults -----------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_after_the_time_it_names(page: Page, script: Script, small: Path) -> None:
    page.expects_refusals = True
    script.then(Reply(status=429, retry_after=2), Reply(status=503), Reply())
    page.open(script.address).upload(small)
    page.ask("What is it?", wait=False)
    page.wait(lambda: "The server is busy. It is asked again in 2 s." in page.texts(".figures"))
    page.wait(lambda: not page.is_busy)
    assert page.answers == ["An answer."] and len(script.bodies) == 3
    script.then(Reply(status=429, retry_after=60))
    page.ask("Again?", wait=False)
    page.wait(lambda: any("60 s" in text for text in page.texts(".figures")))
    page.click("stop")
    page.wait(lambda: not page.is_busy)


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (Reply(status=413, message="4.1 MB is more than 2 MB"), "The picture is too large for this server. 4.1 MB is more than 2 MB"),
        (Reply(status=400, message="The question has 900 tokens"), "The question has 900 tokens"),
        (Reply(("Half an",), fault="the GPU is gone"), "Half an\nthe GPU is gone"),
        (Reply(("Half an",), breaks=True), "Half an\nThe connection broke before the answer was complete."),
    ],
)
def test_a_fault_is_said_in_words_and_the_next_question_works(page: Page, script: Script, small: Path, reply: Reply, shown: str) -> None:
    page.expects_refusals = True
    script.then(reply, Reply())
    page.open(script.address).upload(small)
    page.ask("What is it?")
    assert page.answers == [shown] and len(page.all(".failed")) == 1
    page.ask("And now?")
    assert page.answers[1] == "An answer."


def test_a_server_that_loads_or_is_gone_is_said_and_watched(page: Page, script: Script, small: Path) -> None:
    page.expects_refusals = True
    script.health = 503
    page.open(script.address, ready=False)
    page.wait(lambda: page.element("health").text == "The model is loading …")
    script.health = 200
    page.wait(lambda: page.element("health").text == "Ready")
    page.upload(small)
    page.script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.ask("What is it?")
    assert page.answers == ["The server does not answer. Check that it is running."]
    page.wait(lambda: page.element("health").text == "The server does not answer")


# People -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 360, 412])
def test_nothing_is_wider_than_a_phone(page: Page, script: Script, small: Path, width: int) -> None:
    script.then(Reply(("A-word-without-any-space" * 20,)))
    page.use_width(width)
    try:
        page.open(script.address)
        assert not page.is_wider_than_the_window
        page.start_camera()
        page.click("continuous")
        assert not page.is_wider_than_the_window
        page.click("continuous")
        page.upload(small)
        page.ask("What-is-it-" * 30)
        assert page.answers and not page.is_wider_than_the_window
        targets = "return [...document.querySelectorAll('button, select')].map((each) => each.offsetHeight)"
        assert all(height == 0 or height >= 32 for height in page.script(targets)), "too small for a finger"
    finally:
        page.use_width(0)


def test_everything_can_be_done_with_the_keyboard(page: Page, script: Script, small: Path) -> None:
    script.then(Reply(tuple("abcdefgh"), pause=0.2))
    page.open(script.address).upload(small)
    page.tab_to("camera")
    page.press(Keys.ENTER)
    page.wait(lambda: page.element("video").is_displayed())
    page.tab_to("question")
    page.press("What is it?")
    page.press(Keys.ENTER)
    assert script.bodies == [], "Enter begins a new line"
    page.element("question").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.answers and page.answers[0])
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.is_busy)
    assert page.texts(".figures")[0].endswith("stopped")
    page.tab_to("send")
    page.press(Keys.ENTER)
    page.wait(lambda: page.is_busy)
    assert page.script("return document.activeElement.id") == "stop"
    page.press(Keys.ENTER)
    page.wait(lambda: not page.is_busy)
    assert page.script("return document.activeElement.id") == "question"
    page.tab_to("clear")
    page.press(Keys.SPACE)
    assert page.answers == []


def test_a_screen_reader_hears_whole_answers(page: Page, script: Script, small: Path) -> None:
    page.open(script.address).upload(small)
    page.script("window.heard = []; new MutationObserver(() => heard.push(said.textContent)).observe(said, { childList: true })")
    page.ask("What is it?")
    assert page.script("return heard") == ["An answer."]
    names = page.script("return [...document.querySelectorAll('button')].map((each) => each.ariaLabel || each.textContent.trim())")
    assert all(names) and len(names) >= 8


def test_light_and_dark_follow_the_system_until_one_is_chosen(page: Page, script: Script) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    light = page.open(script.address).script(ground)
    page.prefer("dark")
    dark = page.script(ground)
    assert light != dark
    page.click("theme")
    assert page.script(ground) == light
    page.open(script.address)
    assert page.script(ground) == light, "it is kept"
    page.prefer("")


def test_what_a_model_or_server_says_is_text_and_never_html(page: Page, script: Script, small: Path) -> None:
    script.then(Reply(("<img src=x onerror=alert(1)>", "<b>bold</b>")))
    page.open(script.address).upload(small)
    page.ask("<script>alert(1)</script>")
    assert page.answers == ["<img src=x onerror=alert(1)><b>bold</b>"] and page.texts(".asked") == ["<script>alert(1)</script>"]
    assert page.all(".turn b") == []
