"""Pictures of a request: sizes are bounded before decoding, and no path or address leads to where it must not."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fastvlm_edge import FastVLM
from fastvlm_edge.backends import malloc
from fastvlm_edge.server import media, pictures
from fastvlm_edge.server.errors import ErrorDetail, RequestError
from fastvlm_edge.server.settings import Settings
from tests.fastvlm_edge.server.serving import picture_url, serving

MOST = 1000


def png(width: int = 4, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def get(url: str, **settings: object) -> bytes:
    return asyncio.run(media.picture(url, Settings(**{"max_image_bytes": MOST, **settings})))  # type: ignore[arg-type]


def refused(url: str, **settings: object) -> ErrorDetail:
    with pytest.raises(RequestError) as caught:
        get(url, **settings)
    assert caught.value.status == (413 if caught.value.detail.code == "image_too_large" else 400)
    return caught.value.detail


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "data:;base64,", "DATA:image/png;charset=utf-8;BASE64,", "data:application/octet-stream;base64,"]
)
def test_base64(head: str) -> None:
    assert get(head + base64.b64encode(png()).decode()) == png()


def test_base64_as_browsers_and_mail_programs_write_it() -> None:
    text = base64.b64encode(png()).decode()
    assert get("data:image/png;base64," + text.rstrip("=")) == png()
    assert get("data:image/png;base64," + base64.encodebytes(png()).decode()) == png()
    assert get("data:image/png;base64," + quote(text, safe="")) == png()


def test_percent_encoding() -> None:
    assert get("data:image/png," + quote(png())) == png()


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,###", "data:image/png;base64,a", "data:image/png;base64,aé"]
)
def test_what_is_no_data_url_is_refused(url: str) -> None:
    assert refused(url).code == "invalid_image_url"


def test_exactly_the_limit_is_taken() -> None:
    for size in (MOST - 1, MOST):
        assert get("data:;base64," + base64.b64encode(b"x" * size).decode()) == b"x" * size
        assert get("data:," + "%78" * size) == b"x" * size
    assert refused("data:;base64," + base64.b64encode(b"x" * (MOST + 1)).decode()).code == "image_too_large"
    assert refused("data:," + "%78" * (MOST + 1)).code == "image_too_large"
    assert refused("data:," + "é" * MOST).code == "image_too_large"


@pytest.mark.parametrize("head", ["data:;base64,", "data:,"])
def test_a_large_one_is_refused_before_it_is_decoded(head: str) -> None:
    url = head + "A" * 20_000_000
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            media.data_url(url, MOST)
        partition = len(url) + 100_000  # of the text, which is there already
        assert tracemalloc.get_traced_memory()[1] < partition
    finally:
        tracemalloc.stop()


def test_pixels_are_counted_before_decoding() -> None:
    url = "data:;base64," + base64.b64encode(png(40, 30)).decode()
    assert get(url, max_pixels=1200)
    assert refused(url, max_pixels=1199).code == "image_too_large"
    assert get("data:,damaged", max_pixels=1) == b"damaged"  # the decoder says so, with its own words


@pytest.mark.parametrize("url", ["ftp://host/a.png", "gopher://host/", "javascript:alert(1)", "http+unix://%2Fvar%2Frun/"])
def test_other_schemes_are_refused(url: str) -> None:
    assert refused(url, allow_remote_images=True, media_path="/").code == "invalid_image_url"


@pytest.mark.parametrize("url", ["https://pictures.example/a.png", "http://pictures.example/a.png"])
def test_nothing_is_downloaded_unless_it_is_allowed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "download", None)
    assert "--allow-remote-images" in refused(url).message


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A media directory with a picture, links out of it, and what is no file."""
    place = tmp_path / "media"
    (place / "inner").mkdir(parents=True)
    (place / "inner" / "ä b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "media-not").mkdir()
    (tmp_path / "media-not" / "a.png").write_bytes(b"secret")
    (place / "link.png").symlink_to(tmp_path / "secret.png")
    (place / "out").symlink_to(tmp_path)
    (place / "own.png").symlink_to(place / "inner" / "ä b.png")
    os.mkfifo(place / "pipe")
    return place


@pytest.mark.parametrize(
    "written", ["inner/ä b.png", "{place}/inner/ä b.png", "file://{place}/inner/%C3%A4%20b.png", "own.png", "inner/../own.png"]
)
def test_files_beneath_the_media_path(place: Path, written: str) -> None:
    assert get(written.format(place=place), media_path=place) == png()


@pytest.mark.parametrize(
    "written",
    [
        *("../secret.png", "{place}/../secret.png", "file://{place}/../secret.png", "file://{place}/%2e%2e/secret.png", "link.png"),
        *("out/secret.png", "{place}-not/a.png", "../media-not/a.png", "/etc/passwd", "file:///etc/passwd", "file:/etc/passwd"),
        *("inner", "pipe", "", ".", "/dev/zero", "a\0b", "missing.png", "x" * 5000, "~/a.png"),
    ],
)
def test_what_is_not_a_file_beneath_it_is_refused_alike(place: Path, written: str) -> None:
    url = written.format(place=place)
    error = refused(url, media_path=place)
    assert error.code == "invalid_image_url"
    assert "is not a readable file beneath the media path" in error.message


def test_files_are_refused_without_a_media_path(place: Path) -> None:
    for url in (f"{place}/inner/ä b.png", f"file://{place}/own.png", "own.png"):
        assert "--media-path" in refused(url).message
    assert "another host" in refused(f"file://server{place}/own.png", media_path=place).message


def test_large_files_are_refused(place: Path) -> None:
    (place / "large").write_bytes(b"x" * (MOST + 1))
    assert refused("large", media_path=place).code == "image_too_large"


@given(st.text(max_size=60), st.sampled_from(["data:", "data:;base64,", "data:,", "file:", "file://", "", "https:", "https://", "//"]))
@example("[", "https://")
@example("[::1", "file://")
@example("%00", "file:///")
def test_any_address_is_a_picture_or_an_error_of_the_request(rest: str, start: str) -> None:
    with suppress(RequestError):
        assert isinstance(get(start + rest, media_path=Path(__file__).parent, max_pixels=100), bytes)


# Memory -------------------------------------------------------------------------------------------------------------------------


def test_what_large_and_broken_pictures_took_is_returned_to_the_system(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[float] = []
    monkeypatch.setattr(pictures, "_TRIM_SECONDS", 0.01)
    monkeypatch.setattr(malloc, "trim", lambda: trims.append(time.monotonic()))
    large, small = picture_url(np.zeros((2048, 2048, 3), np.uint8)), picture_url(np.zeros((64, 64, 3), np.uint8))
    with serving(vlm) as client:
        for url, status, expected in ((small, 200, 0), (large, 200, 1), (large, 200, 1), ("data:image/png;base64,AAAA", 400, 2)):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
            answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 1})
            assert answer.status_code == status
            time.sleep(0.1)
            assert len(trims) == expected
