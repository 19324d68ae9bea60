"""The bytes of the picture that an `image_url` names: a `data:` URL, a file beneath --media-path, or a download (`download.py`).

Strangers choose these addresses. So sizes are bounded before memory is taken, and no path leads out of the media directory.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
import re
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from fastvlm_edge.model_dir.mistaken import shortened
from fastvlm_edge.server.download import download, refused, too_large
from fastvlm_edge.server.errors import RequestError
from fastvlm_edge.server.settings import Settings

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_WHITE = re.compile(r"[ \t\r\n\f]+")
_INLINE = 1 << 16
"""Characters of a data: URL that are decoded at once. Longer ones are decoded in a thread."""


async def picture(url: str, settings: Settings) -> bytes:
    """The encoded picture. Raises RequestError if it is refused, or cannot be had."""
    found = _SCHEME.match(url)
    scheme = found.group(1).lower() if found else ""
    if scheme == "data":
        few = len(url) <= _INLINE
        data = data_url(url, settings.max_image_bytes) if few else await asyncio.to_thread(data_url, url, settings.max_image_bytes)
    elif scheme in ("http", "https"):
        if not settings.allow_remote_images:
            raise refused("this server does not download pictures; send a data: URL, or start it with --allow-remote-images")
        data = await download(url, settings.max_image_bytes)
    elif scheme in ("", "file"):
        data = await asyncio.to_thread(_file, url, scheme, settings)
    else:
        raise refused(f"the address of a picture begins with {scheme[:20]}:, which is not supported; send a data: URL")
    if settings.max_pixels is not None:
        _check_pixels(data, settings.max_pixels)
    return data


def data_url(url: str, most: int) -> bytes:
    """The bytes in a `data:` URL (RFC 2397), base64 or percent-encoded. Raises RequestError for more than `most`, and for damaged ones.

    The media type is not looked at: the decoder finds the format by the content.
    """
    head, comma, body = url.partition(",")
    if not comma:
        raise refused(f"{shortened(url)} is not a data: URL: it has no comma before the data")
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        if len(body) - 2 * body.count("%") > most:
            raise too_large(most)
        return _bounded(unquote_to_bytes(body), most)
    if "%" in body:
        body = unquote(body)
    if len(body) > 1.5 * most + 100:  # 4/3, and line ends
        raise too_large(most)
    body = _WHITE.sub("", body).rstrip("=")
    if 3 * len(body) // 4 > most:
        raise too_large(most)
    try:
        return _bounded(base64.b64decode(body + "=" * (-len(body) % 4), validate=True), most)
    except (binascii.Error, ValueError):
        raise refused("the data: URL of a picture is not valid base64") from None


def _file(url: str, scheme: str, settings: Settings) -> bytes:
    """A file beneath the media directory. Nothing tells apart what is outside and what does not exist."""
    if settings.media_path is None:
        raise refused("this server reads no files; send a data: URL, or start it with --media-path")
    path = url
    if scheme == "file":
        path = url.partition(":")[2]
        if path.startswith("//"):
            host, slash, path = path[2:].partition("/")
            if host not in ("", "localhost"):
                raise refused("a file: URL names another host; write file:///path")
            path = slash + path
        path = unquote(re.split("[?#]", path)[0])
    wrong = refused(f"{shortened(path)!r} is not a readable file beneath the media path of this server")
    root = os.path.realpath(settings.media_path)
    try:
        real = os.path.realpath(Path(root, path))  # an absolute path stands for itself
        if os.path.commonpath([root, real]) != root or not stat.S_ISREG(os.stat(real).st_mode):
            raise wrong
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise wrong from None
    with open(descriptor, "rb") as file:
        opened = Path(f"/proc/self/fd/{descriptor}")  # another process may have replaced a directory meanwhile
        if (opened.exists() and os.path.realpath(opened) != real) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise wrong
        if os.fstat(descriptor).st_size > settings.max_image_bytes:
            raise too_large(settings.max_image_bytes)
        try:
            return _bounded(file.read(settings.max_image_bytes + 1), settings.max_image_bytes)
        except OSError:
            raise wrong from None


def _check_pixels(data: bytes, most: int) -> None:
    """Raise RequestError for a picture whose header promises more than `most` pixels. What cannot be opened is left to the decoder."""
    size = (0, 0)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = Image.open(io.BytesIO(data)).size  # reads the header only
    if size[0] * size[1] > most:
        raise RequestError(413, f"a picture has {size[0]} x {size[1]} pixels, and this server takes {most}", code="image_too_large")


def _bounded(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise too_large(most)
    return data
