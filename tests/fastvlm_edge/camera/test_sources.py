"""What SOURCE may be, and who reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm_edge.camera import sources
from fastvlm_edge.camera.sources import Source, chosen_reader, open_source, parse_source, without_password
from fastvlm_edge.errors import FastVLMError


def test_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    assert parse_source("csi:0") == Source("csi", "0") and str(parse_source("csi:01")) == "csi:1"
    assert parse_source("rtsp://cam/1") == Source("rtsp", "rtsp://cam/1")
    assert parse_source("RTSPS://cam:322/1").kind == "rtsp"
    assert parse_source(str(tmp_path)) == Source("folder", str(tmp_path))
    assert parse_source(str(tmp_path / "a.mp4")).kind == "file"
    assert parse_source("/dev/null").kind == "device"
    assert [kind for kind in ("folder", "file", "device", "csi", "rtsp") if Source(kind, "x").live] == ["device", "csi", "rtsp"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gone", "gone does not exist; give a directory, a video file, /dev/video0, csi:0 or rtsp://..."),
        ("/dev/video77", "/dev/video77 does not exist"),
        ("csi", "csi does not exist"),
        ("http://cam/video.mjpg", "http://cam/video.mjpg cannot be watched: of addresses, only rtsp:// and rtsps:// can"),
        ("http://user:secret@cam/?pw=secret", "http://cam/?... cannot be watched"),
        ("rtsp://", " names no host; give rtsp://HOST:PORT/PATH"),
        ("rtsp://[::1", "rtsp://... names no host"),
        (__file__.replace(".py", ".jpg"), "does not exist"),
    ],
)
def test_what_is_no_source(text: str, says: str) -> None:
    with pytest.raises(FastVLMError) as error:
        parse_source(text)
    assert says in str(error.value) and "secret" not in str(error.value)


def test_a_picture_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a b.JPG").touch()
    with pytest.raises(
        FastVLMError, match="is a picture, which does not change; watch its directory, or run: fastvlm-edge run MODEL --image '"
    ):
        parse_source(str(tmp_path / "a b.JPG"))


def test_passwords_are_not_shown() -> None:
    assert without_password("rtsp://user:p%40ss@cam:8554/a/b") == "rtsp://cam:8554/a/b"
    assert without_password("rtsp://u:p@ss@cam/a") == "rtsp://cam/a"
    assert without_password("rtsp://cam/a?user=admin&password=x") == "rtsp://cam/a?..."
    assert str(Source("rtsp", "rtsp://u:p@cam/a")) == "rtsp://cam/a"


ABSENT = FastVLMError("gone", "run: bring it")


@pytest.mark.parametrize(
    ("jetson", "gi", "av", "chosen"),
    [
        (False, True, True, "pyav"),
        (False, True, False, "gstreamer"),
        (False, False, True, "pyav"),
        (True, True, True, "gstreamer"),
        (True, False, True, "pyav"),
        (True, True, False, "gstreamer"),
    ],
)
def test_who_reads(jetson: bool, gi: bool, av: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "read_jetson", lambda _probe: object() if jetson else None)
    monkeypatch.setitem(sources._MISSING, "gstreamer", lambda: None if gi else ABSENT)
    monkeypatch.setitem(sources._MISSING, "pyav", lambda: None if av else ABSENT)
    assert chosen_reader(Source("file", "a.mp4")) == chosen
    for name, there in (("gstreamer", gi), ("pyav", av)):
        if there:
            assert chosen_reader(Source("file", "a.mp4"), name) == name
        else:
            with pytest.raises(FastVLMError, match="gone; run: bring it"):
                chosen_reader(Source("file", "a.mp4"), name)


def test_who_reads_a_csi_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources._MISSING, "gstreamer", lambda: None)
    assert chosen_reader(Source("csi", "0")) == "gstreamer"
    with pytest.raises(FastVLMError, match="PyAV cannot read a CSI camera; leave out --reader"):
        chosen_reader(Source("csi", "0"), "pyav")


@pytest.mark.parametrize("jetson", [True, False])
def test_nobody_is_there(jetson: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "read_jetson", lambda _probe: object() if jetson else None)
    monkeypatch.setitem(sources._MISSING, "gstreamer", lambda: FastVLMError("no gi", "run: apt"))
    monkeypatch.setitem(sources._MISSING, "pyav", lambda: FastVLMError("no av", "run: pip"))
    with pytest.raises(FastVLMError) as error:
        chosen_reader(Source("rtsp", "rtsp://a"))
    first, second = ("apt", "pip") if jetson else ("pip", "apt")
    assert str(error.value) == f"neither PyAV nor GStreamer is installed, which read video; run: {first} or run: {second}"


def test_a_folder_needs_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources._MISSING, "gstreamer", lambda: ABSENT)
    monkeypatch.setitem(sources._MISSING, "pyav", lambda: ABSENT)
    open_source(parse_source(str(tmp_path))).close()
