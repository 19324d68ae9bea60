"""Argument types for the parsers of several commands. Each raises argparse.ArgumentTypeError that names the value."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Literal

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir import limits
from fastvlm_edge.model_dir.manifest import STRIDE


def given(text: str) -> str:
    """A text that is not empty. A shell passes an empty one for a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, as a variable of the shell that is not set")
    return text


def given_path(text: str) -> Path:
    """A path that is not empty, which `Path` would take for the working directory."""
    return Path(given(text))


def integer(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def number(text: str) -> float:
    """A number, infinity and NaN included."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive(text: str) -> int:
    """An integer of at least 1."""
    return at_least(text, 1)


def at_least(text: str, least: int) -> int:
    """An integer of at least `least`."""
    value = integer(text)
    if value < least:
        wanted = "not a positive number" if least == 1 else f"too small; give at least {least}"
        raise argparse.ArgumentTypeError(f"{value} is {wanted}")
    return value


def at_least_zero(text: str) -> float:
    """A number that is not negative."""
    value = number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def image_size(text: str) -> int | Literal["auto"]:
    """One of the sizes of a model, which is judged when it is loaded, or `auto`."""
    return "auto" if text == "auto" else positive(text)


def image_sizes(text: str) -> list[int]:
    """Image sizes, separated by commas. Which multiples of 64 are possible depends on the checkpoint."""
    try:
        sizes = limits.image_sizes(text)
    except FastVLMError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.mend}") from None
    if wrong := [size for size in sizes if size <= 0 or size % STRIDE]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is not a multiple of {STRIDE}; choose {limits.SIZES_IN_WORDS}")
    return sizes
