"""GStreamer itself, on this computer's software elements."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm_edge.camera import gstreamer
from fastvlm_edge.camera.frame import SourceError
from fastvlm_edge.camera.gstreamer import GStreamerReader, gi_missing
from fastvlm_edge.camera.pipeline import pipeline
from fastvlm_edge.camera.sources import Source, open_source
from fastvlm_edge.errors import FastVLMError

STEADY = [index / 10 for index in range(30)]


def test_without_gi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(gstreamer, "import_module", gone)
    monkeypatch.setattr(sys, "prefix", "/venv")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    error = gi_missing(tmp_path)
    assert str(error).startswith("Python has no gi, through which GStreamer is used; run: sudo apt install python3-gi ")
    (tmp_path / "gi").mkdir()
    error = gi_missing(tmp_path)
    assert "this virtual environment does not see it; " in str(error) and str(error).endswith("python3 -m venv --system-site-packages")
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert "virtual" not in str(gi_missing(tmp_path))


def test_gi_without_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_name: str) -> None:
        raise ValueError("Namespace GstApp not available")

    monkeypatch.setattr(gstreamer, "import_module", gone)
    assert str(gi_missing()).startswith("GStreamer cannot be loaded (ValueError: Namespace GstApp not available); run: sudo apt install")


def described(text: str) -> Callable[[Callable[[str], bool]], str]:
    return lambda _has: text


def read_all(path: Path, *, realtime: bool = False) -> tuple[list[int], list[float]]:
    from tests.support.videos import number_in

    reader = open_source(Source("file", str(path)), "gstreamer", realtime=realtime)
    numbers, positions = [], []
    while (frame := reader.read()) is not None:
        numbers.append(number_in(frame.picture()))
        assert frame.position is not None
        positions.append(frame.position)
    reader.close()
    return numbers, positions


@pytest.mark.camera
@pytest.mark.usefixtures("system_gi")
class TestFiles:
    """Video files."""

    @pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
    def test_every_frame_with_its_position(self, ending: str, tmp_path: Path) -> None:
        from tests.support.videos import write_video

        numbers, positions = read_all(write_video(tmp_path / f"a.{ending}", STEADY, audio=True))
        assert numbers == list(range(30)) and positions == pytest.approx(STEADY, abs=0.02)

    def test_it_is_upright(self, tmp_path: Path) -> None:
        from tests.support.videos import numbered, turn, write_video

        path = write_video(tmp_path / "a.mp4", STEADY)
        turn(path, 90)
        reader = open_source(Source("file", str(path)), "gstreamer", realtime=False)
        frame = reader.read()
        reader.close()
        assert frame is not None and frame.picture().size == numbered(0).size[::-1]

    @pytest.mark.parametrize("name", ["a b.mp4", 'a"b\\c.mp4', "a ! fakesink.mp4", "täglich ☀.mp4", "%03d.mp4"])
    def test_names_are_only_names(self, name: str, tmp_path: Path) -> None:
        from tests.support.videos import write_video

        path = write_video(tmp_path / "plain.mp4", [0.0, 0.1])
        assert read_all(path.rename(tmp_path / name))[0] == [0, 1]

    def test_a_file_runs_at_its_own_rate(self, tmp_path: Path) -> None:
        from tests.support.videos import write_video

        path = write_video(tmp_path / "a.mp4", [0.0, 0.1, 0.2, 0.8, 0.9])
        began = time.monotonic()
        assert read_all(path, realtime=True)[0] == [0, 1, 2, 3, 4]
        assert 0.7 < time.monotonic() - began < 5

    def test_a_file_that_breaks_off_ends_there(self, tmp_path: Path) -> None:
        from tests.support.videos import cut, write_video

        numbers, _ = read_all(cut(write_video(tmp_path / "a.ts", STEADY), 0.7))
        assert numbers == list(range(len(numbers))) and 10 < len(numbers) < 30

    def test_errors(self, tmp_path: Path) -> None:
        from tests.support.videos import write_video

        with pytest.raises(SourceError, match=r"sound\.mp4"):
            open_source(Source("file", str(write_video(tmp_path / "sound.mp4", [1.0], audio=True, video=False))), "gstreamer")
        with pytest.raises(SourceError, match=r"gone\.mp4"):
            open_source(Source("file", str(tmp_path / "gone.mp4")), "gstreamer")
        (tmp_path / "text.mp4").write_text("hello\n" * 500)
        with pytest.raises(SourceError, match=r"text\.mp4"):
            open_source(Source("file", str(tmp_path / "text.mp4")), "gstreamer")


@pytest.mark.camera
@pytest.mark.usefixtures("system_gi")
class TestLive:
    """Sources that give frames at their own time."""

    def test_colours_and_rows(self) -> None:
        """The width is no multiple of 4, 8 or 16."""
        red = "videotestsrc is-live=true pattern=solid-color foreground-color=0xffff8000 ! video/x-raw,width=333,height=77"
        reader = GStreamerReader(
            described(f"{red} ! videoconvert ! video/x-raw,format=RGBA ! appsink name=frames max-buffers=1 drop=true"),
            "test",
            live=True,
            files=False,
        )
        frame = reader.read()
        reader.close()
        assert frame is not None and frame.position is None
        picture = frame.picture()
        assert picture.size == (333, 77) and picture.mode == "RGB"
        assert np.abs(np.asarray(picture, np.int16) - (255, 128, 0)).max() < 4

    def test_a_source_that_falls_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gstreamer, "SILENT_SECONDS", 0.5)
        text = "videotestsrc is-live=true num-buffers=3 ! videoconvert ! video/x-raw,format=RGBA ! valve name=valve ! appsink name=frames"
        reader = GStreamerReader(described(text), "test", live=True, files=False)
        reader._pipeline.get_by_name("valve").set_property("drop", True)
        with pytest.raises(SourceError, match=r"test (gave no frame for 0\.5 s|ended)"):
            all(reader.read() for _ in range(5))
        reader.close()

    def test_closing_ends_a_read_that_waits(self) -> None:
        text = "videotestsrc is-live=1 ! video/x-raw,framerate=1/20,format=RGBA ! appsink name=frames sync=false"
        reader = GStreamerReader(described(text), "test", live=True, files=False)
        assert reader.read() is not None
        threading.Timer(0.1, reader.close).start()
        began = time.monotonic()
        assert reader.read() is None and time.monotonic() - began < 5

    def test_errors_do_not_show_a_password(self) -> None:
        with pytest.raises(SourceError) as error:
            open_source(Source("rtsp", "rtsp://admin:secret@127.0.0.1:9/a"), "gstreamer")
        assert "rtsp://127.0.0.1:9/a" in str(error.value) and "secret" not in str(error.value)

    def test_what_no_machine_without_the_parts_can_open(self) -> None:
        with pytest.raises(FastVLMError, match="nvarguscamerasrc"):
            open_source(Source("csi", "0"))
        with pytest.raises(SourceError, match="/dev/null"):
            open_source(Source("device", "/dev/null"), "gstreamer")
        with pytest.raises(FastVLMError, match="GStreamer says"):
            GStreamerReader(described("nosuchelement"), "test", live=True, files=False)


@pytest.mark.camera
def test_gst_launch_takes_the_same_text(tmp_path: Path) -> None:
    from tests.support.videos import write_video

    launch = shutil.which("gst-launch-1.0")
    if launch is None:
        pytest.skip("there is no gst-launch-1.0; make test-camera installs it")
    path = write_video(tmp_path / "a b.mp4", STEADY)
    text = pipeline("file", str(path), lambda name: name != "nvvidconv", realtime=False).replace(
        "appsink name=frames max-buffers=1 drop=false", "fakesink"
    )
    done = subprocess.run([launch, "-q", *shlex.split(text.replace('"', "'\"'"))], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
