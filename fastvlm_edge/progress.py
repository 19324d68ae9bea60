"""Progress of long work on stderr: a bar on a terminal, a few plain lines in a log file, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Receives the progress of work, which is a sequence of stages."""

    def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
        """Begin a stage of `total` units, or of unknown size. It ends the previous stage.

        With `speed`, the units take about the same time, and their number per second and the time left are shown.
        """

    def advance(self, amount: int = 1) -> None:
        """Report that `amount` more units are done."""

    def note(self, text: str) -> None:
        """Print `text` on a line of its own. The current stage continues."""

    def done(self) -> None:
        """End the last stage. May be called twice."""


class SilentProgress:
    """Prints nothing, for `--json` and for use as a library."""

    def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
        """Ignore the stage."""

    def advance(self, amount: int = 1) -> None:
        """Ignore the units."""

    def note(self, text: str) -> None:
        """Ignore the note."""

    def done(self) -> None:
        """Nothing is left to end."""


class TextProgress:
    """Writes to a stream. A terminal gets one line that is redrawn; anything else gets one line per stage and one every 30 s."""

    _WIDTH = 24

    def __init__(self, stream: TextIO, *, terminal: bool) -> None:
        self._stream = stream
        self._terminal = terminal
        self._every = 0.1 if terminal else 30.0
        self._name: str | None = None
        self._total: int | None = None
        self._count = 0
        self._speed = False
        self._began = self._shown = 0.0

    def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
        """Begin a stage. It ends the previous stage."""
        self.done()
        self._name, self._total, self._count, self._speed = name, total, 0, speed
        self._began = self._shown = time.monotonic()
        if self._terminal:
            self._draw(end="")

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units, and draw at most every 0.1 s (terminal) or 30 s."""
        self._count += amount
        now = time.monotonic()
        if self._name is not None and now - self._shown >= self._every:
            self._shown = now
            self._draw(end="" if self._terminal else "\n")

    def note(self, text: str) -> None:
        """Print a line; the bar is drawn again below it."""
        self._write(text, end="\n")
        if self._name is not None and self._terminal:
            self._draw(end="")

    def done(self) -> None:
        """End the stage and print how long it took."""
        if self._name is None:
            return
        seconds = time.monotonic() - self._began
        self._write(f"{self._name}  {seconds:.1f} s", end="\n")
        self._name = None

    def _draw(self, end: str) -> None:
        speed = self._describe_speed() if self._speed else ""
        if not self._total:
            self._write(f"{self._name} ...{f' {self._count}{speed}' if self._speed else ''}", end)
            return
        share = min(self._count / self._total, 1.0)
        bar = ""
        if self._terminal:
            filled = round(share * self._WIDTH)
            bar = "[" + "#" * filled + "." * (self._WIDTH - filled) + "] "
        self._write(f"{self._name}  {bar}{self._count}/{self._total}{speed}", end)

    def _describe_speed(self) -> str:
        """Such as `, 2.4/s, 1:07:12 left`."""
        seconds = time.monotonic() - self._began
        if not self._count or seconds <= 0:
            return ""
        rate = self._count / seconds
        shown = f", {rate:.1f}/s" if rate >= 1 else f", {1 / rate:.1f} s each"
        if self._total and self._total > self._count:
            shown += f", {clock((self._total - self._count) / rate)} left"
        return shown

    def _write(self, line: str, end: str) -> None:
        try:
            self._stream.write((f"\r\x1b[K{line}" if self._terminal else line) + end)
            self._stream.flush()
        except (OSError, ValueError):  # stderr was closed, which is not a reason to stop the work
            self._name = None


def clock(seconds: float) -> str:
    """A duration as `0:07`, `12:31` or `1:07:12`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def stderr_progress() -> Progress:
    """Progress for commands: a bar if stderr is a terminal."""
    return TextProgress(sys.stderr, terminal=sys.stderr.isatty())
