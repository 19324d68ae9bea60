"""Addresses of pictures to encoded pictures. One that was sent before is found by its bytes, and is neither decoded nor encoded again."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from fastvlm_edge.backends import malloc
from fastvlm_edge.camera.clip import frames_of_clip
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.cascade import ImageSize
from fastvlm_edge.generation.images import EncodedImage, SizedImage
from fastvlm_edge.inputs.image_input import load_rgb
from fastvlm_edge.server import media
from fastvlm_edge.server.errors import RequestError, failed, refused
from fastvlm_edge.server.settings import Settings

_KNOWN = 4096
"""Pictures whose keys are kept, 64 bytes each. Their features are in the cache of the runtime, as long as that has room."""

_CLIP_SECONDS = 30.0
"""Longest time that reading a clip may take."""
_MANY_PIXELS = 1 << 22
"""More than 12 MB in Pillow."""
_TRIM_SECONDS = 5.0
_LONG = 1 << 20
"""Bytes that are hashed in about a millisecond."""


@dataclass(frozen=True)
class Picture:
    """A picture of a request."""

    url: str
    param: str
    """Its place in the request, for errors."""
    image_size: ImageSize = "auto"
    """What its `detail` stands for."""
    frames: int = 0
    """Most pictures that stand for it, if it is a clip."""

    @property
    def most(self) -> int:
        """Most pictures that the model sees of it."""
        return self.frames or 1


@dataclass
class Encoded:
    """The pictures of a conversation, and what they took so far."""

    images: list[EncodedImage | SizedImage] = field(default_factory=list)
    """Those of the question."""
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    undecided: list[bytes] = field(default_factory=list)
    """Names of the pictures (`KnownPictures`) whose size a cascade decides."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """The values of the _KNOWN keys that were used last. Threads may share it."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > _KNOWN:
                self._values.popitem(last=False)


class KnownPictures:
    """What is known of pictures that were sent before, for one model, geometry and background."""

    def __init__(self) -> None:
        self.keys: _Recent[tuple[bytes, int], bytes] = _Recent()
        """sha256 of a file or `data:` address, and a size -> key of the picture in it (`images.image_key`)."""
        self.sizes: _Recent[bytes, int] = _Recent()
        """sha256 of an address -> the size at which an answer of a cascade stood. A follow-up question keeps it."""


async def encode(
    pictures: Sequence[Picture], total: Encoded, vlm: AsyncFastVLM, settings: Settings, known: KnownPictures
) -> list[EncodedImage]:
    """Read and encode pictures, one after another; those of `auto` at the size at which they were answered, or the default one.

    The times are added to `total`. Raises RequestError, with the place in the request of what cannot be read.
    """
    images = []
    for picture in pictures:
        size = picture.image_size
        if size == "auto":
            size = known.sizes.get(await _sha256(picture.url.encode()))
        images += await _Source(picture, total, vlm, settings, known).read(vlm.vlm.fixed_size(size))
    return images


async def encode_question(pictures: Sequence[Picture], total: Encoded, vlm: AsyncFastVLM, settings: Settings, known: KnownPictures) -> None:
    """The same for a question. If all are of `auto` and a cascade was fitted, they are encoded at its first size, and later at others."""
    cascade = vlm.vlm.manifest.cascade
    if cascade is None or any(picture.image_size != "auto" for picture in pictures):
        total.images += await encode(pictures, total, vlm, settings, known)
        return
    for picture in pictures:
        source = _Source(picture, total, vlm, settings, known)
        count = len(await source.read(cascade.sizes[0]))
        total.images += [SizedImage(partial(source.at, index)) for index in range(count)]
        total.undecided.append(await _sha256(picture.url.encode()))


class _Source:
    """A picture or clip of a request, encoded at the sizes that are asked for."""

    def __init__(self, picture: Picture, total: Encoded, vlm: AsyncFastVLM, settings: Settings, known: KnownPictures) -> None:
        """The times are added to `total`."""
        self._picture, self._total, self._vlm, self._settings, self._known = picture, total, vlm, settings, known
        self._data: bytes | None = None
        self._digest: bytes | None = None
        self._images: dict[int, list[EncodedImage]] = {}
        self._lock = threading.Lock()
        """Held while another size is encoded."""

    async def read(self, size: int) -> list[EncodedImage]:
        """The picture, or the frames of the clip. Raises RequestError, with its place in the request, if it cannot be read."""
        began = time.perf_counter()
        self._images[size] = images = await self._clip(size) if self._picture.frames else [await self._encode(size)]
        self._count(images, began)
        return images

    def at(self, index: int, size: int) -> EncodedImage:
        """One of them at a size that is perhaps another one. It is called in a thread."""
        with self._lock:
            if size not in self._images:
                began = time.perf_counter()
                self._images[size] = images = self._again(size)
                self._count(images, began)
            return self._images[size][index]

    def _count(self, images: list[EncodedImage], began: float) -> None:
        vision_ms = sum(image.vision_ms for image in images)
        self._total.vision_ms += vision_ms
        self._total.preprocess_ms += (time.perf_counter() - began) * 1e3 - vision_ms

    async def _encode(self, size: int) -> EncodedImage:
        picture, vlm = self._picture, self._vlm
        if picture.url.startswith("data:"):  # the address is the picture
            self._digest = await _sha256(picture.url.encode())
            if (image := self._recalled(size)) is not None:
                return image
        try:
            self._data = await media.picture(picture.url, self._settings)
        except RequestError as error:
            raise error.at(picture.param) from None
        if self._digest is None:
            self._digest = await _sha256(self._data)
            if (image := self._recalled(size)) is not None:
                return image
        try:
            rgb = await asyncio.to_thread(load_rgb, self._data, vlm.vlm.background)
        except FastVLMError as error:
            _trim_soon()
            raise refused(error, picture.param) from None
        if rgb.width * rgb.height >= _MANY_PIXELS:
            _trim_soon()
        try:
            image = await vlm.encode_image(rgb, image_size=size)
        except FastVLMError as error:
            raise failed(error) from error
        self._known.keys.put((self._digest, size), image.key)
        return image

    async def _clip(self, size: int) -> list[EncodedImage]:
        """Frames of a clip. Its file may be as large as a request."""
        clip, settings = self._picture, self._settings
        _trim_soon()
        try:
            self._data = await media.picture(clip.url, replace(settings, max_image_bytes=settings.max_body_bytes, max_pixels=None))
            frames = await asyncio.to_thread(frames_of_clip, self._data, clip.frames, max_seconds=_CLIP_SECONDS)
        except RequestError as error:
            raise error.at(clip.param) from None
        except FastVLMError as error:
            raise refused(error, clip.param) from None
        try:
            return [await self._vlm.encode_image(frame, image_size=size) for frame in frames]
        except FastVLMError as error:
            raise failed(error) from error

    def _again(self, size: int) -> list[EncodedImage]:
        vlm, picture = self._vlm.vlm, self._picture
        if picture.frames:
            assert self._data is not None
            return [vlm.encode_image(frame, image_size=size) for frame in frames_of_clip(self._data, picture.frames)]
        if (image := self._recalled(size)) is None:
            data = media.data_url(picture.url, self._settings.max_image_bytes) if self._data is None else self._data
            image = vlm.encode_image(data, image_size=size)
            assert self._digest is not None
            self._known.keys.put((self._digest, size), image.key)
        return [image]

    def _recalled(self, size: int) -> EncodedImage | None:
        assert self._digest is not None
        key = self._known.keys.get((self._digest, size))
        return None if key is None else self._vlm.vlm.recall_image(key)


def _trim_soon() -> None:
    """Return memory to the system once what is read now is done with: the C library keeps a large part of what pictures took."""
    loop = asyncio.get_running_loop()
    loop.call_later(_TRIM_SECONDS, loop.run_in_executor, None, malloc.trim)


async def _sha256(data: bytes) -> bytes:
    """In a thread if it takes longer than waking one."""
    return hashlib.sha256(data).digest() if len(data) < _LONG else await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
