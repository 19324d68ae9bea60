"""The reader over PyAV, with video files. Streams are in test_rtsp.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fastvlm_edge.camera.frame import SourceError
from fastvlm_edge.camera.sources import Source, open_source
from fastvlm_edge.errors import FastVLMError

pytest.importorskip("av", reason="the package av is not installed (the extra camera)")

from tests.support.videos import cut, number_in, numbered, turn, write_video

STEADY = [index / 10 for index in range(30)]


def read_all(path: Path, *, realtime: bool = False) -> tuple[list[int], list[float]]:
    """Numbers and positions of the frames."""
    reader = open_source(Source("file", str(path)), "pyav", realtime=realtime)
    numbers, positions = [], []
    while (frame := reader.read()) is not None:
        numbers.append(number_in(frame.picture()))
        assert frame.position is not None and frame.file is None
        positions.append(frame.position)
    reader.close()
    reader.close()
    assert reader.read() is None
    return numbers, positions


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts"])
def test_every_frame_with_its_position(ending: str, tmp_path: Path) -> None:
    numbers, positions = read_all(write_video(tmp_path / f"a.{ending}", STEADY, audio=ending != "avi"))
    assert numbers == list(range(30)) and positions == pytest.approx(STEADY, abs=0.02)


def test_a_rate_that_varies(tmp_path: Path) -> None:
    times = [0.0, 0.05, 0.1, 2.0, 2.05, 7.5]
    assert read_all(write_video(tmp_path / "a.mp4", times))[1] == pytest.approx(times, abs=0.002)


def test_it_is_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", STEADY)
    turn(path, 90)
    reader = open_source(Source("file", str(path)), "pyav")
    frame = reader.read()
    reader.close()
    assert frame is not None and frame.picture().size == numbered(0).size[::-1]


def test_a_file_runs_at_its_own_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [0.0, 0.1, 0.2, 0.8, 0.9])
    began = time.monotonic()
    assert read_all(path, realtime=True)[0] == [0, 1, 2, 3, 4]
    assert 0.85 < time.monotonic() - began < 3


def test_closing_ends_a_read_that_waits(tmp_path: Path) -> None:
    reader = open_source(Source("file", str(write_video(tmp_path / "a.mp4", [0.0, 60.0]))), "pyav")
    assert reader.read() is not None
    threading.Timer(0.1, reader.close).start()
    began = time.monotonic()
    assert reader.read() is None and time.monotonic() - began < 5


@pytest.mark.parametrize(("ending", "options"), [("mkv", {}), ("ts", {}), ("mp4", {"movflags": "+faststart"})])
def test_a_file_that_breaks_off_ends_there(ending: str, options: dict[str, str], tmp_path: Path) -> None:
    numbers, _ = read_all(cut(write_video(tmp_path / f"a.{ending}", STEADY, options=options), 0.7))
    assert numbers == list(range(len(numbers))) and 10 < len(numbers) < 30


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.mp4 cannot be opened as video: No such file"):
        open_source(Source("file", str(tmp_path / "gone.mp4")), "pyav")
    with pytest.raises(FastVLMError, match=r"sound\.mp4 has no video, only audio"):
        open_source(Source("file", str(write_video(tmp_path / "sound.mp4", [1.0], audio=True, video=False))), "pyav")
    with pytest.raises(SourceError, match="/dev/null cannot be opened as video: "):
        open_source(Source("device", "/dev/null"), "pyav")
    began = time.monotonic()
    with pytest.raises(SourceError) as error:
        open_source(Source("rtsp", "rtsp://admin:secret@127.0.0.1:9/a"), "pyav")
    assert str(error.value).startswith("rtsp://127.0.0.1:9/a cannot be opened as video: Connection refused")
    assert "secret" not in str(error.value) and time.monotonic() - began < 5
