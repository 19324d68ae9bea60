"""Reads a source with PyAV, which brings FFmpeg's libraries with it (the extra `camera`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastvlm_edge.camera.frame import Frame, SourceError
from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.extras import missing_package, package_errors
from fastvlm_edge.inputs.rgb import LARGE

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

OPEN_SECONDS = 20.0
"""How long an address may take to answer."""
SILENT_SECONDS = 10.0
"""After this time without a packet, a stream counts as broken."""
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,hevc,m4v,mjpeg,mxf,nut,rm,yuv4mpegpipe"
"""Formats of files. Those that only name other files or addresses (playlists) are not among them."""
_LIVE: dict[str, dict[str, Any]] = {
    "device": {"format": "v4l2"},
    "rtsp": {"options": {"rtsp_transport": "tcp", "fflags": "nobuffer"}},
}
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def av_missing() -> FastVLMError | None:
    """The error if the package av is not installed."""
    return None if find_spec("av") is not None else missing_package("av", "reading video needs")


def load_av() -> Any:
    """The module `av`. Raises PackageError if it is not installed or cannot be loaded."""
    with package_errors("reading video needs"):
        import av
    return av


def open_file(path: str) -> InputContainer:
    """Open a video file. Raises SourceError if it is none, or holds no video."""
    return _open(f"file:{path}", path, options={"format_whitelist": FORMATS})


def open_bytes(file: Any, name: str) -> InputContainer:
    """Open a video file that is in memory, as `io.BytesIO`. Errors as in `open_file`, which call it `name`."""
    return _open(file, name, options={"format_whitelist": FORMATS})


def _open(file: Any, name: str, **options: Any) -> InputContainer:
    av = load_av()
    if int(av.__version__.partition(".")[0]) < 19:  # tags that are not UTF-8; newer versions always take them
        options["metadata_errors"] = "replace"
    try:
        container: InputContainer = av.open(file, **options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"{name} cannot be opened as video: {_reason(error)}") from None
    try:
        video_of(container, name)
    except BaseException:
        container.close()
        raise
    return container


def video_of(container: InputContainer, name: str) -> VideoStream:
    """The video of a file; covers of music are none. Raises SourceError if there is none, or its frames are too large."""
    av = load_av()
    for stream in container.streams.video:
        if stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise SourceError(f"the codec of {name} is not supported", "convert it to H.264")
        if stream.width * stream.height > LARGE:
            raise FastVLMError(f"{name} has frames of {stream.width} x {stream.height} pixels, more than {LARGE}", "scale it down first")
        return stream
    kinds = sorted({stream.type for stream in container.streams})
    raise SourceError(f"{name} has no video{', only ' + ' and '.join(kinds) if kinds else ''}", "give a file with video")


def packets_of(container: InputContainer, stream: VideoStream, *, live: bool = False) -> Iterator[Packet[Any]]:
    """The packets of a video. A file that breaks off ends there; for what is `live`, that is FFmpeg's error."""
    av = load_av()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, IndexError):  # IndexError: PyAV does not know a stream that begins in the middle of a file
            return
        except av.FFmpegError:
            if live:
                raise
            return
        if packet.size:  # the last one has nothing
            yield packet


def decode(stream: VideoStream, packet: Packet[Any] | None) -> list[VideoFrame]:
    """The frames that a packet completes, or after the last one (None) those that are left, without what is damaged."""
    av = load_av()
    try:
        return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
    except (av.FFmpegError, ValueError):  # decoders have many for damaged data; ValueError: an unknown codec
        return []


def decoded(container: InputContainer, stream: VideoStream, *, live: bool = False) -> Iterator[VideoFrame]:
    """All frames of a video that are not damaged. `live` is that of `packets_of`."""
    for packet in packets_of(container, stream, live=live):
        yield from decode(stream, packet)
    yield from decode(stream, None)


def upright(frame: VideoFrame) -> Image.Image:
    """The RGB picture of a frame, turned as the file says that it was filmed. Raises FastVLMError if its colours are of no known kind."""
    try:
        image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    except load_av().FFmpegError as error:
        raise FastVLMError(f"the video has frames that cannot be converted to RGB ({_reason(error)})", "convert it to H.264") from None
    turn = _TURNS.get(round(frame.rotation) % 360)  # counterclockwise, as Pillow's
    return image if turn is None else image.transpose(turn)


class PyAVReader:
    """A source that is open in FFmpeg."""

    def __init__(self, kind: str, address: str, name: str, *, realtime: bool) -> None:
        """`kind` is `file`, `device` or `rtsp`; `name` stands for the address in errors. Errors as in `open_source`."""
        self._name, self._live, self._address = name, kind != "file", address
        self._realtime = realtime and not self._live
        self._closed = threading.Event()
        self._lock = threading.Lock()
        """Held while FFmpeg reads, so that the container is not closed under it."""
        self._began: tuple[float, float] | None = None
        """Clock and position at the first frame of a file."""
        if self._live:
            self._container = _open(address, name, timeout=(OPEN_SECONDS, SILENT_SECONDS), **_LIVE[kind])
        else:
            self._container = open_file(address)
        self._stream = video_of(self._container, name)
        self._frames = decoded(self._container, self._stream, live=self._live)
        self._count = 0

    def read(self) -> Frame | None:
        with self._lock:
            if self._closed.is_set():
                return None
            try:
                frame = next(self._frames, None)
            except (load_av().FFmpegError, OSError) as error:
                raise SourceError(f"{self._name}: {_reason(error)}") from None
        if frame is None:
            if self._live:
                raise SourceError(f"{self._name} ended")
            return None
        position = None if self._live else self._position(frame)
        if self._realtime and position is not None and not self._wait_for(position):
            return None
        return Frame(lambda: upright(frame), position)

    def close(self) -> None:
        self._closed.set()
        if self._lock.acquire(timeout=1):  # otherwise FFmpeg waits for a camera, and its thread ends with the process
            try:
                self._container.close()
            finally:
                self._lock.release()

    def _position(self, frame: VideoFrame) -> float:
        """Seconds since the first frame. A file without times has those of its frame rate."""
        rate = self._stream.average_rate or 25
        at = float(frame.time) if frame.time is not None else self._count / float(rate)
        self._count += 1
        if self._began is None:
            self._began = time.monotonic(), at
        return max(0.0, at - self._began[1])

    def _wait_for(self, position: float) -> bool:
        """Wait until a camera would give the frame. False if the reader was closed."""
        assert self._began is not None
        return not self._closed.wait(max(0.0, self._began[0] + position - time.monotonic()))


def _reason(error: Exception) -> str:
    """What FFmpeg says, without the address, which may hold a password."""
    return getattr(error, "strerror", None) or one_line(error)
