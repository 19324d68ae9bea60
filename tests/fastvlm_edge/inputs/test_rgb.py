"""Transparency, grey of more than 8 bits and large pictures: the right colours, without a second copy of the whole picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fastvlm_edge import FastVLMError
from fastvlm_edge.inputs import rgb
from fastvlm_edge.inputs.image_input import load_rgb

W, H = 12, 8
BACKGROUNDS: list[tuple[Any, tuple[int, int, int]]] = [
    ("white", (255, 255, 255)),
    ("#102030", (16, 32, 48)),
    ((1, 2, 3), (1, 2, 3)),
]


def colours(source: Any, background: Any = "white") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Left and right pixel."""
    picture = np.asarray(load_rgb(source, background))
    assert picture.shape == (H, W, 3)
    assert (picture[:, : W // 2] == picture[0, 0]).all() and (picture[:, W // 2 :] == picture[0, -1]).all()
    return tuple(picture[0, 0].tolist()), tuple(picture[0, -1].tolist())


def as_png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, colour_type: int, rows: bytes, transparent: tuple[int, ...]) -> bytes:
    """A PNG of W x H pixels with `tRNS`, as the specification has it: one row of bytes, H times."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, colour_type, 0, 0, 0))
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress((b"\0" + rows) * H)) + chunk(b"IEND", b"")


def half_transparent(mode: str) -> Image.Image:
    """Left: grey 80, opaque. Right: black, transparent."""
    image = Image.new("RGBA", (W, H), (80, 80, 80, 255))
    image.paste((0, 0, 0, 0), (W // 2, 0, W, H))
    if mode == "P":
        image = image.quantize(4)  # a palette with alpha
        assert image.palette is not None and image.palette.mode == "RGBA"
        return image
    if mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("RGB").convert("L").convert("P").convert("PA")
        image.putalpha(alpha)
        return image
    via = {"La": "LA"}.get(mode)
    return (image.convert(via) if via else image).convert(mode)


@pytest.mark.parametrize(("background", "expected"), BACKGROUNDS)
@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "PA"])
def test_every_mode_with_alpha_is_drawn_over_the_background(mode: str, background: Any, expected: tuple[int, ...]) -> None:
    assert colours(half_transparent(mode), background) == ((80, 80, 80), expected)


@pytest.mark.parametrize("extension", ["PNG", "WEBP", "TIFF", "GIF", "ICO", "TGA"])
def test_every_format_with_alpha(extension: str) -> None:
    file = io.BytesIO()
    image = half_transparent("RGBA")
    image.save(file, extension, **({"lossless": True} if extension == "WEBP" else {"sizes": [(W, H)]} if extension == "ICO" else {}))
    assert colours(file.getvalue()) == ((80, 80, 80), (255, 255, 255))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palette_with_transparent_entries(transparency: Any) -> None:
    image = Image.new("P", (W, H), 0)
    image.putpalette([80, 80, 80, 0, 0, 0])
    image.paste(1, (W // 2, 0, W, H))
    assert colours(as_png(image, transparency=transparency)) == ((80, 80, 80), (255, 255, 255))
    assert colours(as_png(image)) == ((80, 80, 80), (0, 0, 0))


@pytest.mark.parametrize(
    ("bits", "colour_type", "left", "right", "transparent", "drawn"),
    [
        (1, 0, b"", b"", (0,), 255),
        (2, 0, b"", b"", (0,), 170),
        (2, 0, b"", b"", (1,), 170),
        (4, 0, b"", b"", (5,), 170),
        (8, 0, b"\x50", b"\x07", (7,), 80),
        (16, 0, b"\x50\x50", b"\x01\x02", (0x0102,), 80),
        (8, 2, b"\x50\x50\x50", b"\x01\x02\x03", (1, 2, 3), 80),
        (16, 2, b"\x50\x50" * 3, b"\x01\x09\x02\x09\x03\x09", (0x0109, 0x0209, 0x0309), 80),
    ],
)
def test_one_transparent_colour_of_a_png(
    bits: int, colour_type: int, left: bytes, right: bytes, transparent: tuple[int, ...], drawn: int
) -> None:
    if left:
        rows = left * (W // 2) + right * (W // 2)
    else:
        values = [drawn * (2**bits - 1) // 255] * (W // 2) + [transparent[0]] * (W // 2)
        binary = "".join(f"{value:0{bits}b}" for value in values)
        rows = int(binary.ljust(-(-len(binary) // 8) * 8, "0"), 2).to_bytes(-(-len(binary) // 8), "big")
    assert colours(png(bits, colour_type, rows, transparent), "#ff8000") == ((drawn,) * 3, (255, 128, 0))


@pytest.mark.parametrize(("dtype", "opaque"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.bool_, 1)])
def test_the_fourth_channel_of_an_array_is_alpha(dtype: Any, opaque: float) -> None:
    array = np.zeros((H, W, 4), dtype)
    array[:, : W // 2] = opaque
    array[:, : W // 2, 0] = 0
    assert colours(array, (9, 9, 9)) == ((0, 255, 255), (9, 9, 9))


def test_half_transparent_is_a_mixture() -> None:
    assert colours(Image.new("RGBA", (W, H), (0, 0, 0, 127)))[0] == (128, 128, 128)


@pytest.mark.parametrize("background", ["no-colour", "#12345", "#11223344", (1, 2), (1, 2, 256), (1, 2, 0.5), None, 7])
def test_what_is_no_background(background: Any) -> None:
    with pytest.raises(
        FastVLMError, match=r"the background .* is not a colour; give a name such as white, #rrggbb, or \(red, green, blue\)"
    ):
        load_rgb(Image.new("RGB", (4, 4)), background)


@pytest.mark.parametrize("white", [255, 65535])
@pytest.mark.parametrize(("dtype", "extension"), [(np.int32, "TIFF"), (np.float32, "TIFF"), (np.uint16, "TIFF"), (np.uint16, "PNG")])
def test_the_largest_value_tells_what_is_white(dtype: Any, extension: str, white: int) -> None:
    ramp = (np.arange(256, dtype=np.int64) * white // 255).astype(dtype)[None].repeat(8, 0)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, extension)
    assert np.array_equal(np.asarray(load_rgb(file.getvalue()))[0, :, 0], np.arange(256))
    if dtype == np.uint16:
        assert np.array_equal(np.asarray(load_rgb(ramp))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_negative_values_are_black(dtype: Any) -> None:
    values = np.asarray([[-1000, 0, 255]], dtype)
    assert np.asarray(load_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 255]
    assert np.asarray(load_rgb(Image.fromarray(np.minimum(values, -3))))[0, :, 0].tolist() == [0, 0, 0]


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a few rows, and reduction above 1,000 pixels."""
    monkeypatch.setattr(rgb, "_BAND_PIXELS", 300)
    monkeypatch.setattr(rgb, "LARGE", 1000)


def every_kind(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """The same grey pixels [height, width] in every mode and array type."""
    grey = Image.fromarray(pixels)
    deep = pixels.astype(np.uint16) * 257
    return {
        **{mode: grey.convert(mode) for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK")},
        "I;16": Image.fromarray(deep),
        "I": Image.fromarray(deep.astype(np.int32)),
        "F": Image.fromarray(pixels.astype(np.float32)),
        "uint8": pixels,
        "uint16": deep,
        "float64": pixels / 255,
        "rgb array": np.asarray(grey.convert("RGB")),
        "rgba array": np.asarray(grey.convert("RGBA")),
    }


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("shape", [(100, 50), (45, 90), (33, 31), (129, 121)])
def test_bands_and_reduction_give_the_same_for_every_kind(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[0, 0] = 255
    factor = rgb.reduction(shape[1], shape[0])
    assert factor in (2, 4)
    expected = np.asarray(Image.fromarray(pixels).reduce(factor))
    for kind, source in every_kind(pixels).items():
        found = np.asarray(load_rgb(source))
        assert found.shape == (*expected.shape, 3), kind
        assert np.abs(found[..., 0].astype(int) - expected).max() <= (1 if kind in ("F", "CMYK") else 0), kind


@given(st.integers(1, 70_000), st.integers(1, 70_000))
def test_a_reduced_picture_has_at_most_the_pixels_of_a_large_one(width: int, height: int) -> None:
    factor = rgb.reduction(width, height)
    assert width * height <= rgb.LARGE * factor**2
    assert factor == 1 or width * height > rgb.LARGE * (factor // 2) ** 2


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "I", "F"]))
def test_every_mode_and_size_works(width: int, height: int, mode: str) -> None:
    assert load_rgb(Image.new(mode, (width, height))).size == (width, height)
