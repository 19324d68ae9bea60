"""A frame, and what every reader of a source offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from time import time as now
from typing import Protocol

from PIL import Image

from fastvlm_edge.errors import FastVLMError


class SourceError(FastVLMError):
    """A source that cannot be opened, or that broke. It may work again later."""


@dataclass(frozen=True)
class Frame:
    """One picture of a source. Its pixels are converted only if it is looked at."""

    picture: Callable[[], Image.Image]
    """The upright RGB picture. It raises FastVLMError if the picture cannot be read."""
    position: float | None = None
    """Seconds from the beginning of a video file; None for other sources."""
    file: str | None = None
    """The name of the picture in a folder; None for other sources."""
    time: float = field(default_factory=now)
    """When it came, in seconds since 1970; for a picture in a folder, when it was written."""
    arrived: float = field(default_factory=monotonic)
    """The same on the clock that latencies are measured with."""


class Reader(Protocol):
    """An open source. One thread reads; any thread may call `close`, which ends a `read` that waits."""

    def read(self) -> Frame | None:
        """Wait for the next frame. None at the end of a video file, or after `close`. Raises SourceError if the source broke."""

    def close(self) -> None:
        """Release the source. May be called twice."""
