"""Decoded pixels of any kind -> an RGB picture, in bands of rows: only one band at a time is held in a wider type.

Transparent pixels are drawn over a background. Grey of more than 8 bits is scaled by its range of values. A picture of more than LARGE
pixels is reduced in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from fastvlm_edge.errors import FastVLMError, PictureError

Colour: TypeAlias = "str | tuple[int, int, int]"
"""A name that Pillow knows, `#rrggbb`, or (red, green, blue), each from 0 to 255."""
RGB: TypeAlias = tuple[int, int, int]
Clear: TypeAlias = "int | tuple[int, ...] | None"
"""A transparent colour: grey, RGB, or none."""

LARGE = 1 << 25
"""Pixels of the largest picture that keeps its size: 33.5 megapixels, 134 MB in Pillow."""
_BAND_PIXELS = 1 << 20
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def to_colour(value: Colour) -> RGB:
    """Raises FastVLMError if `value` is not an opaque colour."""
    parts: tuple[int, ...] = ()
    if isinstance(value, (tuple, list)):
        parts = tuple(value)
    elif isinstance(value, str):
        try:
            parts = ImageColor.getrgb(value)
        except ValueError:
            parts = ()
    if len(parts) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in parts):
        raise FastVLMError(f"the background {value!r} is not a colour", "give a name such as white, #rrggbb, or (red, green, blue)")
    return parts[0], parts[1], parts[2]


def reduction(width: int, height: int) -> int:
    """1, 2, 4, ...: what both sides of a picture are divided by, so that at most LARGE pixels are left."""
    factor = 1
    while width * height > LARGE * factor * factor:
        factor *= 2
    return factor


def transparent_colour(image: Image.Image) -> Clear:
    """The one colour that a picture without alpha channel declares transparent (`tRNS` of a PNG), as its pixels are after decoding.

    Pillow gives it as the file stores it. The number of bits in the file is known only until the picture is loaded.
    """
    stored = image.info.get("transparency")
    raw = next((tile[3] for tile in getattr(image, "tile", ())), None)
    if image.mode == "RGB" and isinstance(stored, tuple) and len(stored) == 3:
        return tuple(part >> 8 for part in stored) if raw == "RGB;16B" else stored
    if image.mode == "1" and isinstance(stored, int):
        return 255 if stored else 0
    if image.mode in ("L", *_DEEP_MODES) and isinstance(stored, int):
        return stored * (85 if raw == "L;2" else 17 if raw == "L;4" else 1)
    return None


def picture_to_rgb(image: Image.Image, background: RGB, clear: Clear, name: str) -> Image.Image:
    """A loaded picture of any mode -> RGB, its sides divided by `reduction` and rounded up. `clear` is its `transparent_colour`.

    A picture that needs no change is returned itself. Raises FastVLMError, which calls the picture `name`, if values are not finite or
    Pillow cannot convert the mode.
    """
    width, height = image.size
    if image.mode == "RGB" and clear is None and reduction(width, height) == 1:
        return image

    def band(top: int, bottom: int) -> Image.Image:
        return image.crop((0, top, width, bottom))

    if image.mode in _DEEP_MODES:
        white = _white((np.asarray(band(top, bottom)) for top, bottom in _bands(width, height)), name)

        def read(top: int, bottom: int) -> Image.Image:
            values = np.asarray(band(top, bottom))
            return _clear(Image.fromarray(_grey_to_8_bit(values, white)).convert("RGB"), values, clear, background)

    elif image.mode in _ALPHA_MODES or (image.mode == "P" and image.has_transparency_data):

        def read(top: int, bottom: int) -> Image.Image:
            rows = band(top, bottom)
            if rows.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these only to LA and RGBA
                rows = rows.convert(rows.mode.upper())
            return _over(rows.convert("RGBA"), background)

    else:

        def read(top: int, bottom: int) -> Image.Image:
            rows = band(top, bottom)
            rows.info.pop("transparency", None)  # `clear` has it
            try:
                rgb = rows.convert("RGB")
            except ValueError:
                what = f"{name} has colour mode {image.mode}, which Pillow cannot convert to RGB"
                raise PictureError(what, "convert it to RGB first", kind="unsupported") from None
            values = None if clear is None else np.asarray(rgb if isinstance(clear, tuple) else rgb.getchannel("R"))
            return rgb if values is None else _clear(rgb, values, clear, background)

    return _in_bands(width, height, read)


def array_to_rgb(array: NDArray[Any], background: RGB) -> Image.Image:
    """An array [height, width], or [height, width, 3 or 4] with alpha last, of uint8, uint16, bool, or float in 0..1 -> RGB.

    It is reduced as by `picture_to_rgb`. Raises FastVLMError for another type, and for floats outside 0..1.
    """
    height, width = array.shape[:2]
    white = 1.0
    if array.dtype == np.uint16:
        white = _white([array], "the image array")
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of NaN
            what = f"the float image array has values from {low:g} to {high:g}, outside 0..1"
            raise FastVLMError(what, "divide by the value of white, or use uint8")
    elif array.dtype not in (np.uint8, np.bool_):
        raise FastVLMError(f"the image array has type {array.dtype}, not uint8, uint16, bool or float", "convert it first")

    def read(top: int, bottom: int) -> Image.Image:
        rows = array[top:bottom]
        if rows.dtype == np.bool_:
            rows = rows.astype(np.uint8) * np.uint8(255)
        elif rows.dtype == np.uint16:
            rows = _grey_to_8_bit(rows, white)
        elif rows.dtype != np.uint8:
            rows = np.rint(np.clip(rows.astype(np.float32), 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(rows))
        return _over(image, background) if image.mode == "RGBA" else image.convert("RGB")

    return _in_bands(width, height, read)


def _bands(width: int, height: int, factor: int = 1) -> Iterable[tuple[int, int]]:
    """(first row, end) of every band; bands begin at multiples of `factor`."""
    rows = max(1, _BAND_PIXELS // (width * factor)) * factor
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _in_bands(width: int, height: int, read: Callable[[int, int], Image.Image]) -> Image.Image:
    """The picture whose rows from `top` up to `bottom` are `read(top, bottom)`, an RGB picture; reduced by `reduction`."""
    factor = reduction(width, height)
    whole = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top, bottom in _bands(width, height, factor):
        rows = read(top, bottom)
        whole.paste(rows.reduce(factor) if factor > 1 else rows, (0, top // factor))
    return whole


def _over(rgba: Image.Image, background: RGB) -> Image.Image:
    drawn = Image.new("RGB", rgba.size, background)
    drawn.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return drawn


def _clear(rgb: Image.Image, values: NDArray[Any], clear: Clear, background: RGB) -> Image.Image:
    """The background where `values`, [rows, width] or [rows, width, 3], have the transparent colour."""
    if clear is not None:
        equal = values == np.asarray(clear)
        hidden = equal.all(axis=-1) if equal.ndim == 3 else equal
        rgb.paste(background, mask=Image.fromarray(hidden.astype(np.uint8) * np.uint8(255)))
    return rgb


def _white(bands: Iterable[NDArray[Any]], name: str) -> float:
    """The value that becomes 255: the first of 255 and 65,535, and for floats first 1, that no value exceeds, or else the largest value.

    8-bit values are often stored in 16 or 32 bits, and a 16-bit PNG may open in the 32-bit mode I.
    """
    largest = 0.0
    bounds: tuple[float, ...] = (255.0, 65535.0)
    for values in bands:
        if np.issubdtype(values.dtype, np.floating):
            bounds = (1.0, 255.0, 65535.0)
            if not np.isfinite(values).all():
                raise FastVLMError(f"{name} contains values that are not finite", "give numbers from 0 to 1")
        largest = max(largest, float(values.max()))
    return next((bound for bound in bounds if largest <= bound), largest)


def _grey_to_8_bit(values: NDArray[Any], white: float) -> NDArray[np.uint8]:
    """Scale 0..`white` to 0..255. Values outside are clipped."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # a table has no copies in a wider type
        table: NDArray[np.uint8] = _scale(np.arange(65536), white)[values]
        return table
    return _scale(values, white)


def _scale(values: NDArray[Any], white: float) -> NDArray[np.uint8]:
    return np.rint(np.clip(values * (1.0 / white), 0, 1) * 255).astype(np.uint8)
