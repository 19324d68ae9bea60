"""`fastvlm-edge chat`: a conversation in the terminal, or with questions from a pipe; the replies go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from fastvlm_edge.commands.run import ENDS, MODEL_HELP, add_loading_options, add_reply_options, load, sampling_options
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.chat import Chat
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.image_input import load_rgb
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.cache_dir import state_dir
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import SilentProgress, stderr_progress

PROMPT, MORE = "> ", ". "
HISTORY_LINES = 1000
HELP = """/image FILE...  show pictures with the next question
/save FILE      write the conversation to a file
/load FILE      continue a conversation that was saved
/reset          begin a new conversation
/help           this list
/quit           leave; so does Ctrl-D

A line that ends in \\ goes on in the next one. Everything from three quotes to three quotes is one question.
A question whose first character is / begins with a space. Ctrl-C stops an answer; typed twice at the prompt, it leaves."""


def main(arguments: Sequence[str]) -> int:
    """Chat until the input ends. Returns 1 if a line of a pipe failed, because nobody saw it."""
    options = parser().parse_args(arguments)
    sampling = sampling_options(options)
    to_colour(options.background)
    names = [name for group in options.image or [] for name in group]
    for name in names:
        load_rgb(name, options.background)  # loading a model may take minutes

    def check(manifest: Manifest, tokenizer: TextTokenizer) -> None:
        ChatTemplate(tokenizer, manifest).opening(options.system)

    with load(options, SilentProgress() if options.quiet else stderr_progress(), check) as vlm:
        terminal = Terminal(history=not options.no_history)
        return Conversation(vlm, terminal, options, sampling, names).run()


class Conversation:
    """The chat of a terminal or a pipe."""

    def __init__(self, vlm: FastVLM, terminal: Terminal, options: argparse.Namespace, sampling: dict[str, Any], images: list[str]) -> None:
        self._vlm, self._terminal, self._sampling = vlm, terminal, sampling
        self._background, self._quiet = options.background, options.quiet
        self._chat = vlm.chat(system=options.system, context="slide" if options.slide else "error")
        self._images = images
        """Pictures for the next question."""
        self._failed = False

    def run(self) -> int:
        """Answer line by line until the input ends."""
        with self._terminal:
            if self._terminal.interactive:
                self._note("/help lists the commands")
            interrupted = False
            while True:
                try:
                    text = self._terminal.read()
                    interrupted = False
                    if text is None or not self._take(text):
                        break
                except KeyboardInterrupt:
                    if not self._terminal.took_interrupt() or interrupted:
                        raise
                    interrupted = True
                    print(flush=True)
                    self._note("Ctrl-C once more, Ctrl-D or /quit leaves")
        return 1 if self._failed and not self._terminal.interactive else 0

    def _take(self, text: str) -> bool:
        """Do what a line says. Returns whether the chat goes on."""
        try:
            if text.startswith("/"):
                return self._command(*text.rstrip().partition(" ")[::2])
            if text.strip():
                self._ask(text)
        except FastVLMError as error:
            self._failed = True
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return True

    def _command(self, name: str, rest: str) -> bool:
        rest = rest.strip()
        if name in ("/image", "/save", "/load"):
            if not rest:
                raise FastVLMError(f"{name} needs the name of a file", f"type {name} FILE")
            getattr(self, f"_{name[1:]}")(rest)
        elif name not in ("/reset", "/help", "/quit"):
            raise FastVLMError(f"there is no command {name}", "type /help, or begin the line with a space if it is a question")
        elif rest:
            raise FastVLMError(f"{name} takes nothing, and {rest!r} was given", f"type {name}")
        elif name == "/reset":
            self._chat.reset()
            self._images = []
            self._note("a new conversation")
        elif name == "/help":
            print(HELP, file=sys.stderr, flush=True)
        return name != "/quit"

    def _image(self, text: str) -> None:
        names = _names(text)
        for name in names:
            load_rgb(name, self._background)
        self._images += names
        self._note(f"{len(self._images)} picture{'s' * (len(self._images) != 1)} with the next question")

    def _save(self, text: str) -> None:
        name = _name(text)
        self._chat.save(name)
        self._note(f"saved {_turns(len(self._chat.turns))} in {name}")

    def _load(self, text: str) -> None:
        self._chat = self._vlm.load_chat(_name(text))
        if self._terminal.interactive:
            for turn in self._chat.turns:
                print(f"{PROMPT}{turn.prompt}\n{turn.reply}", flush=True)
        self._note(f"{_turns(len(self._chat.turns))}, {self._chat.token_count} of {self._vlm.manifest.decoder.context} tokens")

    def _ask(self, text: str) -> None:
        stream = self._chat.stream(text, list(self._images), **self._sampling)
        began = False
        try:
            with self._terminal.interrupt_cancels(self._chat):
                for piece in stream:
                    began = True
                    print(piece, end="", flush=True)
        except BaseException:
            if began:
                print(flush=True)
            raise
        stopped = self._terminal.took_interrupt()
        if began or not stopped:  # otherwise the question is not part of the conversation
            self._images = []
        print(flush=True)
        if stopped:
            self._note("stopped")
            return
        reply = stream.reply
        if reply.dropped_turns:
            self._note(f"the context was full: the oldest {_turns(reply.dropped_turns)} left the conversation")
        if reply.stop_reason in ENDS:
            self._note(ENDS[reply.stop_reason].removeprefix(", "))

    def _note(self, text: str) -> None:
        if not self._quiet:
            print(f"[{text}]", file=sys.stderr, flush=True)


def _turns(count: int) -> str:
    return f"{count} turn{'s' * (count != 1)}"


def _names(text: str) -> list[str]:
    """Files as a user types them: one name as it is, or several as in a shell. Terminals quote those that are dropped on them."""
    whole = os.path.expanduser(text)
    with contextlib.suppress(ValueError):
        if not os.path.exists(whole):
            return [os.path.expanduser(name) for name in shlex.split(text)] or [whole]
    return [whole]


def _name(text: str) -> str:
    names = _names(text)
    return names[0] if len(names) == 1 else os.path.expanduser(text)


class Terminal:
    """Where the questions come from: a terminal with line editing and Ctrl-C, or a pipe."""

    def __init__(self, *, history: bool) -> None:
        self.interactive = sys.stdin.isatty()
        self._history = state_dir() / "chat_history" if history and self.interactive else None
        self._cancel: Chat | None = None
        self._canceller: threading.Thread | None = None
        self._interrupted = False

    def __enter__(self) -> Terminal:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is not text becomes an error of its question
        self._before = signal.getsignal(signal.SIGINT)
        if self.interactive:
            if self._before is not signal.SIG_IGN and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, self._received)
            self._readline = _readline()
            if self._readline is not None and self._history is not None:
                with contextlib.suppress(OSError):
                    self._readline.read_history_file(str(self._history))
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.interactive:
            return
        if signal.getsignal(signal.SIGINT) == self._received:
            signal.signal(signal.SIGINT, self._before)
        if self._readline is not None and self._history is not None:
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self._history, os.O_WRONLY | os.O_CREAT, 0o600))  # only the user may read it
                self._readline.set_history_length(HISTORY_LINES)
                self._readline.write_history_file(str(self._history))

    def read(self) -> str | None:
        """The next question or command, of one line or several. None at the end of the input."""
        self._interrupted = False
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.startswith('"""'):
            return self._block(line[3:])
        if line.startswith("/"):
            return line
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(MORE)
        return "\n".join([*lines, line or ""])

    def _block(self, line: str | None) -> str:
        lines = []
        while line is not None and not line.rstrip().endswith('"""'):
            lines.append(line)
            line = self._line(MORE)
        if line is not None:
            lines.append(line.rstrip()[:-3])
        text = "\n".join(lines).strip("\n")
        return f" {text}" if text.startswith("/") else text  # a block is always a question

    def _line(self, prompt: str) -> str | None:
        if self.interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                print(flush=True)
                return None
        if self.interactive:  # the replies go to a file
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    @contextlib.contextmanager
    def interrupt_cancels(self, chat: Chat) -> Iterator[None]:
        """In the block, Ctrl-C in a terminal cancels the reply of the chat. Elsewhere it raises KeyboardInterrupt."""
        self._interrupted = False
        self._cancel = chat
        try:
            yield
        finally:
            self._cancel = None
            if self._canceller is not None:
                self._canceller.join()
                self._canceller = None

    def took_interrupt(self) -> bool:
        """Whether Ctrl-C was typed in this terminal since the last call or reply."""
        interrupted, self._interrupted = self._interrupted, False
        return interrupted

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True
        if self._cancel is None:
            raise KeyboardInterrupt
        if self._canceller is None:  # not in this thread, which may be inside the stream
            self._canceller = threading.Thread(target=self._cancel.cancel)
            self._canceller.start()


def _readline() -> Any:
    """The module that gives `input` line editing and history; None where Python was built without it."""
    try:
        return import_module("readline")
    except ImportError:
        return None


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge chat`."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge chat",
        description="Ask several questions in one conversation. The replies stream to stdout; questions come from the terminal or a pipe, "
        "one per line. /help lists the commands.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--image", metavar="FILE", action="append", nargs="+", help="pictures for the first question")
    add_reply_options(parser)
    group = add_loading_options(parser)
    group.add_argument("--slide", action="store_true", help="when the context is full, let the oldest turns leave (default: an error)")
    group.add_argument("--no-history", action="store_true", help="do not keep what was typed in $XDG_STATE_HOME/fastvlm-edge/chat_history")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but the replies and errors")
    return parser
