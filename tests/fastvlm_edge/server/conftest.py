"""The demo model, served once for all tests of this folder, and the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from tests.support.serving import DEMO, Served, serving


@pytest.fixture(scope="package")
def demo() -> Iterator[FastVLM]:
    """The demo model; do not close it."""
    with FastVLM.load(DEMO / "model", "ort", threads=1, slots=4) as loaded:
        yield loaded


@pytest.fixture(scope="package")
def served(demo: FastVLM) -> Iterator[Served]:
    """A server of the demo model with the settings that it has by itself. It ends with this folder: tests elsewhere change the clock."""
    with serving(demo) as found:
        yield found


@pytest.fixture(scope="module")
def vlm(model_dir: Path) -> Iterator[FastVLM]:
    """The tiny model with two slots."""
    with FastVLM.load(model_dir, "ort", threads=1, slots=2) as loaded:
        yield loaded
