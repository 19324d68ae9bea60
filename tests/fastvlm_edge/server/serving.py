"""A server of the tiny model for the tests of its outer parts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from skimage import data
from starlette.testclient import TestClient

from fastvlm_edge import AsyncFastVLM, FastVLM
from fastvlm_edge.server.app import make_app
from fastvlm_edge.server.settings import Settings

PROMPT = "What does the meter read?"


@contextmanager
def serving(vlm: FastVLM, **settings: Any) -> Iterator[TestClient]:
    """A client of a server that is ready."""
    chosen = Settings(**{"model_name": "demo", "slots": 2, "access_log": False, "page": False, **settings})
    with TestClient(make_app(AsyncFastVLM(vlm), chosen), "http://localhost", raise_server_exceptions=False) as client:
        while client.get("/health").status_code == 503:
            pass
        yield client


def picture_url(picture: Any = None) -> str:
    """A picture as a data: URL."""
    file = io.BytesIO()
    Image.fromarray(data.coffee() if picture is None else picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append((fields.get("event", ""), json.loads(fields["data"])))
    return found
