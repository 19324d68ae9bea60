"""Image sizes and contexts that a model directory may have: one rule for `convert`, which writes it, and `plan`, which recommends it."""

from __future__ import annotations

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import STRIDE, visual_tokens

IMAGE_SIZES = range(256, 1536 + 1, STRIDE)
DEFAULT_CONTEXT = 4096
MIN_ANSWER = 64
"""Positions that a context must have in addition to those of one picture."""


def check_image_size(size: int, trained: int, name: str) -> None:
    """Raise FastVLMError for a size in pixels that is not supported. The model `name` was trained at `trained`, which always is."""
    if size != trained and size not in IMAGE_SIZES:
        raise FastVLMError(
            f"image size {size} is not supported", f"choose 256 to 1536 in steps of {STRIDE} ({name} was trained at {trained})"
        )


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
