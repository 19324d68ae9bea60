"""Between a source and the model: the newest frame in a thread, with a source that is opened again; or every frame of a file."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from fastvlm_edge.camera.frame import Frame, Reader, SourceError

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to open a source, which begin with 1 and double."""


class Frames(Protocol):
    """What `watch` takes frames from."""

    dropped: int
    """Frames that came and were never taken."""
    broke: bool
    """Whether the source ended before its end, as a video file on a disk that fails."""

    def take(self) -> Frame | None:
        """Wait for a frame that was not taken yet. None when the source has ended."""

    def __enter__(self) -> Frames: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


class NewestFrame:
    """Keeps the newest frame only: a frame that a newer one replaces is dropped. Enter it to begin.

    A source that breaks is opened again after 1, 2, 4 ... 30 s until that succeeds. `note` is told when it breaks and when it is back.
    """

    def __init__(self, opened: Callable[[], Reader], note: Callable[[str], None], *, every: float = 0.0, again: bool = True) -> None:
        """`every`: `take` returns at most one frame in so many seconds. Without `again`, a source that breaks has ended: a video file."""
        self._open, self._note, self._every, self._again = opened, note, every, again
        self.dropped = 0
        self.broke = False
        self._next = 0.0
        """When `take` may return again, on the monotonic clock."""
        self._frame: Frame | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        """Guards the six above."""
        self._closing = threading.Event()
        self._reader: Reader | None = None
        self._thread = threading.Thread(target=self._run, name="newest frame", daemon=True)  # a driver may never return

    def take(self) -> Frame | None:
        with self._changed:
            while not self._ended and (wait := self._next - time.monotonic()) > 0:
                self._changed.wait(wait)
            while self._frame is None and not self._ended:
                self._changed.wait()
            frame, self._frame = self._frame, None
            now = time.monotonic()
            if frame is not None and now < self._next:  # the source ended before another one was due
                self.dropped += 1
                frame = None
            if frame is None and self._error is not None:
                raise self._error
            self._next = now + self._every
            return frame

    def __enter__(self) -> NewestFrame:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closing.set()
        reader = self._reader
        if reader is not None:
            reader.close()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        try:
            self._read_all()
        except BaseException as error:
            with self._changed:
                self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_all(self) -> None:
        """Until the source ends for good, or nobody wants its frames any more."""
        pause, broke = 1.0, None
        while not self._closing.is_set():
            try:
                self._reader = reader = self._open()
                try:
                    while not self._closing.is_set():
                        frame = reader.read()
                        if frame is None:
                            return
                        if broke is not None:
                            self._note(f"back after {time.monotonic() - broke:.0f} s")
                        pause, broke = 1.0, None
                        self._put(frame)
                finally:
                    reader.close()
            except SourceError as error:
                if self._closing.is_set():
                    return
                if not self._again:
                    self._note(error.what)
                    self.broke = True
                    return
                if broke is None:
                    broke = time.monotonic()
                    self._note(f"{error.what}; opening it again until that works")
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _put(self, frame: Frame) -> None:
        with self._changed:
            self.dropped += self._frame is not None
            self._frame = frame
            self._changed.notify_all()


class EveryFrame:
    """All frames of a file or folder, one after another: the source waits for the model.

    A folder that cannot be read is looked at again after 1, 2, 4 ... 30 s until that succeeds. `note` is told when that begins and ends.
    """

    def __init__(self, opened: Callable[[], Reader], note: Callable[[str], None], *, every: float = 0.0, again: bool = False) -> None:
        """`every`: the first frame in each so many seconds of a video file, and at most one picture of a folder in so many seconds.

        Without `again`, a source that breaks has ended: a video file.
        """
        self._open, self._note, self._every, self._again = opened, note, every, again
        self.dropped = 0
        self.broke = False
        self._position = 0.0
        """From which on a frame of a file is taken."""
        self._due = 0.0
        """When a picture of a folder may be taken, on the monotonic clock."""

    def take(self) -> Frame | None:
        time.sleep(max(0.0, self._due - time.monotonic()))
        while True:
            frame = self._read()
            if frame is None:
                return None
            if frame.position is None:
                self._due = time.monotonic() + self._every
                return frame
            if frame.position >= self._position - 1e-6:
                if self._every:
                    self._position = (math.floor(frame.position / self._every + 1e-6) + 1) * self._every
                return frame
            self.dropped += 1

    def _read(self) -> Frame | None:
        """The next frame of the reader, which knows what came while a folder could not be read. None at the end."""
        pause, broke = 1.0, None
        while True:
            try:
                frame = self._reader.read()
            except SourceError as error:
                if not self._again:
                    self._note(error.what)
                    self.broke = True
                    return None
                if broke is None:
                    broke = time.monotonic()
                    self._note(f"{error.what}; looking again until that works")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if broke is not None:
                    self._note(f"back after {time.monotonic() - broke:.0f} s")
                return frame

    def __enter__(self) -> EveryFrame:
        self._reader = self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._reader.close()
