"""Any image that a caller may pass -> an upright RGB `PIL.Image`. This is the first step from image to text, before `preprocess`.

A picture can be small as a file and take gigabytes when it is decoded. So its size, the memory that its decoder takes and the time are
limited, and a large one is reduced on the way. `rgb.py` does what follows after decoding.
"""

from __future__ import annotations

import io
import os
import re
import stat
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from fastvlm_edge.errors import FastVLMError, PictureError
from fastvlm_edge.inputs.rgb import RGB, Colour, array_to_rgb, picture_to_rgb, reduction, to_colour, transparent_colour
from fastvlm_edge.machine.memory import read_memory
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.mistaken import shortened

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]"

MAX_PIXELS = 178_956_970
"""The size at which Pillow itself rejects an image as a decompression bomb (twice its default MAX_IMAGE_PIXELS)."""
MAX_SIDE = 65_535
"""The longest side that a JPEG can have. It limits the working memory of padding."""
MAX_ASPECT_RATIO = 50
"""Above it, padding leaves only a few pixels of the short side, and cropping keeps less than 2 % of the image."""
MAX_STREAM_BYTES = 1 << 29
"""How much is read from a pipe or socket, which may never end."""
MAX_DECODE_BYTES = 1 << 30
"""The most memory for decoding a picture, also where more is free."""
MAX_SECONDS = 30.0
"""After this time a decoder gets no more data. A JPEG of many scans, and formats that Pillow decodes in Python, could take hours."""
SCAN_PIECE = 1 << 10
"""Bytes of a progressive JPEG that its decoder gets at a time. A scan may be a few bytes, and the whole picture is decoded for each."""
FREE_SHARE = 0.8
"""The part of the free memory that decoding may take."""

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+://|data:)")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{100,}={0,2}\s*")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
"""Bytes 8 to 11 of such a file (ISO/IEC 23008-12, annex B)."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_ORIENTATION = 0x0112
_WORKING_BYTES = {"WEBP": 13, "JPEG2000": 16, "AVIF": 8, "HEIF": 8}
"""Format -> memory of its decoder in bytes per pixel, measured with 25 megapixels (Pillow 13.0, pillow-heif 1.8) and rounded up."""


def load_rgb(source: ImageInput, background: Colour = "white") -> Image.Image:
    """Open, decode and convert one image: mode RGB, EXIF orientation applied, first frame of an animation.

    An array has the shape [height, width], [height, width, 1], [height, width, 3] (RGB) or [height, width, 4] (RGBA) and the type uint8,
    uint16, bool, or float in 0..1. Transparent pixels are drawn over `background`. More than `rgb.LARGE` pixels are reduced. A `PIL.Image`
    that the caller passes is not changed.

    Raises PictureError that names the image and says what is wrong with it, or FastVLMError for what cannot be an image.
    """
    behind = to_colour(background)
    if isinstance(source, Image.Image):
        return _decode(source, "the image", behind)
    if isinstance(source, np.ndarray):
        return _from_array(source, behind)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_stream(io.BytesIO(source), "the image", behind)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, behind)
    if hasattr(source, "read"):
        return _from_file_object(source, behind)
    raise FastVLMError(
        f"an image cannot be of type {type(source).__name__}",
        "give a path, bytes, a file object, a PIL image or an array [height, width, 3]",
    )


def _from_path(source: str | os.PathLike[str], background: RGB) -> Image.Image:
    path = os.fspath(source)
    if not path:
        raise PictureError("the path of the image is empty", "give the path of a file", kind="missing")
    if _URL.match(path):
        raise _about_address(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise PictureError(f"{path} is a directory", "give the path of one image", kind="not_a_picture")
        with open(path, "rb") as file:
            return _from_stream(file if stat.S_ISREG(mode) else read_all(file, path), path, background)
    except FileNotFoundError:
        raise PictureError(f"{shortened(path)} does not exist", _remedy_for_missing(path), kind="missing") from None
    except PermissionError:
        what = f"{path} cannot be read: permission denied"
        raise PictureError(what, "check the permissions of the file", kind="unreadable") from None
    except (OSError, ValueError) as error:
        if _BASE64.fullmatch(path):  # too long for a name
            raise PictureError(f"{shortened(path)} does not exist", _remedy_for_missing(path), kind="missing") from None
        raise PictureError(f"{path!r} cannot be read: {error}", kind="unreadable") from None


def _remedy_for_missing(path: str) -> str:
    if _BASE64.fullmatch(path):
        return "if it is a picture in base64, decode it first, and give the bytes"
    if path.startswith("~") and os.path.exists(whole := os.path.expanduser(path)):
        return f"give the whole path: {whole}"
    return "check the path of the image"


def _about_address(path: str) -> PictureError:
    """The error for an address where a path is expected."""
    shown = shortened(path)
    if path.startswith("data:"):
        what = f"{shown} is a data: address, which has the picture itself in base64"
        mend = "decode what follows the comma (base64 -d, or base64.b64decode), and give the bytes or a file"
        return PictureError(what, mend, kind="missing")
    if path.startswith("file://"):
        return PictureError(f"{shown} is a URL, not a path", f"give the path {path[len('file://') :]}", kind="missing")
    what = f"{shown} is a URL, and images are not downloaded"
    return PictureError(what, "download it first and give the path of the file", kind="missing")


def _from_file_object(file: IO[bytes], background: RGB) -> Image.Image:
    return _from_stream(_seekable(file), _name(file), background)


def rewound(image: ImageInput) -> ImageInput:
    """An image that `load_rgb` can read again: a file object at its beginning, and what a pipe or socket gives."""
    if isinstance(image, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, np.ndarray)) or not hasattr(image, "read"):
        return image
    file = _seekable(image)
    file.seek(0)
    return file


def _seekable(file: IO[bytes]) -> IO[bytes]:
    try:
        seekable = file.seekable()
    except AttributeError:
        seekable = False
    return file if seekable else read_all(file, _name(file))


def _name(file: IO[bytes]) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "the image"


def read_all(file: IO[bytes], name: str) -> io.BytesIO:
    """All of a pipe or socket, for decoding, which has to seek. Raises FastVLMError for text and for more than MAX_STREAM_BYTES."""
    data = file.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise FastVLMError(f"{name} yields text, not bytes", "open it in binary mode")
    if len(data) > MAX_STREAM_BYTES:
        raise PictureError(f"{name} has more than {MAX_STREAM_BYTES >> 20} MiB", "give a smaller image", kind="too_large")
    return io.BytesIO(data)


class _Deadline:
    """A file that gives no more data after MAX_SECONDS."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._end = time.monotonic() + MAX_SECONDS

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self._end:
            what = f"{self._name} takes more than {MAX_SECONDS:g} seconds to decode"
            raise PictureError(what, "save it again as PNG or JPEG", kind="too_large")
        return self._file.read(size)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)


def _from_stream(file: IO[bytes], name: str, background: RGB) -> Image.Image:
    probe = file.read(1)
    if isinstance(probe, str):
        raise FastVLMError(f"{name} yields text, not bytes", "open it in binary mode")
    if not probe:
        raise PictureError(f"{name} is empty (0 bytes)", "give an image", kind="damaged")
    file.seek(-1, io.SEEK_CUR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(cast("IO[bytes]", _Deadline(file, name)), name)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large: {_one_line(error)}", "scale it down first", kind="too_large") from None
    except FastVLMError:
        raise
    except MemoryError:
        raise _no_memory(name) from None
    except Exception as error:
        raise _damaged(name, error) from None
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise PictureError(f"{name} is a PostScript document, not an image", "convert it to PNG first", kind="not_a_picture")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        _check_size(image.width, image.height, name)
        if image.info.get("progressive"):
            image.decodermaxblock = SCAN_PIECE
        factor = reduction(image.width, image.height)
        image.draft(None, (image.width // factor, image.height // factor))  # decodes to a smaller picture
    return _decode(image, name, background)


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            file.seek(0)
            return _open_heif(file, name)
        what = f"{name} is not an image in a format that Pillow reads (JPEG, PNG, WebP, GIF, TIFF, BMP, ...)"
        raise PictureError(what, "convert it to PNG or JPEG", kind="not_a_picture") from None


def _open_heif(file: IO[bytes], name: str) -> Image.Image:
    """Without registering pillow-heif in Pillow, which would change it for the whole process."""
    try:
        heif = import_module("pillow_heif")
    except ModuleNotFoundError:
        what = f"{name} is a HEIC picture, which Pillow reads only with the package pillow-heif"
        raise PictureError(what, "convert it to JPEG, or run: pip install pillow-heif", kind="unsupported") from None
    except Exception as error:
        what = f"{name} is a HEIC picture, and the package pillow-heif is installed but cannot be loaded ({_one_line(error)})"
        mend = "convert it to JPEG, or run: pip install --force-reinstall pillow-heif"
        raise PictureError(what, mend, kind="unsupported") from None
    image: Image.Image = heif.HeifImageFile(file)
    return image


def _decode(image: Image.Image, name: str, background: RGB) -> Image.Image:
    _check_size(image.width, image.height, name)
    if isinstance(image, ImageFile.ImageFile):
        _check_memory(image, name)
    clear = transparent_colour(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            _check_size(image.width, image.height, name)  # an icon may contain a picture of another size
            return _upright(picture_to_rgb(image, background, clear, name), image)
    except FastVLMError:
        raise
    except MemoryError:
        raise _no_memory(name) from None
    except Exception as error:
        # Decoders raise OSError, SyntaxError, struct.error, ValueError and more on damaged files.
        raise _damaged(name, error) from None


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of `image`. Damaged EXIF data is ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def _check_memory(image: ImageFile.ImageFile, name: str) -> None:
    """Raise FastVLMError if decoding would take more than MAX_DECODE_BYTES or FREE_SHARE of the free memory."""
    need = decode_bytes(image)
    what = f"{name} has {image.width} x {image.height} pixels and takes {need >> 20} MiB while it is decoded"
    if need > MAX_DECODE_BYTES:
        mend = "scale it down first, or save it as PNG or JPEG"
        raise PictureError(f"{what} (limit: {MAX_DECODE_BYTES >> 20} MiB)", mend, kind="too_large")
    if need > 1 << 26 and 0 < (free := read_memory(Probe()).available) < need / FREE_SHARE:
        mend = "scale it down first, or close other programs"
        raise PictureError(f"{what}, but only {free >> 20} MiB are free", mend, kind="memory")


def decode_bytes(image: ImageFile.ImageFile) -> int:
    """Memory that Pillow takes to decode an opened picture, and then to convert it to RGB."""
    mode, pixels = image.mode, image.width * image.height
    stored = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
    if image.format == "TIFF":  # a strip, which may be the whole picture, and a copy that is turned upright
        bits: tuple[int, ...] = getattr(image, "tag_v2", {}).get(258, (8,))  # BitsPerSample
        working = stored + sum(bits) // 8
    elif image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        scale: int = (getattr(image, "decoderconfig", ()) or (1,))[0]  # the coefficients have the size before `draft`
        working = 2 * len(image.getbands()) * scale**2
    else:
        working = _WORKING_BYTES.get(image.format or "", 0)
    return pixels * stored + max(pixels * working, 4 * pixels // reduction(image.width, image.height) ** 2)


def _from_array(array: NDArray[Any], background: RGB) -> Image.Image:
    shape: Sequence[int] = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))):
        hint = "transpose it to [height, width, 3]" if array.ndim == 3 and shape[0] in (1, 3, 4) else None
        raise FastVLMError(f"the image array has shape {list(shape)}, not [height, width], [height, width, 3] or [height, width, 4]", hint)
    _check_size(shape[1], shape[0], "the image array")
    return array_to_rgb(array, background)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} is empty: {width} x {height} pixels", kind="damaged")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"{MAX_PIXELS // 1_000_000} megapixels, {MAX_SIDE} pixels per side"
        what = f"{name} is too large: {width} x {height} pixels (limits: {limits})"
        raise PictureError(what, "scale it down first", kind="too_large")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        what = f"{name} has {width} x {height} pixels; its aspect ratio is above {MAX_ASPECT_RATIO}"
        raise PictureError(what, "cut it into shorter pieces", kind="unsupported")


def _damaged(name: str, error: Exception) -> PictureError:
    return PictureError(f"{name} is damaged or truncated: {_one_line(error)}", "copy or download it again", kind="damaged")


def _no_memory(name: str) -> PictureError:
    what = f"there is not enough memory to decode {name}"
    return PictureError(what, "scale it down first, or close other programs", kind="memory")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
