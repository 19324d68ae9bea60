"""`fastvlm-edge watch` with the demo model: video files, a growing folder, signals, and a webhook."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge import FastVLM
from fastvlm_edge.camera.clip import frames_of_clip
from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo
from tests.fastvlm_edge.test_run import never_loads  # noqa: F401

pytest.importorskip("av", reason="the package av is not installed (the extra camera)")

from tests.support.videos import write_video

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(demo.MODEL)
SHAPES, METER, SIGN = (demo.HOME / f"{name}.jpg" for name in ("shapes", "meter", "sign"))
QUESTION, ANSWER = "What colour is the circle?", "purple"
ASK = ("--prompt", QUESTION)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 s with 30 frames, each of which differs from the others."""
    return write_video(
        tmp_path_factory.mktemp("video") / "a.mp4", [index / 10 for index in range(30)], numbers=[37 * n % 256 for n in range(30)]
    )


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of the same, then 20 of another picture."""
    path = tmp_path_factory.mktemp("video") / "still.mp4"
    return write_video(path, [index / 10 for index in range(40)], numbers=[3] * 20 + [200] * 20)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def watch(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[list[dict[str, Any]], str]:
    """The lines on stdout, and stderr."""
    assert main(["watch", MODEL, *map(str, arguments), *ASK]) == 0
    captured = capsys.readouterr()
    return lines(captured.out), captured.err


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-u", "-m", "fastvlm_edge", "watch", MODEL, *map(str, arguments), *ASK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_watching(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[watching"):
            return
    raise AssertionError("it ended")


# Video files --------------------------------------------------------------------------------------------------------------------


def test_every_frame_of_a_file(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, told = watch(capsys, video, "--no-realtime", "--threshold", "0", "--max-new-tokens", "4")
    with FastVLM.load(MODEL, "ort") as vlm:
        expected = [vlm.generate(QUESTION, picture, max_new_tokens=4) for picture in frames_of_clip(video, 30)]
    assert [line["text"] for line in found] == [reply.text for reply in expected]
    assert [line["position"] for line in found] == pytest.approx([index / 10 for index in range(30)], abs=0.01)
    for line, reply in zip(found, expected, strict=True):
        assert list(line) == [
            *("time", "frame_time", "position", "file", "text", "stop_reason", "image_size", "tried_sizes", "confidence", "latency_ms"),
            *("dropped", "skipped"),
        ]
        assert reply.confidence is not None and line["confidence"]["mean"] == pytest.approx(reply.confidence.mean, rel=1e-3)
        assert (line["file"], line["stop_reason"], line["dropped"], line["skipped"]) == (None, reply.stop_reason, 0, 0)
        times = [datetime.strptime(line[name], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc) for name in ("frame_time", "time")]
        assert times[0] <= times[1] and abs((times[1] - times[0]).total_seconds() * 1e3 - line["latency_ms"]) < 500
    assert f"[watching {video} with PyAV; Ctrl-C ends]\n" in told
    assert re.search(r"\[30 answers in \d+ s; 0 frames dropped; 0 skipped because nothing changed\]\n$", told)


def test_seconds_of_the_video(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, told = watch(capsys, video, "--no-realtime", "--threshold", "0", "--every", "1", "--max-new-tokens", "1")
    assert [line["position"] for line in found] == pytest.approx([0, 1, 2], abs=0.01)
    assert [line["dropped"] for line in found] == [0, 9, 18] and "[3 answers" in told and "27 frames dropped" in told


def test_at_its_own_rate_the_newest_frame_is_taken(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found, told = watch(capsys, video, "--threshold", "0", "--every", "0.5", "--max-new-tokens", "1")
    assert time.monotonic() - began > 2.5
    positions = [line["position"] for line in found]
    assert 2 <= len(positions) <= 7 and positions == sorted(positions)
    dropped = int(told.partition(" frames dropped")[0].rpartition(" ")[2])
    assert dropped == 30 - len(found) and found[-1]["dropped"] <= dropped


def test_frames_that_did_not_change_are_skipped(still: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, told = watch(capsys, still, "--no-realtime")
    assert [line["position"] for line in found] == pytest.approx([0, 2], abs=0.01)
    assert found[1]["skipped"] == 19 and "2 answers" in told and "38 skipped" in told
    found, told = watch(capsys, still, "--no-realtime", "--threshold", "255", "-q")
    assert len(found) == 1 and told == ""


def test_a_slow_change_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    steps = range(100, 140)

    def fill() -> None:
        for index, grey in enumerate(steps):
            Image.new("L", (64, 64), grey).save(tmp_path / "x.png")
            os.utime(tmp_path / "x.png", (1e9 + index, 1e9 + index))
            (tmp_path / "x.png").rename(folder / f"{grey}.png")

    timer = threading.Timer(3, fill)
    timer.start()
    found, _ = watch(capsys, folder, "--no-realtime", "--threshold", "10", "--max-frames", "4", "--max-new-tokens", "1")
    timer.join()
    assert [line["file"] for line in found] == ["100.png", "110.png", "120.png", "130.png"]


def test_only_new_answers(still: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, told = watch(capsys, still, "--no-realtime", "--threshold", "0", "--on-change", "--choice", "yes")
    assert [line["text"] for line in found] == ["yes"] and "[40 answers" in told


def test_formats_and_sampling(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": false}'
    )
    few = ("--no-realtime", "--max-frames", "2", "-q")
    for options, expected in (
        (("--json-schema", str(tmp_path / "schema.json")), r'\{\s*"n"\s*:\s*7\s*\}'),
        (("--regex", "[0-9]{3}"), "[0-9]{3}"),
        (("--choice", "left", "--choice", "right"), "left|right"),
        (("--temperature", "1.5", "--seed", "3", "--max-new-tokens", "3"), ".*"),
    ):
        found, _ = watch(capsys, video, *few, *options)
        assert len(found) == 2 and all(re.fullmatch(expected, line["text"], re.DOTALL) for line in found)


# A growing folder ---------------------------------------------------------------------------------------------------------------


def test_a_growing_folder(tmp_path: Path) -> None:
    shutil.copy(METER, tmp_path / "old.jpg")
    with started(tmp_path, "--max-frames", "2", "--threshold", "0", "--no-realtime") as process:
        wait_until_watching(process)
        shutil.copy(SHAPES, tmp_path / "new.jpg")
        (tmp_path / "bad.jpg").write_bytes(SIGN.read_bytes()[:2000])
        os.utime(tmp_path / "bad.jpg", (1e9, 1e9))
        first = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        (tmp_path / "bad.jpg").write_bytes(SIGN.read_bytes())
        out, err = process.communicate(timeout=60)
    assert (first["file"], first["text"], first["position"]) == ("new.jpg", ANSWER, None)
    assert [line["file"] for line in lines(out)] == ["bad.jpg"] and process.returncode == 1
    assert f"[{tmp_path / 'bad.jpg'} is damaged or truncated: " in err and "1 not readable" in err


# How it ends --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [True, False])
def test_signals_end_it_with_a_summary(number: signal.Signals, busy: bool, tmp_path: Path) -> None:
    source = tmp_path
    if busy:
        source = write_video(tmp_path / "a.mp4", [index / 20 for index in range(600)])
    with started(source, "--threshold", "0") as process:
        wait_until_watching(process)
        if busy:
            process.stdout.readline()  # type: ignore[union-attr]
        else:
            time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and time.monotonic() - began < 10
    assert re.fullmatch(r"\[\d+ answers? in \d+ s; \d+ frames dropped; 0 skipped because nothing changed\]\n", err), err


def test_closed_stdout_ends_it_quietly(video: Path) -> None:
    with started(video, "--no-realtime", "--threshold", "0", "-q") as process:
        process.stdout.readline()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == ""  # type: ignore[union-attr]


def test_each_line_is_posted(video: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    came: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_given: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/"
        found, told = watch(capsys, video, "--no-realtime", "--max-frames", "3", "--webhook", address, "--max-new-tokens", "1")
        server.shutdown()
        thread.join()
    assert [json.loads(line) for line in came] == found and len(found) == 3
    assert "webhook: 3 posted, 0 failed]" in told


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.mp4"], "gone.mp4 does not exist; give a directory, a video file, /dev/video0, csi:0 or rtsp://..."),
        ([str(SHAPES)], "is a picture, which does not change; watch its directory, or run: fastvlm-edge run MODEL --image"),
        ([__file__], "cannot be opened as video: "),
        (["/dev/null", "--no-realtime"], "--no-realtime with /dev/null, which does not wait; leave it out"),
        (["rtsp://u:secret@127.0.0.1:9/x"], "rtsp://127.0.0.1:9/x cannot be opened as video: Connection refused"),
        (["csi:0", "--reader", "pyav"], "PyAV cannot read a CSI camera"),
        (["VIDEO", "--webhook", "ftp://x"], "the webhook is not an address of http or https"),
        (["VIDEO", "--top-k", "3"], "--top-k without --temperature"),
        (["VIDEO", "--background", "nocolour"], "the background 'nocolour' is not a colour"),
        (["VIDEO", "--system", "word " * 3000], "which leaves no room for a reply"),
        (["VIDEO", "--regex", "("], "the regex cannot be used: unclosed group"),
    ],
)
def test_what_is_checked_before_the_model_loads(arguments: list[str], says: str, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", MODEL, *(str(video) if word == "VIDEO" else word for word in arguments), *ASK]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and says in captured.err and "secret" not in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["x"],
        ["x", "--prompt", "y", "--every", "-1"],
        ["x", "--prompt", "y", "--threshold", "nan"],
        ["x", "--prompt", "y", "--max-frames", "0"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", MODEL, *arguments]) == 2
    assert capsys.readouterr().out == ""
