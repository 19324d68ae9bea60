"""GStreamer pipelines as text, for a Jetson and for other computers. `gst-launch-1.0` takes the same text."""

from __future__ import annotations

from collections.abc import Callable

from fastvlm_edge.errors import FastVLMError

SINK = "frames"
"""The name of the last element, which hands out RGBA frames."""
LATENCY_MS = 100
"""How long rtspsrc keeps packets to put them in order. Its default is 2 seconds."""
CSI_CAPS = "video/x-raw(memory:NVMM),width=1920,height=1080,framerate=30/1"
"""What a CSI camera is asked for. Sensors of a Jetson have this mode."""
HARDWARE_DECODERS = ("nvv4l2decoder", "nvjpegdec")
"""Elements of a Jetson that `decodebin` prefers if they exist."""


def pipeline(kind: str, name: str, has: Callable[[str], bool], *, realtime: bool = True) -> str:
    """The pipeline for a source of a kind and name as in `sources.Source`; `has` tells whether an element exists.

    A source that is live, or a file with `realtime`, gives only its newest frame. Raises FastVLMError if an element is missing.
    """
    # nvvidconv takes frames in the memory of the video engine or in that of the CPU.
    to_rgba = "nvvidconv" if has("nvvidconv") else "videoconvert"
    needs = [to_rgba, "appsink", "decodebin"]
    parts: tuple[str, ...]
    if kind == "csi":
        needs = ["nvarguscamerasrc", "nvvidconv", "appsink"]
        parts = (f"nvarguscamerasrc sensor-id={name}", CSI_CAPS)
    elif kind == "device":
        needs.append("v4l2src")
        parts = (f"v4l2src device={quoted(name)}", "decodebin")
    elif kind == "rtsp":
        needs.append("rtspsrc")
        parts = (f"rtspsrc location={quoted(name)} protocols=tcp latency={LATENCY_MS}", "application/x-rtp,media=video", "decodebin")
    else:
        needs += ["filesrc", "videoflip"]
        parts = (f"filesrc location={quoted(name)}", "decodebin")
    if missing := [element for element in needs if not has(element)]:
        raise _missing(kind, missing)
    parts = (*parts, to_rgba, "video/x-raw,format=RGBA")
    if kind == "file":
        parts = (*parts, "videoflip video-direction=auto")  # as the file says that it was filmed
    waits = "sync=false" if kind != "file" or not realtime else "sync=true"
    drops = "drop=false" if kind == "file" and not realtime else "drop=true"
    return " ! ".join((*parts, f"appsink name={SINK} max-buffers=1 {drops} {waits}"))


def quoted(text: str) -> str:
    """A value in the syntax of `gst-launch-1.0`."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _missing(kind: str, elements: list[str]) -> FastVLMError:
    names = " and ".join(elements)
    if kind == "csi" and "nvarguscamerasrc" in elements:
        return FastVLMError(
            f"GStreamer has no {names}, which a CSI camera needs", "on a Jetson, run: sudo apt install nvidia-l4t-gstreamer"
        )
    return FastVLMError(f"GStreamer has no {names}", f"run: {APT}")


APT = (
    "sudo apt install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-bad gstreamer1.0-libav"
)
"""Installs GStreamer with its Python bindings on Debian, Ubuntu and JetPack."""
