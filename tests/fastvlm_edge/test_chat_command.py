"""`fastvlm-edge chat`, with questions from a pipe and in a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands import chat, demo
from tests.support.fake_model import build_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(demo.MODEL)
SHAPES, METER = str(demo.HOME / "shapes.jpg"), str(demo.HOME / "meter.jpg")
QUESTION, ANSWER = "What colour is the circle?", "purple"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastvlm_edge", "chat", *arguments]


def piped(text: str | bytes, *arguments: str, model: str = MODEL) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    typed = text.encode() if isinstance(text, str) else text
    done = subprocess.run(command(model, "-q", *arguments), cwd=ROOT, input=typed, capture_output=True, timeout=120, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# From a pipe --------------------------------------------------------------------------------------------------------------------


def test_one_line_per_answer() -> None:
    with FastVLM.load(MODEL, "ort") as vlm:
        talk = vlm.chat()
        asked = [(QUESTION, SHAPES), ("And\nnow?", None), (" /etc", METER), ("one\n\ntwo", None)]
        expected = [talk.ask(prompt, image).text for prompt, image in asked]
    typed = f'{QUESTION}\n\n   \nAnd\\\nnow?\n/image {METER}\n"""/etc"""\n"""\none\n\ntwo\n"""'
    assert piped(typed, "--image", SHAPES) == (0, "".join(f"{answer}\n" for answer in expected), "")


def test_options_reach_the_model() -> None:
    with FastVLM.load(MODEL, "ort") as vlm:
        options = {"temperature": 1.5, "seed": 4, "max_new_tokens": 5}
        expected = vlm.chat(system="Guess.").ask(QUESTION, SHAPES, **options).text  # type: ignore[arg-type]
    words = ("--image", SHAPES, "--system", "Guess.", "--temperature", "1.5", "--seed", "4", "--max-new-tokens", "5")
    assert piped(QUESTION, *words) == (0, f"{expected}\n", "")


def test_an_error_does_not_end_the_chat() -> None:
    typed = f"/image gone.png\n/nope\n/save\n/reset now\n/load gone.json\n{'word ' * 9000}\n/image {SHAPES}\n{QUESTION}\n/quit\nnever asked"
    status, out, err = piped(typed)
    assert (status, out) == (1, f"{ANSWER}\n")
    expected = (
        "gone.png does not exist",
        "no command /nope",
        "/save needs the name",
        "/reset takes nothing",
        "gone.json does not exist",
        "no room",
    )
    for line, says in zip(err.splitlines(), expected, strict=True):
        assert line.startswith("error: ") and says in line


def test_text_that_is_not_utf8_is_an_error_of_its_question() -> None:
    status, out, err = piped(b"\xff?\n/image " + SHAPES.encode() + b"\n" + QUESTION.encode())
    assert (status, out) == (1, f"{ANSWER}\n") and "not valid Unicode" in err


def test_a_failed_question_keeps_its_pictures() -> None:
    status, out, err = piped(f"{'word ' * 9000}\n{QUESTION}\n", "--image", SHAPES)
    assert (status, out) == (1, f"{ANSWER}\n") and "no room" in err


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    status, out, _ = piped(f"{QUESTION}\n/save {path}\nWhy?\n", "--image", SHAPES)
    assert status == 0
    assert piped(f"/load '{path}'\nWhy?\n/reset\n/image {SHAPES}\n{QUESTION}") == (0, f"{out.splitlines()[1]}\n{ANSWER}\n", "")


def test_several_pictures_as_in_a_shell(tmp_path: Path) -> None:
    spaced = tmp_path / "a picture.jpg"
    spaced.write_bytes(Path(SHAPES).read_bytes())
    with FastVLM.load(MODEL, "ort") as vlm:
        expected = vlm.generate(QUESTION, [SHAPES, METER]).text
    for line in (
        f"/image '{spaced}' {METER}",
        f"/image {str(spaced).replace(' ', chr(92) + ' ')} {METER}",
        f"/image {spaced}\n/image {METER}",
    ):
        assert piped(f"{line}\n{QUESTION}") == (0, f"{expected}\n", "")


def test_a_full_context_slides_if_it_may(tmp_path: Path) -> None:
    model = str(build_model(tmp_path / "model", context=160))
    typed = "What is it?\n" * 12
    status, _, err = piped(typed, "--max-new-tokens", "12", model=model)
    assert status == 1 and "no room for a reply in the context of 160" in err
    done = subprocess.run(
        command(model, "--slide", "--max-new-tokens", "12"), cwd=ROOT, input=typed, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "error" not in done.stderr
    assert "[the context was full: the oldest turn left the conversation]" in done.stderr.replace("1 turn", "turn")


def test_what_is_wrong_is_said_before_the_model_loads() -> None:
    status, _, err = piped("", "--image", "gone.png", model="/gone")
    assert status == 1 and "gone.png" in err
    status, _, err = piped("", "--top-k", "3")
    assert status == 1 and "--top-k without --temperature" in err


# In a terminal ------------------------------------------------------------------------------------------------------------------


class Screen:
    """A command in a pseudo-terminal of its own, and what it shows."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern is shown; returns what was shown up to its end, and forgets it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern} is not in {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.master, 1 << 16)
                except OSError:  # the last process has closed it
                    piece = b""
                assert piece, f"{pattern} is not in {self.shown!r}, and the command has ended"
                self.shown += piece.decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def wait_for_sleep(self) -> None:
        """Wait until the main thread waits for a key: between its prompt and that, Python notices a signal only at the next key."""
        stat = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        asleep = 0
        while asleep < 5:
            asleep = asleep + 1 if stat.read_text().rpartition(") ")[2].startswith("S") else 0
            time.sleep(0.02)

    def interrupt_at_prompt(self) -> None:
        self.wait_for_sleep()
        self.type("\x03")

    def leave(self, seconds: float = 60) -> int:
        """Read to the end, and return the exit status."""
        with_end = time.monotonic() + seconds
        while time.monotonic() < with_end:
            try:
                piece = os.read(self.master, 1 << 16)
            except OSError:
                break
            self.shown += piece.decode(errors="replace")
        return self.process.wait(timeout=seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


Start = Callable[..., Screen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a chat in a terminal, with `tmp_path/state` for its history."""
    screens: list[Screen] = []

    def begin(*arguments: str, model: str = MODEL, **environment: str) -> Screen:
        screens.append(Screen(command(model, *arguments), {"XDG_STATE_HOME": str(tmp_path / "state"), **environment}))
        return screens[-1]

    yield begin
    for screen in screens:
        screen.close()


def test_a_conversation_in_a_terminal(start: Start, tmp_path: Path) -> None:
    screen = start("--image", SHAPES)
    screen.wait_for(r"\[/help lists the commands\]\s+> ")
    screen.type(f"{QUESTION}\n")
    assert ANSWER in screen.wait_for(r"\n> ")
    screen.type("/help\n")
    screen.wait_for(r"/image FILE(.|\n)*> ")
    screen.type(f"/save {tmp_path / 'chat.json'}\n")
    screen.wait_for(r"\[saved 1 turn in .*\]\s+> ")
    screen.type("/reset\n")
    screen.wait_for(r"\[a new conversation\]\s+> ")
    screen.type(f"/load {tmp_path / 'chat.json'}\n")
    assert f"> {QUESTION}\r\n{ANSWER}\r\n" in screen.wait_for(r"\[1 turn, \d+ of 2048 tokens\]\s+> ")
    screen.type('"""\nIs it\n')
    screen.wait_for(r"Is it\s+\. ")
    screen.type('red?\n"""\n')
    screen.wait_for(r"\n> ")
    screen.type("/quit\n")
    assert screen.leave() == 0


def test_ctrl_d_leaves(start: Start) -> None:
    screen = start()
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.leave() == 0 and "Traceback" not in screen.shown


def test_ctrl_c_clears_the_line_and_twice_leaves(start: Start) -> None:
    screen = start("--image", SHAPES)
    screen.wait_for("> ")
    screen.type("/nonsense")
    screen.wait_for("/nonsense")
    screen.interrupt_at_prompt()
    screen.wait_for(r"\[Ctrl-C once more, Ctrl-D or /quit leaves\]\s+> ")
    screen.type(f"{QUESTION}\n")
    shown = screen.wait_for(r"\n> ")
    assert ANSWER in shown and "nonsense" not in shown
    screen.interrupt_at_prompt()
    screen.wait_for(r"leaves\]\s+> ")
    screen.interrupt_at_prompt()
    assert screen.leave() == 130 and "Traceback" not in screen.shown


def test_ctrl_c_stops_the_answer_and_not_the_program(start: Start, tmp_path: Path) -> None:
    model = str(build_model(tmp_path / "model", context=30_000))
    screen = start("--max-new-tokens", "29000", "--temperature", "1.5", "--seed", "1", "--no-history", model=model)
    screen.wait_for("> ")
    for _ in range(3):
        screen.type("Tell me everything.\n")
        screen.wait_for(r"Tell me everything\.\s+\S")
        screen.type("\x03")
        screen.wait_for(r"\[stopped\]\s+> ", 20)
    screen.type(f"/save {tmp_path / 'chat.json'}\n")
    screen.wait_for(r"\[saved 3 turns")
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert sum(len(turn["reply_ids"]) for turn in saved["turns"]) < 29_000
    screen.type("/quit\n")
    assert screen.leave() == 0 and "Traceback" not in screen.shown


@pytest.mark.parametrize("answering", [True, False])
def test_a_signal_that_ends_a_command_ends_the_chat(start: Start, tmp_path: Path, answering: bool) -> None:
    model = str(build_model(tmp_path / "model", context=30_000))
    screen = start("--max-new-tokens", "29000", "--temperature", "1.5", "--seed", "1", model=model)
    screen.wait_for("> ")
    if answering:
        screen.type("Tell me everything.\n")
        screen.wait_for(r"Tell me everything\.\s+\S")
    else:
        screen.wait_for_sleep()
    screen.process.send_signal(signal.SIGTERM)
    assert screen.leave() == 143 and "Traceback" not in screen.shown


def test_what_was_typed_comes_back(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    history = tmp_path / "state" / "fastvlm-edge" / "chat_history"
    for arguments, kept in ((("--no-history",), False), ((), True)):
        screen = start(*arguments)
        screen.wait_for("> ")
        screen.type("/quit\n")
        assert screen.leave() == 0 and history.is_file() is kept
    assert "/quit" in history.read_text() and history.stat().st_mode & 0o77 == 0
    screen = start(TERM="xterm")
    screen.wait_for("> ")
    screen.type("\x1b[A")  # up
    screen.wait_for("/quit")
    screen.type("\n")
    assert screen.leave() == 0


def test_a_home_that_cannot_be_written_is_no_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    screen = start(XDG_STATE_HOME=str(tmp_path / "file" / "state"))
    screen.wait_for("> ")
    screen.type("/quit\n")
    assert screen.leave() == 0 and "rror" not in screen.shown


def test_replies_that_go_to_a_file(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "replies.txt"
    line = 'exec "$0" -m fastvlm_edge chat "$1" --image "$2" > "$3"'
    screen = Screen(["sh", "-c", line, sys.executable, MODEL, SHAPES, str(out)], {"XDG_STATE_HOME": str(tmp_path)})
    try:
        screen.wait_for("> ")
        screen.type(f"{QUESTION}\n")
        screen.wait_for(r"\n> ")
        screen.type("\x04")
        assert screen.leave() == 0 and out.read_text() == f"{ANSWER}\n"
    finally:
        screen.close()


def test_the_help_names_every_command() -> None:
    for name in ("image", "save", "load", "reset", "help", "quit"):
        assert f"\n/{name} " in f"\n{chat.HELP}"
