"""Any picture a caller may hold -> an upright RGB `PIL.Image`. First step from picture to text, before `preprocess`.

Colour follows `Image.convert("RGB")`, which is what Apple's `predict.py` does: an alpha channel is dropped, not composited, so the colour
stored under transparent pixels shows. What Pillow would clip (16-bit and float grey) is scaled to 8 bits instead.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastvlm_edge.errors import FastVLMError

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]"

MAX_PIXELS = 178_956_970
"""The size at which Pillow itself refuses a picture as a decompression bomb (twice its default MAX_IMAGE_PIXELS)."""
MAX_SIDE = 65_535
"""The largest side a JPEG can have; bounds the working memory of padding."""
MAX_STREAM_BYTES = 1 << 29

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+://|data:)")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def load_rgb(source: ImageInput) -> Image.Image:
    """Open, decode and convert one picture: mode RGB, EXIF orientation applied, first frame of an animation.

    An array is [height, width], [height, width, 1], [height, width, 3] or [height, width, 4], as uint8, uint16, bool, or float in 0..1.
    A picture object that the caller passes in is not changed.

    Raises FastVLMError that names the picture and says what is wrong with it.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_stream(io.BytesIO(source), "the picture")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source)
    if hasattr(source, "read"):
        return _from_file_object(source)
    raise FastVLMError(
        f"a picture cannot be made from {type(source).__name__}; "
        "give a path, bytes, a file object, a PIL image or an array [height, width, 3]"
    )


def _from_path(source: str | os.PathLike[str]) -> Image.Image:
    path = os.fspath(source)
    if not path:
        raise FastVLMError("the picture's path is empty; give the path of a file")
    if _URL.match(path):
        shown = path if len(path) <= 80 else path[:77] + "..."
        raise FastVLMError(f"{shown} is a URL and nothing is downloaded here; download it first and give the path of the file")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FastVLMError(f"{path} is a directory; give the path of one picture")
        with open(path, "rb") as file:
            return _from_stream(file if stat.S_ISREG(mode) else _read_all(file, path), path)
    except FileNotFoundError:
        raise FastVLMError(f"{path} does not exist; check the path of the picture") from None
    except PermissionError:
        raise FastVLMError(f"{path} cannot be read: permission denied; check the rights of the file") from None
    except (OSError, ValueError) as error:
        raise FastVLMError(f"{path!r} cannot be read: {error}") from None


def _from_file_object(file: IO[bytes]) -> Image.Image:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else "the picture"
    try:
        seekable = file.seekable()
    except AttributeError:
        seekable = False
    return _from_stream(file if seekable else _read_all(file, name), name)


def _read_all(file: IO[bytes], name: str) -> io.BytesIO:
    """A pipe or a socket cannot be rewound, which decoding needs."""
    data = file.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise FastVLMError(f"{name} yields text, not bytes; open it in binary mode")
    if len(data) > MAX_STREAM_BYTES:
        raise FastVLMError(f"{name} is longer than {MAX_STREAM_BYTES >> 20} MiB; give a smaller picture")
    return io.BytesIO(data)


def _from_stream(file: IO[bytes], name: str) -> Image.Image:
    probe = file.read(1)
    if isinstance(probe, str):
        raise FastVLMError(f"{name} yields text, not bytes; open it in binary mode")
    if not probe:
        raise FastVLMError(f"{name} is empty (0 bytes); give a picture")
    file.seek(-1, io.SEEK_CUR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file)
    except UnidentifiedImageError:
        raise FastVLMError(f"{name} is not a picture in a format that Pillow reads (JPEG, PNG, WebP, GIF, TIFF, BMP, ...)") from None
    except Image.DecompressionBombError as error:
        raise FastVLMError(f"{name} is too large: {error}; scale it down first") from None
    except MemoryError:
        raise
    except Exception as error:
        raise FastVLMError(f"{name} is damaged or truncated: {_one_line(error)}") from None
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise FastVLMError(f"{name} is a PostScript document, not a picture; convert it to PNG first")
    return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.width, image.height, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _to_rgb(_upright(image), name)
    except (FastVLMError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise OSError, SyntaxError, struct.error, ValueError and more on damaged files.
        raise FastVLMError(f"{name} is damaged or truncated: {_one_line(error)}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_deep_grey_to_8_bit(np.asarray(image), name)).convert("RGB")
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these only to LA and RGBA
        return image.convert(image.mode.upper()).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise FastVLMError(f"{name} has colour mode {image.mode}, which Pillow cannot turn into RGB; convert it to RGB first") from None


def _deep_grey_to_8_bit(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Grey of more than 8 bits, scaled to 0..255.

    Integers are 16-bit (a 16-bit PNG may open in the 32-bit mode I) unless one exceeds 65,535. Floats are 0..1, 0..255 or 0..65535,
    the first of these that holds them. Beyond that, the largest value is white.
    """
    if not np.isfinite(values).all():
        raise FastVLMError(f"{name} holds values that are not finite; give numbers from 0 to 1")
    largest = float(values.max())
    ranges = (1.0, 255.0, 65535.0) if np.issubdtype(values.dtype, np.floating) else (65535.0,)
    white = next((bound for bound in ranges if largest <= bound), largest)
    return np.rint(np.clip(values * (1.0 / white), 0, 1) * 255).astype(np.uint8)


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape: Sequence[int] = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))):
        hint = "; transpose it to [height, width, 3]" if array.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise FastVLMError(f"a picture array is [height, width], [height, width, 3] or [height, width, 4], not {list(shape)}{hint}")
    _check_size(shape[1], shape[0], "the picture array")
    if array.ndim == 3:
        array = array[:, :, :3]
    return Image.fromarray(np.ascontiguousarray(_array_to_8_bit(array))).convert("RGB")


def _array_to_8_bit(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        black_white: NDArray[np.uint8] = array.astype(np.uint8) * np.uint8(255)
        return black_white
    if array.dtype == np.uint16:
        return np.rint(array * (255 / 65535)).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise FastVLMError(f"a picture array is uint8, uint16, bool, or float in 0..1, not {array.dtype}; convert it first")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of NaN
        raise FastVLMError(f"a float picture array is in 0..1, this one runs from {low:g} to {high:g}; divide by its white, or use uint8")
    return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise FastVLMError(f"{name} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise FastVLMError(
            f"{name} is too large: {width} x {height} pixels, the limit is {MAX_PIXELS // 1_000_000} megapixels "
            f"and {MAX_SIDE} a side; scale it down first"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
