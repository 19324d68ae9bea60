"""Image sizes and contexts that a model directory may have: one rule for `convert`, which writes it, and `plan`, which recommends it."""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import STRIDE, visual_tokens

IMAGE_SIZES = range(128, 1536 + 1, STRIDE)
SIZES_IN_WORDS = f"{IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]} in steps of {STRIDE}"
DEFAULT_CONTEXT = 4096
MIN_ANSWER = 64
"""Positions that a context must have in addition to those of one picture."""


def check_image_size(size: int, trained: int, name: str) -> None:
    """Raise FastVLMError for a size in pixels that is not supported. The model `name` was trained at `trained`, which always is."""
    if size != trained and size not in IMAGE_SIZES:
        raise FastVLMError(f"image size {size} is not supported", f"choose {SIZES_IN_WORDS} ({name} was trained at {trained})")


def image_sizes(asked: int | str | Sequence[int] | None) -> list[int]:
    """The sizes in pixels that are asked for, the default one first: a number, `"1024,512"`, or a list. None means none.

    Raises FastVLMError if one of them is not an integer, or is given twice. `check_image_size` judges them further.
    """
    parts = asked.split(",") if isinstance(asked, str) else [asked] if isinstance(asked, int) else asked or []
    sizes = []
    for part in parts:
        try:
            size = int(part)
        except ValueError:
            raise FastVLMError(f"image size {part!r} is not an integer", f"choose {SIZES_IN_WORDS}, several with commas between") from None
        if size in sizes:
            raise FastVLMError(f"image size {size} is given twice", "give each size once; the first is the default")
        sizes.append(size)
    return sizes


def check_context(context: int, longest: int, image_size: int, name: str) -> None:
    """Raise FastVLMError for a context longer than the model `name` was trained for, or too short for a picture and an answer.

    `longest` is in positions; 0 if it is not known.
    """
    tokens = visual_tokens(image_size)
    if longest and context > longest:
        raise FastVLMError(f"a context of {context} is longer than the {longest} positions {name} was trained for", "lower --context")
    if context < tokens + MIN_ANSWER:
        raise FastVLMError(
            f"a context of {context} is too short for a picture of {tokens} tokens and a conversation",
            f"give at least {tokens + MIN_ANSWER}, or a smaller --image-size",
        )
