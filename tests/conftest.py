"""Fixtures that several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from tests.fake_model import build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory; do not write to it."""
    return build_model(tmp_path_factory.mktemp("fake") / "model")


@pytest.fixture(scope="session")
def vlm(model_dir: Path) -> Iterator[FastVLM]:
    """The tiny model, loaded; do not close it."""
    with FastVLM.load(model_dir, threads=1) as loaded:
        yield loaded
