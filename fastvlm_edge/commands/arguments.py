"""Argument types for the parsers of several commands. Each raises argparse.ArgumentTypeError that names the value."""

from __future__ import annotations

import argparse

from fastvlm_edge.model_dir.manifest import STRIDE


def positive(text: str) -> int:
    """An integer of at least 1."""
    return at_least(text, 1)


def at_least(text: str, least: int) -> int:
    """An integer of at least `least`."""
    value = int(text)
    if value < least:
        wanted = "not a positive number" if least == 1 else f"too small; give at least {least}"
        raise argparse.ArgumentTypeError(f"{value} is {wanted}")
    return value


def multiple_of_64(text: str) -> int:
    """A multiple of 64, for `--image-size`. Which of them are possible depends on the checkpoint."""
    value = int(text)
    if value < 1 or value % STRIDE:
        raise argparse.ArgumentTypeError(f"{value} is not one of 256, 320, ... 1536")
    return value
