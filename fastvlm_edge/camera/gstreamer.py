"""Reads a source with GStreamer, through the system's Python bindings (`gi`), which no wheel has."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm_edge.camera.frame import Frame, SourceError
from fastvlm_edge.camera.pipeline import APT, HARDWARE_DECODERS, SINK
from fastvlm_edge.errors import FastVLMError, one_line

OPEN_SECONDS = 20.0
"""How long a source may take until its first frame."""
SILENT_SECONDS = 10.0
"""After this time without a frame, a live source counts as broken."""
_POLL_SECONDS = 0.1
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
"""Where Debian, Ubuntu and JetPack install Python packages of the system."""


def gi_missing(system: Path = SYSTEM_PACKAGES) -> FastVLMError | None:
    """The error if Python cannot load GStreamer's bindings; None if it can."""
    try:
        _gst()
    except ModuleNotFoundError:
        what = "Python has no gi, through which GStreamer is used"
        if (system / "gi").is_dir() and sys.prefix != sys.base_prefix:
            mend = "make the virtual environment again with the system's Python: python3 -m venv --system-site-packages"
            return FastVLMError(f"{what}; the system has it, but this virtual environment does not see it", mend)
        return FastVLMError(what, f"run: {APT}")
    except (ImportError, ValueError) as error:  # ValueError: the namespace is missing
        return FastVLMError(f"GStreamer cannot be loaded ({one_line(error)})", f"run: {APT}")
    return None


def _gst() -> Any:
    gi = import_module("gi")
    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")
    gst = import_module("gi.repository.Gst")
    import_module("gi.repository.GstApp")  # appsink then has methods, which wait without holding Python's lock
    if not gst.is_initialized():
        gst.init(None)
        for name in HARDWARE_DECODERS:
            factory = gst.ElementFactory.find(name)
            if factory is not None:
                factory.set_rank(gst.Rank.PRIMARY + 100)
    return gst


class GStreamerReader:
    """A pipeline that is running."""

    def __init__(
        self, describe: Callable[[Callable[[str], bool]], str], name: str, *, secret: str | None = None, live: bool, files: bool
    ) -> None:
        """`describe` gets a function that tells whether an element exists, and returns the pipeline.

        `name` stands for `secret`, an address with a password, in errors. `files`: frames have positions. Raises SourceError if no frame
        comes.
        """
        self._gst = gst = _gst()
        self._name, self._secret, self._live, self._files = name, secret, live, files
        self._closed = threading.Event()
        self._first: Any = None
        description = describe(lambda element: gst.ElementFactory.find(element) is not None)
        try:
            self._pipeline = gst.parse_launch(description)
        except Exception as error:  # GLib.Error, a class of gi
            raise FastVLMError(f"{name} cannot be opened: GStreamer says {self._told(one_line(error))}") from None
        self._sink = self._pipeline.get_by_name(SINK)
        self._bus = self._pipeline.get_bus()
        self._pipeline.set_state(gst.State.PLAYING)
        try:
            self._first = self._pull(OPEN_SECONDS)
            if self._first is None:
                raise SourceError(f"{name} has no frame", "give a file with video" if files else None)
        except BaseException:
            self.close()
            raise

    def read(self) -> Frame | None:
        sample, self._first = self._first, None
        if sample is None:
            sample = self._pull(SILENT_SECONDS if self._live else None)
        return None if sample is None else self._frame(sample)

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._pipeline.set_state(self._gst.State.NULL)

    def _pull(self, most_seconds: float | None) -> Any:
        """The next sample. None at the end of a file, or after `close`."""
        end = None if most_seconds is None else time.monotonic() + most_seconds
        while not self._closed.is_set():
            sample = self._sink.try_pull_sample(int(_POLL_SECONDS * self._gst.SECOND))
            if sample is not None:
                return sample
            if self._closed.is_set():
                return None
            message = self._bus.pop_filtered(self._gst.MessageType.ERROR)
            if message is not None:
                raise SourceError(f"{self._name}: {self._told(message.parse_error()[0].message)}")
            if self._sink.is_eos():
                if self._live:
                    raise SourceError(f"{self._name} ended")
                return None
            if end is not None and time.monotonic() > end:
                raise SourceError(f"{self._name} gave no frame for {most_seconds:g} s")
        return None

    def _frame(self, sample: Any) -> Frame:
        buffer = sample.get_buffer()
        position = None
        if self._files and buffer.pts != self._gst.CLOCK_TIME_NONE:
            position = sample.get_segment().to_stream_time(self._gst.Format.TIME, buffer.pts) / self._gst.SECOND
        return Frame(lambda: _picture(sample), position)

    def _told(self, text: str) -> str:
        """A message of GStreamer in one line, without the password of the address."""
        text = " ".join(text.split()).rstrip(".")
        return text if self._secret is None else text.replace(self._secret, self._name)


def _picture(sample: Any) -> Image.Image:
    structure = sample.get_caps().get_structure(0)
    size = structure.get_value("width"), structure.get_value("height")
    buffer = sample.get_buffer()
    data = buffer.extract_dup(0, buffer.get_size())
    return Image.frombytes("RGB", size, data, "raw", "RGBX")
