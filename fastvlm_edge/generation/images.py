"""Pictures after the vision encoder, and a cache that finds them by their content."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import ImageFeatures
from fastvlm_edge.inputs.image_input import ImageInput
from fastvlm_edge.model_dir.manifest import STRIDE, Manifest, visual_tokens


class EncodedImage:
    """An image after the vision encoder. Pass it as `image` to ask about the same image again without encoding it again."""

    def __init__(
        self,
        image_features: ImageFeatures,
        key: bytes,
        pixels: NDArray[np.uint8] | None = None,
        *,
        preprocess_ms: float = 0.0,
        vision_ms: float = 0.0,
    ) -> None:
        """Made by `FastVLM.encode_image`. `key` is that of `image_key`.

        `pixels` is the picture that the encoder saw, [image_size, image_size, 3]. A chat saves it; caches are without. `preprocess_ms` and
        `vision_ms` are what `encode_image` took, as in `Timings`.
        """
        self.image_features = image_features
        self.key = key
        self.pixels = pixels
        self.preprocess_ms = preprocess_ms
        self.vision_ms = vision_ms

    @property
    def rows(self) -> int:
        """Number of visual tokens."""
        return self.image_features.rows

    @property
    def image_size(self) -> int:
        """Pixels of a side of the picture that the encoder saw."""
        return math.isqrt(self.rows) * STRIDE

    def numpy(self) -> NDArray[np.float32]:
        """A copy of the visual tokens: float32 [tokens, hidden]."""
        return self.image_features.numpy()

    def __repr__(self) -> str:
        return f"<EncodedImage of {self.image_size} px, {self.rows} visual tokens>"


@dataclass(frozen=True, eq=False)
class SizedImage:
    """An image of a caller who encodes it itself, when it is known at which size. The server has these."""

    at: Callable[[int], EncodedImage]


AnyImage: TypeAlias = "ImageInput | EncodedImage | SizedImage"
Images: TypeAlias = "AnyImage | Sequence[AnyImage] | None"
"""No image, one, or a list or tuple of images."""


def as_list(images: Images) -> list[AnyImage]:
    """The images one by one."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [cast("AnyImage", images)]


def rows_of(images: Images, size: int) -> list[int]:
    """Number of visual tokens of each image, if those that are not encoded yet will have this size."""
    return [image.rows if isinstance(image, EncodedImage) else visual_tokens(size) for image in as_list(images)]


def model_digest(manifest: Manifest) -> bytes:
    """What distinguishes this model from all others: the sha256 of all its files, in one."""
    return hashlib.sha256(repr(sorted((name, file.sha256) for name, file in manifest.files.items())).encode()).digest()


def image_key(pixel_values: NDArray[np.float32], model: bytes) -> bytes:
    """sha256 of a picture after preprocessing and of the model. Pictures with the same key have the same features."""
    digest = hashlib.sha256(model)
    digest.update(np.ascontiguousarray(pixel_values).data)
    return digest.digest()


class ImageCache:
    """Encoded images by key, at most `most_bytes` of features. The least recently used leaves first. Threads may share it."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0
        """Memory of the features that are kept."""

    def get(self, key: bytes) -> EncodedImage | None:
        """The image with this key, if it is kept."""
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def put(self, image: EncodedImage) -> None:
        """Keep an image, unless it alone is larger than the bound."""
        size = image.image_features.nbytes
        with self._lock:
            if size > self._most_bytes or image.key in self._images:
                return
            while self.nbytes + size > self._most_bytes:
                self.nbytes -= self._images.popitem(last=False)[1].image_features.nbytes
            self._images[image.key] = image
            self.nbytes += size

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._images.clear()
            self.nbytes = 0
