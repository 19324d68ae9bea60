"""Frames of a clip: which ones, of what files, and what does not fit into the context."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvlm_edge.camera.clip import _middles, _Timeline, check_frames, frames_of_clip
from fastvlm_edge.commands import demo
from fastvlm_edge.errors import FastVLMError, PackageError
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.limits import MIN_ANSWER
from fastvlm_edge.model_dir.manifest import read_manifest

pytest.importorskip("av", reason="the package av is not installed (the extra camera)")

from tests.support.videos import SIZE, cut, number_in, numbered, turn, write_video

STEADY = [index / 10 for index in range(87)]
MIDDLES = [5, 16, 27, 38, 48, 59, 70, 81]


def numbers(clip: Path | bytes, frames: int = 8) -> list[int]:
    return [number_in(picture) for picture in frames_of_clip(clip, frames)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", STEADY)


# Which frames -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts", "mov"])
@pytest.mark.parametrize("key_every", [1, 12, 300])
def test_the_middle_of_each_part(ending: str, key_every: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"clip.{ending}", STEADY, key_every=key_every)
    assert numbers(path) == MIDDLES
    assert numbers(path, 1) == [43]
    assert numbers(path, 87) == list(range(87))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_frames_that_are_stored_in_another_order(codec: str, ending: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"clip.{ending}", STEADY, codec=codec, b_frames=3, key_every=20)
    assert numbers(path) == MIDDLES


def test_by_time_and_not_by_number(tmp_path: Path) -> None:
    """A camera that gives one frame in the dark and ten in the light."""
    times = [*(index / 10 for index in range(40)), 4.0, 8.0, *(12 + index / 10 for index in range(40))]
    path = write_video(tmp_path / "clip.mp4", times)
    assert numbers(path, 4) == [20, 40, 41, 62]
    assert numbers(path, 16) == [5, 15, 25, 35, 40, 41, 47, 57, 67, 77]


def test_a_clip_with_fewer_frames_gives_each_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [0.0, 0.1, 0.2])
    assert numbers(path) == [0, 1, 2]
    assert numbers(write_video(tmp_path / "one.mp4", [0.0])) == [0]


@given(
    st.lists(st.integers(-1000, 100_000), min_size=1, max_size=50, unique=True).map(sorted),
    st.integers(1, 1000),
    st.integers(1, 40),
)
def test_middles_are_frames_in_order(shown: list[int], last: int, parts: int) -> None:
    end = shown[-1] + last
    found = _middles(_Timeline(shown, [0], shown, end, timed=True), parts)
    assert found == sorted(set(found)) and set(found) <= set(shown) and 1 <= len(found) <= parts
    for part in range(parts):
        middle = shown[0] + (end - shown[0]) * (2 * part + 1) / (2 * parts)
        assert max(at for at in shown if at <= middle) in found


# What files ---------------------------------------------------------------------------------------------------------------------


def test_bytes_are_the_same_as_the_file(clip: Path) -> None:
    from_file, from_bytes = frames_of_clip(clip), frames_of_clip(clip.read_bytes())
    assert [picture.tobytes() for picture in from_file] == [picture.tobytes() for picture in from_bytes]
    assert {(picture.mode, picture.size) for picture in from_file} == {("RGB", SIZE)}


def test_colours_are_right(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [0.0, 0.1])
    found = np.asarray(frames_of_clip(path, 1)[0], np.int16)
    assert np.abs(found - np.asarray(numbered(1), np.int16)).mean() < 6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_it_is_turned_as_it_was_filmed(degrees: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", STEADY)
    turn(path, degrees)
    upright = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}[degrees]
    back = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}[degrees]
    pictures = frames_of_clip(path)
    assert {picture.size for picture in pictures} == {numbered(0).transpose(upright).size}
    assert [number_in(picture.transpose(back)) for picture in pictures] == MIDDLES


@pytest.mark.parametrize(("ending", "options"), [("mkv", {}), ("ts", {}), ("avi", {}), ("mp4", {"movflags": "+faststart"})])
def test_a_clip_that_breaks_off(ending: str, options: dict[str, str], tmp_path: Path) -> None:
    """The frames that are left are divided."""
    path = cut(write_video(tmp_path / f"clip.{ending}", STEADY, options=options), 0.6)
    found = numbers(path)
    assert found == sorted(found) and len(found) == 8
    assert 1 <= found[0] <= 5 and 20 <= found[-1] <= 55


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.ts", STEADY, key_every=10)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for start in range(len(data) // 3, len(data) // 2, 188):
        data[start + 20 : start + 188] = generator.integers(0, 256, 168, np.uint8).tobytes()
    path.write_bytes(data[: len(path.read_bytes())])
    pictures = frames_of_clip(path)
    assert 4 <= len(pictures) <= 8
    assert number_in(pictures[0]) == 5 and number_in(pictures[-1]) == 81


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "libx264"), ("mkv", "mpeg4"), ("ts", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_damage_anywhere_gives_frames_or_one_error(ending: str, codec: str, tmp_path: Path) -> None:
    data = write_video(tmp_path / f"clip.{ending}", STEADY[:20], codec=codec).read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(generator.integers(1, 25)):
            at = int(generator.integers(len(damaged) if generator.random() < 0.5 else min(len(damaged), 1500)))
            damaged[at : at + int(generator.integers(0, 20))] = generator.integers(
                0, 256, int(generator.integers(0, 20)), np.uint8
            ).tobytes()
        try:
            frames_of_clip(bytes(damaged), 4, max_seconds=30)
            outcomes.add("frames")
        except FastVLMError:
            outcomes.add("error")
    assert "error" in outcomes and (ending == "mp4" or "frames" in outcomes)


def test_a_tag_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", STEADY)
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xe4\xf6\xfc\xdf"))
    assert numbers(path) == MIDDLES


def test_sound_is_left_out(tmp_path: Path) -> None:
    assert numbers(write_video(tmp_path / "clip.mp4", STEADY, audio=True)) == MIDDLES


@pytest.mark.parametrize("name", ["a b.mp4", "12:30.mp4", "http:clip.mp4", "täglich ☀.mp4", "%03d.mp4"])
def test_names_are_only_names(name: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert numbers(Path(name)) == MIDDLES


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "gone.mp4", "gone.mp4 cannot be opened as video: No such file or directory"),
        (lambda folder: folder, "cannot be opened as video: "),
        (lambda folder: written(folder / "empty.mp4", b""), "empty.mp4 cannot be opened as video: "),
        (lambda folder: written(folder / "text.mp4", b"hello\n" * 500), "text.mp4 cannot be opened as video: "),
        (
            lambda folder: write_video(folder / "sound.mp4", [3.0], audio=True, video=False),
            "sound.mp4 has no video, only audio; give a file",
        ),
        (lambda folder: write_video(folder / "none.mkv", []), "none.mkv cannot be opened as video: End of file"),
        (lambda folder: cut(write_video(folder / "head.ts", STEADY), 0.002), "head.ts "),
    ],
)
def test_files_without_frames(make: Any, says: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(FastVLMError) as error:
        frames_of_clip(path)
    assert says in str(error.value)


def test_playlists_are_not_followed(clip: Path, tmp_path: Path) -> None:
    """They could name any file of the machine, or any address."""
    listed = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:8,\n{clip}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {clip}\n",
    ]
    for name, text in zip(("a.m3u8", "a.ffconcat"), listed, strict=True):
        path = written(tmp_path / name, text.encode())
        for given_as in (path, path.read_bytes()):
            with pytest.raises(FastVLMError, match="cannot be opened as video"):
                frames_of_clip(given_as)


def test_time_is_limited(clip: Path) -> None:
    assert len(frames_of_clip(clip, max_seconds=60)) == 8
    with pytest.raises(FastVLMError, match="takes more than 0 seconds to read; give a shorter clip"):
        frames_of_clip(clip, max_seconds=0)


def test_huge_frames_are_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.camera.pyav.LARGE", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(FastVLMError, match="has frames of 128 x 96 pixels, more than 12287; scale it down first"):
        frames_of_clip(clip)


@pytest.mark.parametrize("frames", [0, -1, True, 2.5, "8"])
def test_a_number_of_frames_is_needed(frames: Any, clip: Path) -> None:
    with pytest.raises(FastVLMError, match=r"frames is .*; give a number of at least 1"):
        frames_of_clip(clip, frames)


def test_without_pyav(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *given: Any, **options: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PackageError, match="reading video needs the package av, which is not installed"):
        frames_of_clip(clip)


# What fits into the context -----------------------------------------------------------------------------------------------------


def fits(frames: int, **change: Any) -> str | None:
    """None, or the error."""
    manifest = read_manifest(demo.MODEL)
    tokenizer = TextTokenizer(demo.MODEL / "tokenizer.json")
    try:
        check_frames(manifest, tokenizer, "What happens?", frames, **change)
    except FastVLMError as error:
        return str(error)
    return None


def test_what_does_not_fit_is_said_with_what_would() -> None:
    manifest = read_manifest(demo.MODEL)
    tokens, context = manifest.vision.tokens, manifest.decoder.context
    too_many = context // tokens
    assert fits(8) is None
    says = fits(too_many)
    assert says is not None and f"{too_many} frames of {tokens} tokens each" in says and "or convert with a larger --context" in says
    most = int(says.partition("take at most ")[2].split()[0])
    template = ChatTemplate(TextTokenizer(demo.MODEL / "tokenizer.json"), manifest)

    def positions(frames: int) -> int:
        return len(template.opening()) + len(template.turn("What happens?", [tokens] * frames)) + MIN_ANSWER

    assert fits(most) is None and positions(most) <= context < positions(most + 1)
    assert "or convert with --image-size 128, which has room for" in says
    alone = fits(8, system="word " * 3000)
    assert (
        alone is not None and "take at most" not in alone and alone.endswith("; shorten the question, or convert with a larger --context")
    )


def test_the_image_size_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    manifest = read_manifest(demo.MODEL)
    tokenizer = TextTokenizer(demo.MODEL / "tokenizer.json")
    large = replace(manifest, vision=replace(manifest.vision, image_size=1024, tokens=256))
    with pytest.raises(FastVLMError) as error:
        check_frames(large, tokenizer, "What happens?", 8)
    size = int(str(error.value).partition("--image-size ")[2].split(",")[0])
    small = replace(manifest, vision=replace(manifest.vision, image_size=size, tokens=(size // 64) ** 2))
    check_frames(small, tokenizer, "What happens?", 8)
    larger = replace(manifest, vision=replace(manifest.vision, image_size=size + 64, tokens=(size // 64 + 1) ** 2))
    with pytest.raises(FastVLMError):
        check_frames(larger, tokenizer, "What happens? " + "word " * MIN_ANSWER, 8)
