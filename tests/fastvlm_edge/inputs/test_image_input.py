"""Files that would take gigabytes or hours, HEIC, and memory: what is refused says so, and what is read takes little."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastvlm_edge import FastVLMError
from fastvlm_edge.inputs import image_input
from fastvlm_edge.inputs.image_input import decode_bytes, load_rgb
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.machine.memory import Memory
from fastvlm_edge.machine.probe import Probe

SIDE = 13_377
"""The largest square below Pillow's limit of pixels."""
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def write_png(path: Path, side: int, bits: int, colour_type: int) -> Path:
    """A black square, written row by row."""
    packer = zlib.compressobj(6)
    row = bytes(1 + side * {0: 1, 2: 3, 6: 4}[colour_type] * bits // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        header = struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, 0)
        for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return path


CHILD = """
import sys
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.machine.peak_memory import peak_host_mib
preprocess({warm_up!r}, 1024, "pad")
before = peak_host_mib()
assert preprocess(sys.argv[1], 1024, "pad").shape == (1, 3, 1024, 1024)
print(peak_host_mib() - before)
"""


def peak_of_preprocess(path: Path, tmp_path: Path) -> float:
    """MiB that another process takes for one picture, beyond what a small one needs."""
    warm_up = tmp_path / "small.png"
    Image.new("RGB", (64, 48)).save(warm_up)
    script = CHILD.format(warm_up=str(warm_up))
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_16_bit_grey_takes_its_pixels_once(tmp_path: Path) -> None:
    """348 KB of PNG took 3.8 GB and 9 s. Its pixels are 341 MiB in 16 bits."""
    path = write_png(tmp_path / "grey.png", SIDE, 16, 0)
    assert path.stat().st_size < 400_000
    assert peak_of_preprocess(path, tmp_path) < 341 + 60


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_is_decoded_to_a_smaller_one(progressive: bool, tmp_path: Path) -> None:
    """9,000 x 8,000 is 275 MiB in Pillow; a quarter of the pixels is left."""
    path = tmp_path / "large.jpg"
    Image.new("L", (9_000, 8_000), 99).save(path, progressive=progressive)
    assert peak_of_preprocess(path, tmp_path) < (137 if progressive else 0) + 17 + 69 + 60
    assert load_rgb(path).size == (4_500, 4_000)


def test_a_large_picture_keeps_its_content(tmp_path: Path) -> None:
    """Reducing before resizing changes no value by more than a few steps."""
    photo = Image.open(Path(image_input.__file__).parents[1] / "pictures" / "coffee.jpg").resize((7_300, 4_870), Image.Resampling.LANCZOS)
    for name in ("large.jpg", "large.bmp"):
        photo.save(tmp_path / name, quality=95)
        rgb = load_rgb(tmp_path / name)
        assert rgb.size == (3_650, 2_435)
        exact = np.asarray(photo.resize((512, 341), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.asarray(rgb.resize((512, 341), Image.Resampling.BICUBIC)) - exact).mean() < 1


def memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    def read(probe: Probe) -> Memory:
        return Memory(available, available, None, None, None, 0, 0, 0)

    monkeypatch.setattr(image_input, "read_memory", read)


def test_a_picture_that_does_not_fit_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(tmp_path / "rgba.png", 6_000, 8, 6)
    memory(monkeypatch, 100 << 20)
    says = (
        r"rgba\.png has 6000 x 6000 pixels and takes 171 MiB while it is decoded, but only 100 MiB are free; scale it down first, or close"
    )
    with pytest.raises(FastVLMError, match=says):
        load_rgb(path)
    memory(monkeypatch, 300 << 20)
    assert load_rgb(path).size == (3_000, 3_000)
    memory(monkeypatch, 0)  # this system does not report its memory
    assert load_rgb(path).size == (3_000, 3_000)


def test_a_small_picture_is_read_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 1 << 20)
    file = io.BytesIO()
    Image.new("RGB", (640, 480)).save(file, "PNG")
    assert load_rgb(file.getvalue()).size == (640, 480)


@pytest.mark.parametrize("format", ["WEBP", "JPEG2000", "AVIF"])
def test_formats_whose_decoders_take_more_are_limited_earlier(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_input, "MAX_DECODE_BYTES", 1 << 20)
    file = io.BytesIO()
    try:
        Image.new("RGB", (300, 300)).save(file, format)
    except (KeyError, OSError):
        pytest.skip(f"Pillow was built without {format}")
    with pytest.raises(
        FastVLMError, match=r"the image has 300 x 300 pixels and takes \d MiB while it is decoded \(limit: 1 MiB\); scale it"
    ):
        load_rgb(file.getvalue())


def test_a_callers_picture_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("L", (9_000, 8_000), 99).save(path)
    with Image.open(path) as image:
        assert load_rgb(image).size == (4_500, 4_000)
        assert image.size == (9_000, 8_000) and image.mode == "L"


def test_no_memory_names_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise MemoryError

    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(FastVLMError, match="there is not enough memory to decode the image; scale it down first, or close other programs"):
        load_rgb(file.getvalue())


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again. The whole picture is decoded for each."""
    file = io.BytesIO()
    Image.new("L", (2_000, 2_000), 99).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def test_decoding_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undisturbed, this file of half a megabyte would take minutes."""
    monkeypatch.setattr(image_input, "MAX_SECONDS", 0.2)
    data = many_scans(20_000)
    began = time.monotonic()
    with pytest.raises(FastVLMError, match=r"the image takes more than 0\.2 seconds to decode; save it again as PNG or JPEG"):
        load_rgb(data)
    assert time.monotonic() - began < 5


def test_heic_without_pillow_heif(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # an import of it fails
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(HEIC)
    says = r"IMG_0001\.HEIC is a HEIC picture, .* only with the package pillow-heif; convert it to JPEG, or run: pip install pillow-heif$"
    with pytest.raises(FastVLMError, match=says):
        load_rgb(path)


def test_heic_with_a_broken_pillow_heif(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pillow_heif.py").write_text("raise OSError('libheif.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    with pytest.raises(FastVLMError, match=r"is installed but cannot be loaded \(libheif.*--force-reinstall pillow-heif$"):
        load_rgb(HEIC)


def test_heic_with_pillow_heif() -> None:
    """With the real package where it is installed."""
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGBA", (64, 48), (200, 30, 40, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 48))
    file = io.BytesIO()
    heif.from_pillow(image).save(file, quality=-1)
    rgb = np.asarray(load_rgb(file.getvalue())).astype(int)
    assert rgb.shape == (48, 64, 3)
    assert np.abs(rgb[24, 8] - (200, 30, 40)).max() < 8 and rgb[24, 56].tolist() == [255, 255, 255]
    assert ".heic" not in Image.registered_extensions()
    with pytest.raises(FastVLMError, match="the image is damaged or truncated"):
        load_rgb(file.getvalue()[:200])


def test_heic_is_opened_by_the_class_of_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the test above where pillow-heif is not installed."""
    opened: list[bytes] = []

    def opener(file: Any) -> Image.Image:
        opened.append(file.read())
        return Image.new("RGB", (9, 7))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(HeifImageFile=opener))
    assert load_rgb(HEIC).size == (9, 7)
    assert opened == [HEIC]


@pytest.mark.parametrize("size", [(51, 1), (1, 60), (40_000, 700)])
def test_an_extreme_aspect_ratio_is_refused_before_decoding(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "strip.png"
    Image.new("1", size).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(FastVLMError, match=rf"strip\.png has {size[0]} x {size[1]} pixels; its aspect ratio is above 50; cut it into"):
        preprocess(path, 256, "pad")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_the_memory_of_a_png_is_that_of_its_pixels(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (100, 100)).save(file, "PNG")
    with Image.open(file) as image:
        per_pixel = {"I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4}.get(mode, 1)
        assert decode_bytes(image) == 10_000 * (per_pixel + 4)
