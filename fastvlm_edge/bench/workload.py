"""The workload: questions of a given length, and pictures that are in no cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.image_input import load_rgb

TEXT_TOKENS = 34
"""Text tokens around the picture: those of the chat template, and a question of about 12 words."""
WORDS = ("a", "b", "c", "d", "e", "f", "g", "h")
"""Words that are one token in every byte-level vocabulary."""


def question(length: Callable[[str], int], positions: int, word: str = "a") -> str:
    """`word` repeated so often that the whole prompt, with picture and chat template, has `positions` positions by `length`.

    Raises ValueError if there is no such prompt.
    """
    words = positions - length(word) + 1
    if words < 1 or length(prompt := word + f" {word}" * (words - 1)) != positions:
        raise ValueError(f"no prompt takes {positions} positions")
    return prompt


def question_near(length: Callable[[str], int], positions: int, word: str = "a") -> str:
    """Like `question`, but the shortest prompt with at least `positions`, if none has exactly as many."""
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
    """Variants of one photograph, as JPEG files in memory. All differ in their pixels, so that no cache knows them."""

    def __init__(self, path: Path | None = None) -> None:
        """The photograph at `path`, or one of 512 x 341 pixels in the package. Raises FastVLMError if it cannot be read."""
        with files("fastvlm_edge").joinpath("pictures/coffee.jpg").open("rb") as file:
            self._photo = load_rgb(file.read() if path is None else path)
        self._next = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (self._photo.width, self._photo.height)

    def new(self) -> bytes:
        """A new variant: one block of 8 x 8 pixels, which JPEG compresses separately, in a colour that no earlier variant had."""
        number, self._next = self._next, self._next + 1
        if number >= 1 << 12:
            raise FastVLMError(f"there are only {number} different pictures", "use fewer --runs")
        colour = tuple(255 - 17 * (number >> shift & 15) for shift in (0, 4, 8))
        variant = self._photo.copy()
        variant.paste(Image.new("RGB", (8, 8), colour), (0, 0))
        file = io.BytesIO()
        variant.save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()
