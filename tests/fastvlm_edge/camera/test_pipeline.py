"""The pipelines of GStreamer as text, for the elements of a Jetson and those of other computers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvlm_edge.camera.pipeline import pipeline, quoted
from fastvlm_edge.errors import FastVLMError

DESKTOP = {"v4l2src", "rtspsrc", "filesrc", "decodebin", "videoconvert", "videoflip", "appsink"}
JETSON = DESKTOP | {"nvarguscamerasrc", "nvvidconv", "nvv4l2decoder", "nvjpegdec"}

NEWEST = "appsink name=frames max-buffers=1 drop=true sync=false"
EXPECTED = {
    ("csi", "1", "jetson"): "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=1920,height=1080,framerate=30/1 ! nvvidconv"
    f" ! video/x-raw,format=RGBA ! {NEWEST}",
    ("device", "/dev/video0", "jetson"): f'v4l2src device="/dev/video0" ! decodebin ! nvvidconv ! video/x-raw,format=RGBA ! {NEWEST}',
    ("device", "/dev/video0", "desktop"): f'v4l2src device="/dev/video0" ! decodebin ! videoconvert ! video/x-raw,format=RGBA ! {NEWEST}',
    ("rtsp", "rtsp://cam/1", "jetson"): 'rtspsrc location="rtsp://cam/1" protocols=tcp latency=100 ! application/x-rtp,media=video'
    f" ! decodebin ! nvvidconv ! video/x-raw,format=RGBA ! {NEWEST}",
    ("rtsp", "rtsp://cam/1", "desktop"): 'rtspsrc location="rtsp://cam/1" protocols=tcp latency=100 ! application/x-rtp,media=video'
    f" ! decodebin ! videoconvert ! video/x-raw,format=RGBA ! {NEWEST}",
    ("file", "a.mp4", "jetson"): 'filesrc location="a.mp4" ! decodebin ! nvvidconv ! video/x-raw,format=RGBA'
    " ! videoflip video-direction=auto ! appsink name=frames max-buffers=1 drop=true sync=true",
    ("file", "a.mp4", "desktop"): 'filesrc location="a.mp4" ! decodebin ! videoconvert ! video/x-raw,format=RGBA'
    " ! videoflip video-direction=auto ! appsink name=frames max-buffers=1 drop=true sync=true",
}


def having(elements: set[str]) -> Callable[[str], bool]:
    return elements.__contains__


@pytest.mark.parametrize(("kind", "name", "machine"), EXPECTED)
def test_the_pipelines(kind: str, name: str, machine: str) -> None:
    found = pipeline(kind, name, having(JETSON if machine == "jetson" else DESKTOP))
    assert found == EXPECTED[kind, name, machine]


def test_a_file_whose_frames_all_count() -> None:
    assert pipeline("file", "a.mp4", having(DESKTOP), realtime=False).endswith("max-buffers=1 drop=false sync=false")
    assert pipeline("rtsp", "rtsp://a", having(DESKTOP), realtime=False).endswith(NEWEST)


@pytest.mark.parametrize(
    ("kind", "has", "says"),
    [
        ("csi", DESKTOP, "GStreamer has no nvarguscamerasrc and nvvidconv, which a CSI camera needs; on a Jetson, run: sudo apt install"),
        ("rtsp", DESKTOP - {"rtspsrc"}, "GStreamer has no rtspsrc; run: sudo apt install python3-gi"),
        ("file", set[str](), "GStreamer has no videoconvert and appsink and decodebin and filesrc and videoflip; run: sudo apt"),
    ],
)
def test_elements_that_are_missing(kind: str, has: set[str], says: str) -> None:
    with pytest.raises(FastVLMError) as error:
        pipeline(kind, "0", having(has))
    assert str(error.value).startswith(says)


def test_values_are_quoted() -> None:
    assert quoted('a "b" \\ ! c') == '"a \\"b\\" \\\\ ! c"'
