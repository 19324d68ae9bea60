"""The tiny model with pictures of three sizes, and a cascade over them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.model_dir.manifest import Cascade
from tests.support.fake_model import IMAGE_SIZE, build_model

SMALL, MIDDLE, LARGE = SIZES = [64, 128, IMAGE_SIZE]
"""The largest is the default."""


def build_sizes(directory: Path, **more: Any) -> Path:
    """Its model directory, whose cascade was not fitted."""
    return build_model(directory, other_sizes=SIZES[:-1], **more)


def with_cascade(vlm: FastVLM, threshold: float, confidence: Any = "mean", sizes: list[int] | None = None) -> FastVLM:
    """The same model with a fitted cascade, which "auto" uses."""
    cascade = Cascade(SIZES if sizes is None else sizes, threshold, confidence)
    return FastVLM(dataclasses.replace(vlm.manifest, cascade=cascade), vlm.tokenizer, vlm._engine)


def between(vlm: FastVLM, picture: Any, prompt: str) -> tuple[str, float]:
    """A question whose answer at the first size is less certain than that at the second, and a threshold between both."""
    for number in range(100):
        asked = f"{prompt} {number}"
        first, second = (vlm.generate(asked, picture, image_size=size, max_new_tokens=8).confidence for size in SIZES[:2])
        assert first is not None and second is not None
        if first.mean < 0.9 * second.mean:
            return asked, (first.mean + second.mean) / 2
    raise AssertionError("all answers are more certain at the first size")


class Paused:
    """A backend whose steps wait until they may `go`; `begun` says that one does."""

    def __init__(self, vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        backend = vlm._engine.backend
        step: Callable[..., Any] = backend.step

        def waits(*given: Any, **options: Any) -> Any:
            self.begun.set()
            assert self.go.wait(20)
            return step(*given, **options)

        monkeypatch.setattr(backend, "step", waits)
