"""RGB image -> `pixel_values`, the input of `vision.onnx`.

FastVLM normalises with mean 0 and standard deviation 1, so pixel values are in 0..1. There are two geometries. `pad` is what training and
Apple's `predict.py` do: pad the image to a black square, then resize it (bicubic). `crop` is what the model card's image processor does:
resize the short side, then cut out the centre square.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvlm_edge.errors import FastVLMError, PictureError
from fastvlm_edge.inputs.image_input import ImageInput, load_rgb
from fastvlm_edge.inputs.rgb import Colour

GEOMETRIES = ("pad", "crop")
_BAND_PIXELS = 1 << 22
DECODED = 2
"""Pictures that a process decodes at a time. The memory that each needs is compared with what is free when it begins."""
_turns = threading.BoundedSemaphore(DECODED)
_alone = threading.Lock()


def preprocess_in_turn(image: ImageInput, image_size: int, geometry: str, background: Colour = "white") -> NDArray[np.float32]:
    """`preprocess`, for at most DECODED threads at a time. An image for which the memory is too small is tried again alone."""
    try:
        with _turns:
            return preprocess(image, image_size, geometry, background)
    except PictureError as error:
        if error.kind != "memory" or hasattr(image, "read"):  # a pipe is empty now
            raise
    with _alone, ExitStack() as turns:
        for _ in range(DECODED):
            turns.enter_context(_turns)
        return preprocess(image, image_size, geometry, background)


def preprocess(image: ImageInput, image_size: int, geometry: str, background: Colour = "white") -> NDArray[np.float32]:
    """One image, drawn over `background` where it is transparent -> pixel_values [1, 3, image_size, image_size] float32 in 0..1.

    Raises FastVLMError if the image cannot be read, is too large or too narrow, as `load_rgb` does.
    """
    if geometry not in GEOMETRIES:
        raise FastVLMError(f"unknown geometry {geometry!r}", f"use one of: {', '.join(GEOMETRIES)}")
    rgb = load_rgb(image, background)
    square = pad_and_resize(rgb, image_size) if geometry == "pad" else resize_and_crop(rgb, image_size)
    return to_pixel_values(np.asarray(square))


def to_pixel_values(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The square picture [image_size, image_size, 3] -> pixel_values [1, 3, image_size, image_size] float32 in 0..1."""
    planes = pixels.transpose(2, 0, 1)[np.newaxis]
    pixel_values: NDArray[np.float32] = np.divide(planes, np.float32(255), dtype=np.float32, order="C")
    return pixel_values


def to_pixels(pixel_values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The inverse of `to_pixel_values`, exactly."""
    pixels: NDArray[np.uint8] = np.rint(pixel_values[0] * 255).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def pad_and_resize(image: Image.Image, size: int) -> Image.Image:
    """Centre the image on a black square as wide as its long side, then resize to size x size (bicubic).

    The result is bit for bit that of padding first and resizing afterwards, but the padded square is never held in memory. Pillow resizes
    horizontally first, where rows do not depend on each other, so bands of rows are padded and shrunk one at a time.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    if image.width == image.height:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    shrunk = Image.new("RGB", (size, side))
    rows = max(1, _BAND_PIXELS // side)
    for y in range(0, image.height, rows):
        band = image.crop((0, y, image.width, min(y + rows, image.height)))
        if image.width < side:
            wide = Image.new("RGB", (side, band.height))
            wide.paste(band, (left, 0))
            band = wide
        shrunk.paste(band.resize((size, band.height), Image.Resampling.BICUBIC), (0, top + y))
    return shrunk.resize((size, size), Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bicubic) and keep the centre square.

    Sizes and offsets are rounded as in transformers' `CLIPImageProcessor`: the long side is int(size * long / short), and the offset is
    half of the remainder, rounded down.
    """
    short = min(image.size)
    whole = image.resize((int(size * image.width / short), int(size * image.height / short)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    return whole.crop((left, top, left + size, top + size))
