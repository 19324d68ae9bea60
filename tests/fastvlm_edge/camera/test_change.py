"""Frames that did not change: noise is no change, a small object is one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastvlm_edge.camera.change import SIDE, THRESHOLD, distance, small_grey


def scene(*, noise: float = 0.0, seed: int = 0, size: tuple[int, int] = (640, 480), box: tuple[int, int] | None = None) -> Image.Image:
    """A gradient, with the noise of a sensor and an object."""
    width, height = size
    pixels = np.linspace(40, 200, width, dtype=np.float32)[None, :, None] * np.ones((height, 1, 3), np.float32)
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape) if noise else 0
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if box is not None:
        ImageDraw.Draw(image).rectangle((100, 100, 100 + box[0], 100 + box[1]), fill=(250, 250, 250))
    return image


def test_what_it_is() -> None:
    black, white = Image.new("RGB", (100, 70)), Image.new("RGB", (100, 70), "white")
    assert small_grey(black).shape == (SIDE, SIDE) and small_grey(black).dtype == np.float32
    assert distance(small_grey(black), small_grey(black)) == 0
    assert distance(small_grey(black), small_grey(white)) == distance(small_grey(white), small_grey(black)) == 255


@pytest.mark.parametrize("size", [(320, 240), (640, 480), (1920, 1080)])
def test_noise_is_no_change(size: tuple[int, int]) -> None:
    first, second = (small_grey(scene(noise=8, seed=seed, size=size)) for seed in (1, 2))
    assert 0 < distance(first, second) < THRESHOLD


def test_an_object_of_two_percent_is_a_change() -> None:
    assert distance(small_grey(scene()), small_grey(scene(box=(90, 68)))) > THRESHOLD
