"""Every kind of image arrives upright, in the right colours and geometry, or is rejected with one sentence."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from fastvlm_edge import FastVLMError
from fastvlm_edge.inputs import image_input
from fastvlm_edge.inputs.image_input import load_rgb
from fastvlm_edge.inputs.preprocess import pad_and_resize, preprocess

S = 256
PHOTOS = {"astronaut": data.astronaut, "coffee": data.coffee, "chelsea": data.chelsea, "rocket": data.rocket}


def saved(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> str:
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    """Red, green / blue, white: any turn or flip shows."""
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = (255, 0, 0)
    array[: height // 2, width // 2 :] = (0, 255, 0)
    array[height // 2 :, : width // 2] = (0, 0, 255)
    array[height // 2 :, width // 2 :] = 255
    return Image.fromarray(array)


def corner_colours(image: Image.Image) -> list[str]:
    names = {(True, False, False): "red", (False, True, False): "green", (False, False, True): "blue", (True, True, True): "white"}
    w, h = image.width - 1, image.height - 1
    red, green, blue = np.moveaxis(np.asarray(image) > 127, -1, 0).tolist()
    return [names[red[y][x], green[y][x], blue[y][x]] for x, y in ((2, 2), (w - 2, 2), (2, h - 2), (w - 2, h - 2))]


def same(ours: Image.Image | NDArray[Any], theirs: Image.Image | NDArray[Any]) -> bool:
    """Whether two pictures have the same pixels."""
    return np.array_equal(np.asarray(ours), np.asarray(theirs))


def padded_first(image: Image.Image, size: int) -> Image.Image:
    """The plain way: the whole square in memory."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("size", [256, 1024])
def test_pad_is_bit_for_bit_padding_then_resizing(name: str, size: int) -> None:
    image = Image.fromarray(PHOTOS[name]())
    assert same(pad_and_resize(image, size), padded_first(image, size))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 4), (255, 256), (257, 256), (1000, 13), (13, 1999), (2500, 1701)])
def test_pad_is_exact_for_odd_sizes(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    assert same(pad_and_resize(image, S), padded_first(image, S))


def test_pixel_values_are_planar_float_in_0_to_1() -> None:
    values = preprocess(data.coffee(), S, "pad")
    assert values.shape == (1, 3, S, S) and values.dtype == np.float32 and values.flags.c_contiguous
    assert values.min() == 0 and 0.9 < values.max() <= 1
    red, green, blue = preprocess(Image.new("RGB", (9, 9), (255, 51, 0)), S, "pad")[0, :, 5, 5]
    assert (red, green, blue) == (1, np.float32(51 / 255), 0)


def test_pad_bars_are_black_and_centred() -> None:
    values = preprocess(Image.new("RGB", (400, 200), "white"), 256, "pad")[0]
    assert values[:, :62].max() == 0 and values[:, -62:].max() == 0
    assert values[:, 68:-68].min() == 1
    assert np.array_equal(values, values[:, ::-1])


def test_crop_sees_only_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("white", (100, 0, 200, 100))
    values = preprocess(image, 256, "crop")[0]
    assert values[:, :, 4:-4].min() == 1


def test_unknown_geometry() -> None:
    with pytest.raises(FastVLMError, match="unknown geometry 'stretch'; use one of: pad, crop"):
        preprocess(quadrants(), S, "stretch")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, extension: str) -> None:
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = quadrants().transpose(inverse[orientation]) if orientation > 1 else quadrants()
    rgb = load_rgb(saved(tmp_path, stored, f"turned.{extension}", exif=exif))
    assert rgb.size == (64, 48)
    assert corner_colours(rgb) == ["red", "green", "blue", "white"]


def test_damaged_exif_counts_as_none(tmp_path: Path) -> None:
    path = saved(tmp_path, quadrants(), "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff")
    assert load_rgb(path).size == (64, 48)


def test_palette(tmp_path: Path) -> None:
    assert corner_colours(load_rgb(saved(tmp_path, quadrants().quantize(8), "palette.png"))) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp", "alpha.gif"])
def test_transparent_pixels_are_white_or_what_is_asked_for(tmp_path: Path, name: str) -> None:
    image = quadrants().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 48))
    path = saved(tmp_path, image, name)
    assert corner_colours(load_rgb(path)) == ["white", "green", "white", "white"]
    assert corner_colours(load_rgb(path, "blue")) == ["blue", "green", "blue", "white"]
    assert np.array_equal(preprocess(path, S, "crop", "red")[0, :, 9, 9], [1, 0, 0])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey(tmp_path: Path, mode: str) -> None:
    image = Image.linear_gradient("L").convert(mode)
    rgb = np.asarray(load_rgb(saved(tmp_path, image, "grey.png")))
    assert rgb.shape == (256, 256, 3)
    assert rgb[:16].mean() < 16 and rgb[-16:].mean() > 240
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, extension: str) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(8, 0)
    rgb = np.asarray(load_rgb(saved(tmp_path, Image.fromarray(ramp), f"deep.{extension}")))
    assert np.array_equal(rgb[0, :, 0], np.arange(256))
    assert same(load_rgb(ramp), rgb)


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.int32, 65535), (np.int32, 1_000_000), (np.float32, 1.0), (np.float32, 255), (np.float32, 65535)]
)
def test_integer_and_float_grey_are_scaled(tmp_path: Path, dtype: Any, white: float) -> None:
    ramp = (np.linspace(0, 1, 256)[None].repeat(8, 0) * white).astype(dtype)
    rgb = np.asarray(load_rgb(saved(tmp_path, Image.fromarray(ramp), "deep.tif")), np.int16)
    assert np.abs(rgb[0, :, 1] - np.arange(256)).max() <= 1


def test_float_picture_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=r"nan\.tif contains values that are not finite"):
        load_rgb(saved(tmp_path, Image.fromarray(np.full((4, 4), np.nan, np.float32)), "nan.tif"))


@pytest.mark.parametrize("name", ["cmyk.jpg", "cmyk.tif"])
def test_cmyk(tmp_path: Path, name: str) -> None:
    assert corner_colours(load_rgb(saved(tmp_path, quadrants().convert("CMYK"), name))) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBa", "La", "PA"])
def test_modes_of_pil_objects(mode: str) -> None:
    via = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, mode)
    image = quadrants().convert(via).convert(mode)
    rgb = load_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (64, 48)
    if mode != "La":
        assert corner_colours(rgb) == ["red", "green", "blue", "white"]


def test_a_mode_that_pillow_cannot_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Image.Image, mode: str) -> None:
        raise ValueError("conversion not supported")

    image = Image.new("LAB", (4, 4))  # older Pillows refuse it
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(FastVLMError, match="colour mode LAB, which Pillow cannot convert to RGB"):
        load_rgb(image)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo"])
def test_the_first_frame_of_several(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, quadrants(), name, save_all=True, append_images=[Image.new("RGB", (64, 48))] * 2)
    assert corner_colours(load_rgb(path)) == ["red", "green", "blue", "white"]


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(data.coffee())
    path = saved(tmp_path, image, "same.png")
    expected = np.asarray(image)
    raw = Path(path).read_bytes()
    with open(path, "rb") as file:
        sources: list[Any] = [
            path,
            Path(path),
            raw,
            bytearray(raw),
            memoryview(raw),
            io.BytesIO(raw),
            file,
            image,
            expected,
            Image.open(path),
        ]
        for source in sources:
            assert same(load_rgb(source), expected), type(source)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    buffer = io.BytesIO()
    quadrants().save(buffer, "png")
    with os.fdopen(writer, "wb") as file:
        file.write(buffer.getvalue())
    with os.fdopen(reader, "rb", buffering=0) as file:
        assert load_rgb(file).size == (64, 48)


def test_a_callers_picture_is_not_changed() -> None:
    image = quadrants().convert("RGBA")
    before = image.copy()
    preprocess(image, S, "pad")
    assert image.mode == "RGBA" and image == before


@pytest.mark.parametrize(
    "array",
    [
        np.asarray(quadrants()),
        np.asarray(quadrants()) / 255,
        (np.asarray(quadrants()) / 255).astype(np.float16),
        np.asarray(quadrants()) > 127,
        np.asarray(quadrants()).astype(np.uint16) * 257,
        np.asarray(quadrants().convert("RGBA")),
        np.asarray(quadrants())[:, ::-1][:, ::-1],
    ],
)
def test_arrays(array: Any) -> None:
    assert corner_colours(load_rgb(array)) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    rgb = load_rgb(np.full(shape, 99, np.uint8))
    assert rgb.size == (7, 5) and rgb.getpixel((3, 3)) == (99, 99, 99)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"shape \[3, 20, 30\], not .*; transpose it"),
        (np.zeros((1, 20, 30, 3), np.uint8), r"shape \[1, 20, 30, 3\], not .* 4\]$"),
        (np.zeros(5, np.uint8), r"shape \[5\], not .* 4\]$"),
        (np.zeros((0, 30, 3), np.uint8), "is empty: 30 x 0 pixels"),
        (np.full((4, 4, 3), 255.0), "values from 255 to 255, outside 0..1; divide by"),
        (np.full((4, 4, 3), np.nan), "values from nan to nan"),
        (np.full((4, 4, 3), -1.0), "values from -1"),
        (np.zeros((4, 4, 3), np.int64), "type int64, not uint8"),
        (np.zeros((4, 4), object), "type object, not uint8"),
    ],
)
def test_wrong_arrays(array: Any, says: str) -> None:
    with pytest.raises(FastVLMError, match=says):
        load_rgb(array)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files(tmp_path: Path, share: float, extension: str) -> None:
    path = Path(saved(tmp_path, Image.fromarray(data.coffee()), f"cut.{extension}"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(FastVLMError, match=rf"cut\.{extension} is (damaged or truncated: \S|not an image)") as caught:
        load_rgb(path)
    assert "\n" not in str(caught.value)
    assert caught.value.mend in ("copy or download it again", "convert it to PNG or JPEG")


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_garbled_files_never_crash(tmp_path: Path, extension: str) -> None:
    path = Path(saved(tmp_path, quadrants(), f"noise.{extension}"))
    clean = np.frombuffer(path.read_bytes(), np.uint8)
    for seed in range(40):
        random = np.random.default_rng(seed)
        noisy = clean.copy()
        noisy[random.integers(0, len(noisy), 6)] = random.integers(0, 256, 6)
        with contextlib.suppress(FastVLMError):
            assert load_rgb(noisy.tobytes()).mode == "RGB"


def test_files_that_are_not_images(tmp_path: Path) -> None:
    text = tmp_path / "note.txt"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    secret = tmp_path / "secret.png"
    secret.symlink_to(tmp_path / "gone.png")
    script = tmp_path / "page.eps"
    quadrants().save(script)
    cases: list[tuple[Any, str]] = [
        (text, "note.txt is not an image in a format that Pillow reads .*; convert it to PNG or JPEG"),
        (empty, r"empty.jpg is empty \(0 bytes\)"),
        (secret, "secr.* does not exist"),  # long paths are shortened
        (tmp_path, "is a directory; give the path of one image"),
        (tmp_path / "gone.jpg", "go.* does not exist; check the path"),
        (script, "page.eps is a PostScript document"),
        ("https://example.org/cat.jpg", "https://example.org/cat.jpg is a URL, .*; download it first"),
        ("data:image/png;base64," + "A" * 500, r"\.\.\. is a data: address"),
        ("", "path of the image is empty"),
        ("a\0b", "cannot be read"),
        (b"", r"is empty \(0 bytes\)"),
        (b"hello", "is not an image"),
        (io.StringIO("hello"), "open it in binary mode"),
        (17, "an image cannot be of type int; give a path"),
        (None, "an image cannot be of type NoneType"),
    ]
    for source, says in cases:
        with pytest.raises(FastVLMError, match=says):
            load_rgb(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    quadrants().save(path)
    path.chmod(0)
    with pytest.raises(FastVLMError, match=r"locked\.png cannot be read: permission denied"):
        load_rgb(path)


def test_too_large_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 9_900)).save(bomb)
    with pytest.raises(FastVLMError, match=r"bomb\.png is too large: .* scale it down first"):
        load_rgb(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(FastVLMError, match=r"20000 x 9900 pixels \(limits: 178 megapixels"):
        load_rgb(bomb)
    with pytest.raises(FastVLMError, match=r"limits: .* 65535 pixels per side\)"):
        load_rgb(np.zeros((1, 70_000), np.uint8))


def test_pillows_warning_of_large_pictures_is_not_shown(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    buffer = io.BytesIO()
    quadrants().save(buffer, "png")
    load_rgb(buffer.getvalue())
    assert not recwarn.list


@pytest.mark.parametrize("geometry", ["pad", "crop"])
@pytest.mark.parametrize("size", [(51, 1), (1, 51), (4000, 15)])
def test_extreme_aspect_ratio_is_rejected(geometry: str, size: tuple[int, int]) -> None:
    with pytest.raises(FastVLMError, match=rf"{size[0]} x {size[1]} pixels; its aspect ratio is above 50; cut it"):
        preprocess(Image.new("RGB", size), S, geometry)


@pytest.mark.parametrize("geometry", ["pad", "crop"])
@pytest.mark.parametrize("size", [(50, 1), (1, 50), (1, 1), (4000, 81)])
def test_long_images_work(geometry: str, size: tuple[int, int]) -> None:
    values = preprocess(Image.new("RGB", size, "white"), S, geometry)
    assert values.max() > 0.7


def test_padding_a_large_picture_takes_little_memory() -> None:
    """20,000 x 2,000 would be 400 megapixels padded, 1.6 GB in Pillow; bands keep to 24 MB and the shrunk strip."""
    import resource

    image = Image.new("RGB", (20_000, 2_000), "white")
    image.paste("red", (0, 0, 5000, 2000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small = pad_and_resize(image, 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000
    assert (
        small.getpixel((10, 512)) == (255, 0, 0) and small.getpixel((900, 512)) == (255, 255, 255) and small.getpixel((9, 9)) == (0, 0, 0)
    )


def test_the_limits_are_what_the_messages_say() -> None:
    assert image_input.MAX_PIXELS == 2 * 89_478_485
