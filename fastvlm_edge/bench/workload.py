"""What is asked: questions of a chosen length and pictures that no process has seen before."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.image_input import load_rgb

TEXT_TOKENS = 34
"""Positions of text around the picture: the template's own and a question of some 12 words."""
WORDS = ("a", "b", "c", "d", "e", "f", "g", "h")
"""Of one token each in every byte-level vocabulary."""


def question(length: Callable[[str], int], positions: int, word: str = "a") -> str:
    """`word` over and over, so often that `length`, of the whole prompt with picture and template, says `positions`.

    Raises ValueError where that cannot be.
    """
    words = positions - length(word) + 1
    if words < 1 or length(prompt := word + f" {word}" * (words - 1)) != positions:
        raise ValueError(f"no prompt takes {positions} positions")
    return prompt


def question_near(length: Callable[[str], int], positions: int, word: str = "a") -> str:
    """Like `question`; where the template alone is longer, or the tokenizer joins words, the shortest that is long enough."""
    try:
        return question(length, positions, word)
    except ValueError:
        low, high = 1, max(1, positions)
        while low < high:
            middle = (low + high) // 2
            if length(" ".join([word] * middle)) >= positions:
                high = middle
            else:
                low = middle + 1
        return " ".join([word] * low)


class Pictures:
    """Variants of one photograph, each a JPEG file in memory that differs from all others in its pixels: none can be in any cache."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` None is a photograph of 512 x 341 that comes with the package. Raises FastVLMError where it cannot be read."""
        with files("fastvlm_edge").joinpath("pictures/coffee.jpg").open("rb") as file:
            self._photo = load_rgb(file.read() if path is None else path)
        self._next = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (self._photo.width, self._photo.height)

    def new(self) -> bytes:
        """A picture that was not handed out before: one block of 8 x 8 pixels, which a JPEG keeps apart, in a colour of its own."""
        number, self._next = self._next, self._next + 1
        if number >= 1 << 12:
            raise FastVLMError(f"{number} pictures are too many; use fewer --runs")
        colour = tuple(255 - 17 * (number >> shift & 15) for shift in (0, 4, 8))
        variant = self._photo.copy()
        variant.paste(Image.new("RGB", (8, 8), colour), (0, 0))
        file = io.BytesIO()
        variant.save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()
