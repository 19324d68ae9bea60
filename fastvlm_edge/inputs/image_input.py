"""Any image that a caller may pass -> an upright RGB `PIL.Image`. This is the first step from image to text, before `preprocess`.

Colours follow `Image.convert("RGB")`, as in Apple's `predict.py`: an alpha channel is dropped, not composited, so the colour stored under
transparent pixels becomes visible. 16-bit and float grey images, which Pillow would clip, are scaled to 8 bits instead.
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
"""The size at which Pillow itself rejects an image as a decompression bomb (twice its default MAX_IMAGE_PIXELS)."""
MAX_SIDE = 65_535
"""The longest side that a JPEG can have. It limits the working memory of padding."""
MAX_STREAM_BYTES = 1 << 29
"""How much is read from a pipe or socket, which may never end."""

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+://|data:)")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def load_rgb(source: ImageInput) -> Image.Image:
    """Open, decode and convert one image: mode RGB, EXIF orientation applied, first frame of an animation.

    An array has the shape [height, width], [height, width, 1], [height, width, 3] or [height, width, 4] and the type uint8, uint16, bool,
    or float in 0..1. A `PIL.Image` that the caller passes is not changed.

    Raises FastVLMError that names the image and says what is wrong with it.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_stream(io.BytesIO(source), "the image")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source)
    if hasattr(source, "read"):
        return _from_file_object(source)
    raise FastVLMError(
        f"an image cannot be of type {type(source).__name__}",
        "give a path, bytes, a file object, a PIL image or an array [height, width, 3]",
    )


def _from_path(source: str | os.PathLike[str]) -> Image.Image:
    path = os.fspath(source)
    if not path:
        raise FastVLMError("the path of the image is empty", "give the path of a file")
    if _URL.match(path):
        shown = path if len(path) <= 80 else path[:77] + "..."
        raise FastVLMError(f"{shown} is a URL, and images are not downloaded", "download it first and give the path of the file")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FastVLMError(f"{path} is a directory", "give the path of one image")
        with open(path, "rb") as file:
            return _from_stream(file if stat.S_ISREG(mode) else _read_all(file, path), path)
    except FileNotFoundError:
        raise FastVLMError(f"{path} does not exist", "check the path of the image") from None
    except PermissionError:
        raise FastVLMError(f"{path} cannot be read: permission denied", "check the permissions of the file") from None
    except (OSError, ValueError) as error:
        raise FastVLMError(f"{path!r} cannot be read: {error}") from None


def _from_file_object(file: IO[bytes]) -> Image.Image:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else "the image"
    try:
        seekable = file.seekable()
    except AttributeError:
        seekable = False
    return _from_stream(file if seekable else _read_all(file, name), name)


def _read_all(file: IO[bytes], name: str) -> io.BytesIO:
    """Decoding has to seek, which a pipe or a socket cannot do, so all of it is read first."""
    data = file.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise FastVLMError(f"{name} yields text, not bytes", "open it in binary mode")
    if len(data) > MAX_STREAM_BYTES:
        raise FastVLMError(f"{name} has more than {MAX_STREAM_BYTES >> 20} MiB", "give a smaller image")
    return io.BytesIO(data)


def _from_stream(file: IO[bytes], name: str) -> Image.Image:
    probe = file.read(1)
    if isinstance(probe, str):
        raise FastVLMError(f"{name} yields text, not bytes", "open it in binary mode")
    if not probe:
        raise FastVLMError(f"{name} is empty (0 bytes)", "give an image")
    file.seek(-1, io.SEEK_CUR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file)
    except UnidentifiedImageError:
        what = f"{name} is not an image in a format that Pillow reads (JPEG, PNG, WebP, GIF, TIFF, BMP, ...)"
        raise FastVLMError(what, "convert it to PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise FastVLMError(f"{name} is too large: {_one_line(error)}", "scale it down first") from None
    except MemoryError:
        raise
    except Exception as error:
        raise FastVLMError(f"{name} is damaged or truncated: {_one_line(error)}", "copy or download it again") from None
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise FastVLMError(f"{name} is a PostScript document, not an image", "convert it to PNG first")
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
        raise FastVLMError(f"{name} is damaged or truncated: {_one_line(error)}", "copy or download it again") from None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Damaged EXIF data is ignored."""
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
        raise FastVLMError(f"{name} has colour mode {image.mode}, which Pillow cannot convert to RGB", "convert it to RGB first") from None


def _deep_grey_to_8_bit(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Grey values with more than 8 bits, scaled to 0..255.

    White is 65,535 for integers (a 16-bit PNG may open in the 32-bit mode I), and the first of 1, 255 and 65,535 that no value exceeds for
    floats. If a value exceeds 65,535, the largest value is white.
    """
    if not np.isfinite(values).all():
        raise FastVLMError(f"{name} contains values that are not finite", "give numbers from 0 to 1")
    largest = float(values.max())
    ranges = (1.0, 255.0, 65535.0) if np.issubdtype(values.dtype, np.floating) else (65535.0,)
    white = next((bound for bound in ranges if largest <= bound), largest)
    return np.rint(np.clip(values * (1.0 / white), 0, 1) * 255).astype(np.uint8)


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape: Sequence[int] = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))):
        hint = "transpose it to [height, width, 3]" if array.ndim == 3 and shape[0] in (1, 3, 4) else None
        raise FastVLMError(f"the image array has shape {list(shape)}, not [height, width], [height, width, 3] or [height, width, 4]", hint)
    _check_size(shape[1], shape[0], "the image array")
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
        raise FastVLMError(f"the image array has type {array.dtype}, not uint8, uint16, bool or float", "convert it first")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of NaN
        raise FastVLMError(
            f"the float image array has values from {low:g} to {high:g}, outside 0..1", "divide by the value of white, or use uint8"
        )
    return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise FastVLMError(f"{name} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise FastVLMError(
            f"{name} is too large: {width} x {height} pixels (limits: {MAX_PIXELS // 1_000_000} megapixels, {MAX_SIDE} pixels per side)",
            "scale it down first",
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
