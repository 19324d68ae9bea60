"""A whole session of the TensorRT backend over the real cuda-python and the stand-in: load, picture, three tokens, growth, close.

`golden.py` has its trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.backends.tensorrt import TensorRTBackend
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.progress import SilentProgress
from tests.support.fake_engine import build_engines
from tests.support.fake_libcuda.books import Books, platform
from tests.support.fake_model import IMAGE_SIZE, TOKENS, VOCAB, build_model

CAPACITY = 128
PIXELS = np.random.default_rng(0).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
TEXT = [int(each) for each in np.random.default_rng(1).integers(0, VOCAB, CAPACITY)]
QUESTION = [*TEXT[:5], *range(VOCAB, VOCAB + TOKENS), *TEXT[5 : CAPACITY - 3 - TOKENS]]
"""Leaves room for three tokens in the first capacity of the cache."""


@dataclass
class Notes(SilentProgress):
    """Keeps what a user would read."""

    texts: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.texts.append(text)


def load(model: Path, books: Books, notes: Notes | None = None, *, slots: int = 1) -> TensorRTBackend:
    """Load the fake engines of a model directory."""
    (folder,) = (model / "engines").iterdir()
    return TensorRTBackend(folder, read_manifest(model), platform(open_cuda(), books), slots=slots, progress=notes or Notes())


def talk(backend: Backend, tokens: int = 6) -> list[NDArray[np.float32]]:
    """A picture, a question about it, three tokens, one for which the cache grows, and two more. Returns the logits of each step."""
    picture = backend.encode(PIXELS)
    ids: list[list[int]] = [QUESTION, *([token] for token in TEXT[-6:][:tokens])]
    logits = []
    for step in ids:
        output = backend.step(step, (picture,), want_logits=step is QUESTION)
        logits.append((output.top_values if output.logits is None else output.logits).copy())
    return logits


def expected_logits(model: Path) -> list[NDArray[np.float32]]:
    """The same conversation on onnxruntime."""
    backend = OrtBackend(model, read_manifest(model), threads=1)
    try:
        return talk(backend)
    finally:
        backend.close()


def assert_equal(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> None:
    """The fake model takes the sine of large sums, so sums in another order differ a little."""
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-2)


def session(model: str) -> None:
    """The session of the golden trace. Raises AssertionError for wrong logits, for mistakes, and for what was not given back."""
    books = Books()
    backend = load(Path(model), books)
    found = talk(backend)
    backend.close()
    books.assert_clean()
    assert_equal(found, expected_logits(Path(model)))


def build(directory: Path, *, static: bool = False, max_batch: int = 1) -> Path:
    """A model directory with fake engines as the sessions use it: of two profiles, or `static` ones for two capacities."""
    model = build_model(directory / "model", context=2 * CAPACITY)
    build_engines(model, profiles=2, static=(CAPACITY, 2 * CAPACITY) if static else (), max_batch=max_batch)
    return model
