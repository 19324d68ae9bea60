"""A video clip as several pictures of one question: frames spread evenly over it, as fine-tuners train it."""

from __future__ import annotations

import bisect
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image

from fastvlm_edge.camera.pyav import decode, open_bytes, open_file, packets_of, upright, video_of
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.limits import IMAGE_SIZES, MIN_ANSWER
from fastvlm_edge.model_dir.manifest import Manifest, visual_tokens

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

FRAMES = 8
"""How many frames stand for a clip by default."""


def frames_of_clip(
    clip: str | os.PathLike[str] | bytes,
    frames: int = FRAMES,
    *,
    max_seconds: float | None = None,
    check: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Pictures that stand for a clip: it is divided into `frames` parts of the same duration, and each gives the frame at its middle.

    `clip` is a path, or the bytes of a file. The pictures are RGB and upright, in their order. A clip with fewer frames gives each once.
    A frame that is damaged is replaced by the next one that is not. `check` is called with the number of pictures before they take memory,
    and may raise an error.

    Raises FastVLMError if the clip cannot be read or has no frame, if reading takes more than `max_seconds`, or if the package av is
    missing (the extra `camera`).
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise FastVLMError(f"frames is {frames!r}", "give a number of at least 1")
    name = "the clip" if isinstance(clip, bytes) else os.fspath(clip)
    end = None if max_seconds is None else time.monotonic() + max_seconds

    def open_clip() -> InputContainer:
        return open_bytes(io.BytesIO(clip), name) if isinstance(clip, bytes) else open_file(name)

    def check_time() -> None:
        if end is not None and time.monotonic() > end:
            raise FastVLMError(f"{name} takes more than {max_seconds:g} seconds to read", "give a shorter clip, or one of fewer pixels")

    with open_clip() as container:
        timeline = _timeline(container, name, check_time)
    wanted = _middles(timeline, frames)
    if check is not None:
        check(len(wanted))
    with open_clip() as container:
        pictures = [upright(frame) for frame in _decode(container, name, timeline, wanted, check_time)]
    if not pictures:
        raise FastVLMError(f"{name} has no frame that can be decoded", "check the file")
    return pictures


@dataclass(frozen=True)
class _Timeline:
    """The packets of a video in the order of the file, each of which is a frame."""

    times: list[int]
    """When each is shown, in units of the stream, or its number if the file does not say it for all."""
    keys: list[int]
    """Which of them can be decoded without those before."""
    shown: list[int]
    """The times of those that are shown, in order."""
    end: int
    timed: bool


def _timeline(container: InputContainer, name: str, check_time: Callable[[], None]) -> _Timeline:
    """Read the packets without decoding them: the duration in the header of a file may be missing or wrong."""
    times: list[int | None] = []
    keys, hidden = [], set()
    for packet in packets_of(container, video_of(container, name)):
        check_time()
        if packet.is_keyframe:
            keys.append(len(times))
        if packet.is_discard:  # by an edit list
            hidden.add(len(times))
        times.append(packet.pts)
    known = [at for at in times if at is not None]
    timed = len(known) == len(times)
    if not timed:
        known, keys, hidden = list(range(len(times))), [0], set()
    shown = sorted({at for index, at in enumerate(known) if index not in hidden})
    gaps = sorted(later - at for at, later in pairwise(shown))
    last = gaps[len(gaps) // 2] if gaps else 1  # files may be wrong about how long the last frame is shown
    return _Timeline(known, keys, shown, shown[-1] + last if shown else 0, timed)


def _middles(timeline: _Timeline, parts: int) -> list[int]:
    """The times of the frames that are shown at the middles of so many parts, each once."""
    if not timeline.shown:
        return []
    begin = timeline.shown[0]
    middles = [begin + (timeline.end - begin) * (2 * part + 1) / (2 * parts) for part in range(parts)]
    return sorted({timeline.shown[bisect.bisect_right(timeline.shown, middle) - 1] for middle in middles})


def _decode(
    container: InputContainer, name: str, timeline: _Timeline, wanted: list[int], check_time: Callable[[], None]
) -> Iterator[VideoFrame]:
    """The frames at the `wanted` times. Only what they need is decoded: from the key frame before each."""
    stream = video_of(container, name)
    starts = [_key_before(timeline, at) for at in wanted]
    decoding = False
    count = done = 0
    last: VideoFrame | None = None
    packets = packets_of(container, stream)
    index = -1
    while done < len(wanted):
        check_time()
        packet = next(packets, None)
        index += 1
        if packet is not None and index < starts[done]:
            decoding = False
            continue
        if not decoding:
            stream.codec_context.flush_buffers()
            decoding = True
        for frame in decode(stream, packet):
            at = frame.pts if timeline.timed else count
            count += 1
            if at is None or done == len(wanted):
                continue
            last = frame
            if at >= wanted[done]:
                while done < len(wanted) and at >= wanted[done]:
                    done += 1
                last = None
                yield frame
        if packet is None:
            break
    if last is not None:  # what was wanted next is damaged, and so is the rest
        yield last


def _key_before(timeline: _Timeline, at: int) -> int:
    """Number of the packet from which on the frame at a time can be decoded."""
    number = timeline.times.index(at)
    return max((key for key in timeline.keys if key <= number and timeline.times[key] <= at), default=0)


def check_frames(
    manifest: Manifest,
    tokenizer: TextTokenizer,
    prompt: str,
    frames: int,
    *,
    image_size: int | None = None,
    system: str | None = None,
    special_tokens: bool = False,
) -> None:
    """Raise FastVLMError if so many frames and the question leave no room for a reply, with the number or the size that would fit."""
    template = ChatTemplate(tokenizer, manifest)
    vision = manifest.vision if image_size is None else manifest.vision.at(image_size)
    tokens, context = vision.tokens, manifest.decoder.context
    one, two = (len(template.opening(system)) + len(template.turn(prompt, [tokens] * n, special_tokens=special_tokens)) for n in (1, 2))
    between = two - one - tokens
    """Tokens that stand between two frames."""
    text = one - tokens - between
    need = text + frames * (tokens + between)
    if need < context:
        return
    room = context - text - MIN_ANSWER
    advice = ["convert with a larger --context"]
    fitting = [size for size in IMAGE_SIZES if frames * (visual_tokens(size) + between) <= room]
    if fitting:
        known = [size for size in fitting if size in manifest.vision.sizes]
        advice.insert(0, f"{'give' if known else 'convert with'} --image-size {(known or fitting)[-1]}, which has room for {frames}")
    most = room // (tokens + between)
    advice.insert(0, f"take at most {most} frame{'s' * (most != 1)}" if most > 0 else "shorten the question")
    raise FastVLMError(
        f"{frames} frame{'s' * (frames != 1)} of {tokens} tokens each and the question are {need} tokens, "
        f"which leaves no room for a reply in the context of {context}",
        ", or ".join(advice),
    )
