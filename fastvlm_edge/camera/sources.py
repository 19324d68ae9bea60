"""What the word SOURCE stands for, and which reader opens it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from fastvlm_edge.camera.folder import FolderReader
from fastvlm_edge.camera.frame import Reader
from fastvlm_edge.camera.gstreamer import GStreamerReader, gi_missing
from fastvlm_edge.camera.pipeline import pipeline
from fastvlm_edge.camera.pyav import PyAVReader, av_missing
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.host import read_jetson
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.mistaken import is_address, looks_like_picture, shortened

READERS = ("auto", "gstreamer", "pyav")
_CSI = re.compile(r"csi:(\d{1,2})")
_KINDS = "a directory, a video file, /dev/video0, csi:0 or rtsp://..."


@dataclass(frozen=True)
class Source:
    """Where frames come from."""

    kind: Literal["folder", "file", "device", "csi", "rtsp"]
    name: str
    """A path, the number of a CSI camera, or an address."""

    @property
    def live(self) -> bool:
        """Whether frames come at their own time, and none can be fetched later."""
        return self.kind in ("device", "csi", "rtsp")

    def __str__(self) -> str:
        """The name for people, without a password."""
        if self.kind == "csi":
            return f"csi:{self.name}"
        return without_password(self.name) if self.kind == "rtsp" else self.name


def parse_source(text: str) -> Source:
    """Raises FastVLMError if there is no such source, or it is none that can be watched."""
    if csi := _CSI.fullmatch(text):
        return Source("csi", str(int(csi.group(1))))
    if text.lower().startswith(("rtsp://", "rtsps://")):
        if not _has_host(text):
            raise FastVLMError(f"{without_password(text)} names no host", "give rtsp://HOST:PORT/PATH")
        return Source("rtsp", text)
    if is_address(text):
        what = f"{shortened(without_password(text))} cannot be watched: of addresses, only rtsp:// and rtsps:// can"
        raise FastVLMError(what, f"give {_KINDS}")
    if os.path.isdir(text):
        return Source("folder", text)
    if os.path.isfile(text):
        if looks_like_picture(text):
            what = f"{text} is a picture, which does not change"
            raise FastVLMError(what, f"watch its directory, or run: fastvlm-edge run MODEL --image {shlex.quote(text)} QUESTION")
        return Source("file", text)
    if os.path.exists(text):
        return Source("device", text)
    if text.isdigit() and os.path.exists(f"/dev/video{text}"):
        raise FastVLMError(f"{text} is not a source", f"give /dev/video{text}")
    raise FastVLMError(f"{shortened(text)} does not exist", f"give {_KINDS}")


def open_source(source: Source, reader: str = "auto", *, realtime: bool = True) -> Reader:
    """Open a source with one of READERS; a folder needs none of them.

    With `realtime`, a video file gives its frames at the rate at which they were taken. Raises SourceError if the source cannot be opened
    now, and FastVLMError if it never can: the reader is not installed, or cannot read this kind of source.
    """
    if source.kind == "folder":
        return FolderReader(source.name)
    if chosen_reader(source, reader) == "pyav":
        return PyAVReader(source.kind, source.name, str(source), realtime=realtime)
    return GStreamerReader(
        lambda has: pipeline(source.kind, source.name, has, realtime=realtime),
        str(source),
        secret=source.name if source.kind == "rtsp" else None,
        live=source.live,
        files=source.kind == "file",
    )


def chosen_reader(source: Source, reader: str = "auto") -> str:
    """`gstreamer` or `pyav`. `auto` is GStreamer on a Jetson, where it decodes in hardware, otherwise PyAV, or the one that is installed.

    Raises FastVLMError if it cannot read the source, or is not installed.
    """
    if source.kind == "csi":
        if reader == "pyav":
            raise FastVLMError("PyAV cannot read a CSI camera", "leave out --reader")
        reader = "gstreamer"
    if reader != "auto":
        if (missing := _MISSING[reader]()) is not None:
            raise missing
        return reader
    order = ("gstreamer", "pyav") if read_jetson(Probe()) is not None else ("pyav", "gstreamer")
    for name in order:
        if _MISSING[name]() is None:
            return name
    mend = " or ".join(missing.mend for name in order if (missing := _MISSING[name]()) is not None and missing.mend)
    raise FastVLMError("neither PyAV nor GStreamer is installed, which read video", mend)


_MISSING: dict[str, Callable[[], FastVLMError | None]] = {"gstreamer": gi_missing, "pyav": av_missing}
"""Reader -> the error if it is not installed."""


def without_password(address: str) -> str:
    """The address without `user:password@` and without what follows `?`, where cameras also take passwords."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return f"{address.partition('://')[0]}://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "..." * bool(parts.query), ""))


def _has_host(address: str) -> bool:
    try:
        return bool(urlsplit(address).hostname)
    except ValueError:
        return False
