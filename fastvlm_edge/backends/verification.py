"""The stored conversation about stored pictures that every conversion and every new engine is checked with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

PICTURES = ("astronaut.jpg", "coffee.jpg")
"""NASA's portrait of Eileen Collins (public domain) and a coffee cup by Rachel Michetti (CC0), as scikit-image ships them."""
QUESTION = "What do you see in this picture? Answer in one short sentence."
ANSWER = "The picture shows a person or a thing in front of a plain background, in 1 or 2 colours."
LOGITS_A_CALL = 8
DECODED = 12
"""Ids at the end of the conversation that are given one by one, as in decoding."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far `found` is from `expected`."""

    cosine: float
    largest: float
    """Largest absolute difference."""
    relative: float
    """Norm of the difference over the norm of the expected values."""


def compare(found: Float32, expected: Float32) -> Difference:
    """Compare two arrays of one shape, in double precision."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    difference = a - b
    return Difference(
        cosine=float(a @ b) / norms if norms else float(not difference.any()),
        largest=float(np.abs(difference).max()),
        relative=float(np.linalg.norm(difference) / max(float(np.linalg.norm(b)), 1e-30)),
    )


def stored_pictures(image_size: int, geometry: str) -> list[Float32]:
    """pixel_values [1, 3, image_size, image_size] of the pictures that come with the toolkit."""
    folder = Path(str(files("fastvlm_edge"))) / "pictures"
    return [preprocess(folder / name, image_size, geometry) for name in PICTURES]


def stored_conversation(tokenizer: TextTokenizer, manifest: Manifest, rows: int) -> list[int]:
    """Ids of a question about a picture of `rows` visual tokens, and of an answer."""
    template = ChatTemplate(tokenizer, manifest)
    return [*template.opening(), *template.turn(QUESTION, (rows,)), *tokenizer.encode(ANSWER)]


@dataclass(frozen=True)
class Answers:
    """What a backend says along the stored conversation about the first picture."""

    features: Float32
    """[pictures, tokens, hidden]"""
    logits: Float32
    """[positions, vocab]: LOGITS_A_CALL at the end of each of two prefill chunks, then DECODED single steps."""


def answer(backend: Backend, tokenizer: TextTokenizer, manifest: Manifest) -> Answers:
    """Run both graphs on the stored inputs: prefill in two chunks, then ids one by one; the cache is empty before and after."""
    vision = manifest.vision
    encoded = [backend.encode(pixels) for pixels in stored_pictures(vision.image_size, vision.geometry)]
    shown = (encoded[0],)
    ids = stored_conversation(tokenizer, manifest, encoded[0].rows)
    middle, end = len(ids) // 2, len(ids) - DECODED
    backend.reset()
    rows = []
    for start, stop in ((0, middle), (middle, end), *((i, i + 1) for i in range(end, len(ids)))):
        positions = range(max(stop - start - LOGITS_A_CALL, 0), stop - start)
        output = backend.step(ids[start:stop], shown, logit_positions=positions, want_logits=True)
        assert output.logits is not None
        rows.append(output.logits.copy())
    backend.reset()
    return Answers(np.stack([features.numpy() for features in encoded]), np.concatenate(rows))
