"""Addresses of pictures to encoded pictures. One that was sent before is found by its bytes, and is neither decoded nor encoded again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fastvlm_edge.backends import malloc
from fastvlm_edge.camera.clip import frames_of_clip
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.images import EncodedImage
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
    frames: int = 0
    """Most pictures that stand for it, if it is a clip."""

    @property
    def most(self) -> int:
        """Most pictures that the model sees of it."""
        return self.frames or 1


@dataclass
class Encoded:
    """Encoded pictures, and what they took."""

    images: list[EncodedImage] = field(default_factory=list)
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0


class KnownPictures:
    """sha256 of a file or `data:` address -> key of the picture in it (`images.image_key`), for one model, geometry and background."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, data: bytes) -> bytes | None:
        """The key of a picture that was sent before."""
        key = self._keys.get(data)
        if key is not None:
            self._keys.move_to_end(data)
        return key

    def put(self, data: bytes, key: bytes) -> None:
        """Remember a picture."""
        self._keys[data] = key
        self._keys.move_to_end(data)
        while len(self._keys) > _KNOWN:
            self._keys.popitem(last=False)


async def encode(pictures: Sequence[Picture], vlm: AsyncFastVLM, settings: Settings, known: KnownPictures) -> Encoded:
    """Read and encode pictures, one after another. Raises RequestError, with the place in the request of what cannot be read."""
    encoded = Encoded()
    for picture in pictures:
        began = time.perf_counter()
        images = await _clip(picture, vlm, settings) if picture.frames else [await _encode(picture, vlm, settings, known)]
        vision_ms = sum(image.vision_ms for image in images)
        encoded.vision_ms += vision_ms
        encoded.preprocess_ms += (time.perf_counter() - began) * 1e3 - vision_ms
        encoded.images += images
    return encoded


async def _encode(picture: Picture, vlm: AsyncFastVLM, settings: Settings, known: KnownPictures) -> EncodedImage:
    digest = await _sha256(picture.url.encode()) if picture.url.startswith("data:") else None  # the address is the picture
    if digest is not None and (image := _recalled(digest, vlm, known)) is not None:
        return image
    try:
        source = await media.picture(picture.url, settings)
    except RequestError as error:
        raise error.at(picture.param) from None
    if digest is None and isinstance(source, bytes):
        digest = await _sha256(source)
        if (image := _recalled(digest, vlm, known)) is not None:
            return image
    try:
        rgb = await asyncio.to_thread(load_rgb, source, vlm.vlm.background)
    except FastVLMError as error:
        _trim_soon()
        raise refused(error, picture.param) from None
    if rgb.width * rgb.height >= _MANY_PIXELS:
        _trim_soon()
    try:
        image = await vlm.encode_image(rgb)
    except FastVLMError as error:
        raise failed(error) from error
    if digest is not None:
        known.put(digest, image.key)
    return image


async def _clip(clip: Picture, vlm: AsyncFastVLM, settings: Settings) -> list[EncodedImage]:
    """Frames of a clip. Its file may be as large as a request."""
    _trim_soon()
    try:
        data = await media.picture(clip.url, replace(settings, max_image_bytes=settings.max_body_bytes, max_pixels=None))
        frames = await asyncio.to_thread(frames_of_clip, data, clip.frames, max_seconds=_CLIP_SECONDS)
    except RequestError as error:
        raise error.at(clip.param) from None
    except FastVLMError as error:
        raise refused(error, clip.param) from None
    try:
        return [await vlm.encode_image(frame) for frame in frames]
    except FastVLMError as error:
        raise failed(error) from error


def _trim_soon() -> None:
    """Return memory to the system once what is read now is done with: the C library keeps a large part of what pictures took."""
    loop = asyncio.get_running_loop()
    loop.call_later(_TRIM_SECONDS, loop.run_in_executor, None, malloc.trim)


def _recalled(digest: bytes, vlm: AsyncFastVLM, known: KnownPictures) -> EncodedImage | None:
    key = known.get(digest)
    return None if key is None else vlm.vlm.recall_image(key)


async def _sha256(data: bytes) -> bytes:
    """In a thread if it takes longer than waking one."""
    return hashlib.sha256(data).digest() if len(data) < _LONG else await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
