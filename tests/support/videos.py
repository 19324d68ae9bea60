"""Video files whose frames carry their numbers, written with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

SIZE = (128, 96)
RATE = 10
"""Frames/s, which is also how long the last frame of a file is shown."""
_BITS = 8
_TICKS = 1000
_MATRICES = {
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}
"""Degrees clockwise -> a, b, c, d of the matrix of a track (ISO/IEC 14496-12, 8.3.2)."""


def numbered(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture whose upper half shows the bits of a number, the highest on the left, over a grey lower half."""
    width, height = size
    pixels = np.full((height, width, 3), 128, np.uint8)
    for bit in range(_BITS):
        white = number >> (_BITS - 1 - bit) & 1
        pixels[: height // 2, bit * width // _BITS : (bit + 1) * width // _BITS] = 235 if white else 20
    return Image.fromarray(pixels)


def number_in(image: Image.Image) -> int:
    """The number that `numbered` drew, from a decoded picture of any size. Raises ValueError if the lower half is not grey."""
    width, height = image.size
    grey = np.asarray(image.convert("L"), np.float32)
    if not 90 < grey[3 * height // 4].mean() < 160:
        raise ValueError(f"the lower half has brightness {grey[3 * height // 4].mean()}")
    row = grey[height // 8 : 3 * height // 8].mean(axis=0)
    return sum(
        int(row[(2 * bit + 1) * width // (2 * _BITS) - 2 : (2 * bit + 1) * width // (2 * _BITS) + 2].mean() > 128) << (_BITS - 1 - bit)
        for bit in range(_BITS)
    )


def write_video(
    path: Path,
    times: Sequence[float],
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = SIZE,
    key_every: int = 12,
    b_frames: int = 0,
    audio: bool = False,
    video: bool = True,
    numbers: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video with one `numbered` frame at each of `times`, in seconds; with `audio`, silence beside it. `options` are the container's."""
    numbers = range(len(times)) if numbers is None else numbers
    ticks = RATE if all(abs(at * RATE - round(at * RATE)) < 1e-6 for at in times) else _TICKS
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = None
        if video:
            stream = container.add_stream(codec, rate=RATE)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.time_base = Fraction(1, ticks)
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = key_every, b_frames
            stream.codec_context.bit_rate = 2_000_000
        sound: Any = container.add_stream("aac", rate=16000) if audio else None
        if sound is not None:
            seconds = max(times, default=1.0)
            for index in range(int(seconds * 16000 / 1024)):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, index * 1024
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        container.start_encoding()  # writes the header, also of a file without frames
        if stream is not None:
            for number, at in zip(numbers, times, strict=True):
                frame = av.VideoFrame.from_image(numbered(number, size))  # type: ignore[no-untyped-call]
                frame.time_base, frame.pts = Fraction(1, ticks), round(at * ticks)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def turn(path: Path, degrees: int) -> None:
    """Make a player turn the video of an mp4 file clockwise, as the file of a phone that was held upright does."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") - 4
    assert data[start + 8] == 0, "version 1 of tkhd has another layout"
    a, b, c, d = (value << 16 for value in _MATRICES[degrees])
    data[start + 48 : start + 84] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def cut(path: Path, share: float) -> Path:
    """Keep only the first part of a file, as after a power cut."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path
