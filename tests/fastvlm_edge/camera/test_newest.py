"""The newest frame, what is dropped, and a source that breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge.camera import newest
from fastvlm_edge.camera.frame import Frame, SourceError
from fastvlm_edge.camera.newest import EveryFrame, NewestFrame
from fastvlm_edge.errors import FastVLMError


def frame(number: int, position: float | None = None) -> Frame:
    return Frame(lambda: Image.new("L", (1, 1)), position, file=str(number))


class Scripted:
    """A reader of frames, pauses in seconds, and errors; then it ends, or waits until it is closed."""

    def __init__(self, *steps: Any, ends: bool = True) -> None:
        self._steps: Iterator[Any] = iter(steps)
        self._ends = ends
        self.closed = threading.Event()

    def read(self) -> Frame | None:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Frame):
                return step
            if callable(step):
                step()
            elif self.closed.wait(step):
                return None
        if not self._ends:
            self.closed.wait(30)
        return None

    def close(self) -> None:
        self.closed.set()


def opener(*readers: Scripted | Exception) -> Callable[[], Scripted]:
    """Each call opens the next one."""
    waiting = iter(readers)

    def opened() -> Scripted:
        reader = next(waiting)
        if isinstance(reader, Exception):
            raise reader
        return reader

    return opened


def names(frames: NewestFrame | EveryFrame, count: int = 99) -> list[str | None]:
    found: list[str | None] = []
    while len(found) < count and (taken := frames.take()) is not None:
        found.append(taken.file)
    return found


@pytest.fixture
def notes() -> list[str]:
    return []


def test_only_the_newest_is_kept(notes: list[str]) -> None:
    all_came, may_go_on = threading.Event(), threading.Event()
    reader = Scripted(frame(1), frame(2), frame(3), all_came.set, may_go_on.wait, frame(4), frame(5))
    with NewestFrame(opener(reader), notes.append) as frames:
        assert all_came.wait(5)
        assert names(frames, 1) == ["3"] and frames.dropped == 2
        may_go_on.set()
        frames._thread.join()
        assert names(frames) == ["5"] and frames.dropped == 3
        assert frames.take() is None
    assert reader.closed.is_set() and notes == []


def test_a_frame_is_awaited(notes: list[str]) -> None:
    with NewestFrame(opener(Scripted(0.2, frame(1), 0.2, frame(2))), notes.append) as frames:
        began = time.monotonic()
        assert names(frames) == ["1", "2"] and frames.dropped == 0
        assert time.monotonic() - began > 0.35


def test_at_most_one_in_so_many_seconds(notes: list[str]) -> None:
    steps = [step for number in range(30) for step in (frame(number), 0.02)]
    with NewestFrame(opener(Scripted(*steps)), notes.append, every=0.25) as frames:
        found = names(frames)
    assert 2 <= len(found) <= 4 and found[0] == "0" and frames.dropped == 30 - len(found)


def test_the_end_does_not_wait_for_the_next_turn(notes: list[str]) -> None:
    with NewestFrame(opener(Scripted(frame(1), 0.1, frame(2))), notes.append, every=60) as frames:
        began = time.monotonic()
        assert names(frames) == ["1"] and frames.dropped == 1
    assert time.monotonic() - began < 5


def test_a_source_that_breaks_is_opened_again_and_told_once(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = threading.Event.wait

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout is not None and timeout >= 1 and threading.current_thread().name == "newest frame":
            pauses.append(timeout)
            timeout = 0
        return real(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    refused: list[Scripted | Exception] = [SourceError("refused")] * 6
    readers: list[Scripted | Exception] = [
        Scripted(frame(1), 0.1, SourceError("the cable")),
        *refused,
        Scripted(frame(2), 0.1, SourceError("again")),
        Scripted(frame(3), 0.1),
    ]
    with NewestFrame(opener(*readers), notes.append) as frames:
        assert names(frames) == ["1", "2", "3"]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 1]
    assert notes == [
        "the cable; opening it again until that works",
        "back after 0 s",
        "again; opening it again until that works",
        "back after 0 s",
    ]


def test_a_file_that_breaks_has_ended(notes: list[str]) -> None:
    with NewestFrame(opener(Scripted(frame(1), 0.1, SourceError("the disk"))), notes.append, again=False) as frames:
        assert names(frames) == ["1"]
    assert notes == ["the disk"] and frames.broke


def test_what_can_never_work_is_raised(notes: list[str]) -> None:
    with (
        NewestFrame(opener(FastVLMError("no such reader", "install it")), notes.append) as frames,
        pytest.raises(FastVLMError, match="reader"),
    ):
        frames.take()
    with NewestFrame(opener(Scripted(ZeroDivisionError())), notes.append) as frames, pytest.raises(ZeroDivisionError):
        frames.take()


def test_leaving_ends_the_thread_at_once(notes: list[str]) -> None:
    began = time.monotonic()
    with NewestFrame(opener(Scripted(frame(1), ends=False)), notes.append) as frames:
        frames.take()
    assert not frames._thread.is_alive()
    with NewestFrame(opener(*[SourceError("down")] * 3), notes.append) as frames:
        time.sleep(0.1)
    assert not frames._thread.is_alive() and time.monotonic() - began < 2


def test_the_longest_pause_is_half_a_minute() -> None:
    assert newest.LONGEST_PAUSE == 30


# Every frame --------------------------------------------------------------------------------------------------------------------


def test_every_frame_waits_for_the_model(notes: list[str]) -> None:
    reader = Scripted(*(frame(number, number / 10) for number in range(5)))
    with EveryFrame(opener(reader), notes.append) as frames:
        found = []
        while (taken := frames.take()) is not None:
            found.append(taken.file)
            time.sleep(0.02)
    assert found == ["0", "1", "2", "3", "4"] and frames.dropped == 0 and reader.closed.is_set()


def test_seconds_of_the_video_count(notes: list[str]) -> None:
    positions = [number / 30 for number in range(90)] + [10.0, 10.1, 10.9, 11.0, 11.1]
    reader = Scripted(*(frame(number, at) for number, at in enumerate(positions)))
    with EveryFrame(opener(reader), notes.append, every=1) as frames:
        assert names(frames) == ["0", "30", "60", "90", "93"]
    assert frames.dropped == 90


def test_pictures_of_a_folder_come_at_most_so_often(notes: list[str]) -> None:
    began = time.monotonic()
    with EveryFrame(opener(Scripted(frame(1), frame(2), frame(3))), notes.append, every=0.1) as frames:
        assert names(frames) == ["1", "2", "3"] and frames.dropped == 0
    assert time.monotonic() - began > 0.2


def test_a_file_that_breaks_ends(notes: list[str]) -> None:
    with EveryFrame(opener(Scripted(frame(1, 0.0), SourceError("the disk"))), notes.append) as frames:
        assert names(frames) == ["1"]
    assert notes == ["the disk"] and frames.broke


def test_a_folder_that_cannot_be_read_for_a_while(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    gone = [SourceError("not mounted")] * 6
    with EveryFrame(opener(Scripted(frame(1), *gone, frame(2), SourceError("again"), frame(3))), notes.append, again=True) as frames:
        assert names(frames) == ["1", "2", "3"] and not frames.broke
    assert pauses == [1, 2, 4, 8, 16, 30, 1]
    assert notes == [
        "not mounted; looking again until that works",
        "back after 0 s",
        "again; looking again until that works",
        "back after 0 s",
    ]
