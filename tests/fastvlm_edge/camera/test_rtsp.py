"""Both readers with a real RTSP server on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest

from fastvlm_edge.camera.newest import NewestFrame
from fastvlm_edge.camera.sources import Source, open_source
from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo

pytestmark = pytest.mark.camera
Rtsp = Callable[..., AbstractContextManager[int]]


@pytest.fixture(params=["pyav", "gstreamer"])
def reader(request: pytest.FixtureRequest) -> str:
    if request.param == "gstreamer":
        request.getfixturevalue("system_gi")
    else:
        pytest.importorskip("av", reason="the package av is not installed (the extra camera)")
    name: str = request.param
    return name


def ball(port: int) -> Source:
    return Source("rtsp", f"rtsp://127.0.0.1:{port}/ball")


def test_frames_come_and_move(rtsp: Rtsp, reader: str) -> None:
    with rtsp() as port:
        stream = open_source(ball(port), reader)
        pictures = []
        for _ in range(10):
            frame = stream.read()
            assert frame is not None and frame.position is None and frame.file is None
            pictures.append(frame.picture())
        stream.close()
    assert {(picture.size, picture.mode) for picture in pictures} == {((320, 240), "RGB")}
    first, last = (np.asarray(picture.convert("L"), np.int16) for picture in (pictures[0], pictures[-1]))
    assert np.abs(first - last).max() > 100 and first.max() > 200 and first.min() < 50


def test_the_newest_frame_and_no_backlog(rtsp: Rtsp, reader: str) -> None:
    """After 3 s without a look, the next frame is not one of the 45 that came."""
    notes: list[str] = []
    with rtsp() as port, NewestFrame(lambda: open_source(ball(port), reader), notes.append) as frames:
        assert frames.take() is not None
        time.sleep(3)
        asked = time.monotonic()
        frame = frames.take()
        assert frame is not None and asked - frame.arrived < 0.5
        assert 25 <= frames.dropped <= 60
    assert notes == []


def test_a_server_that_ends_and_comes_back(rtsp: Rtsp, reader: str) -> None:
    notes: list[str] = []
    with rtsp() as port:
        frames = NewestFrame(lambda: open_source(ball(port), reader), notes.append)
        frames.__enter__()
        assert frames.take() is not None
    time.sleep(2.5)
    with rtsp(port):
        end = time.monotonic() + 30
        while not any(note.startswith("back after") for note in notes) and time.monotonic() < end:
            frames.take()
        assert frames.take() is not None
        frames.__exit__(None, None, None)
    assert len(notes) == 2 and notes[0].endswith("opening it again until that works"), notes


def test_the_command_answers_about_a_stream(rtsp: Rtsp, reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    with rtsp() as port:
        words = ["watch", str(demo.MODEL), ball(port).name, "--prompt", "What is this?", "--reader", reader, "--max-new-tokens", "2"]
        assert main([*words, "--max-frames", "3", "--threshold", "0"]) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert len(found) == 3 and all(line["position"] is None and 0 < line["latency_ms"] < 5000 for line in found)
    assert f"with {'PyAV' if reader == 'pyav' else 'GStreamer'}; Ctrl-C ends]" in captured.err
