"""Addresses of pictures in requests, to the bytes that they stand for."""

from __future__ import annotations

import base64
import binascii

from PIL import Image

from fastvlm_edge.server.errors import RequestError
from fastvlm_edge.server.settings import Settings


async def picture(url: str, settings: Settings) -> Image.Image | bytes:
    """The picture of a `data:` address. Raises RequestError for every other one, and for what is not base64 or too large."""
    head, comma, data = url.partition(",")
    if not url.startswith("data:") or not comma or not head.endswith(";base64"):
        raise RequestError(400, f"pictures are taken as data:image/jpeg;base64,... only, not as {url[:40]!r}", code="invalid_image_url")
    if len(data) > settings.max_image_bytes * 4 // 3 + 4:
        raise RequestError(413, f"a picture has more than {settings.max_image_bytes:,} bytes", code="image_too_large")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"the picture is not base64 ({error})", code="invalid_image") from None
