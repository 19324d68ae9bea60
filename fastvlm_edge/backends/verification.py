"""Verification data: a stored conversation about stored pictures. Every conversion and every new engine is checked with it."""

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
LOGITS_PER_CALL = 8
"""Logits are compared at this many positions at the end of each prefill chunk."""
DECODED = 12
"""Number of ids at the end of the conversation that are fed one by one, as in decoding."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Difference between two arrays, `found` and `expected`."""

    cosine: float
    """Cosine similarity."""
    largest: float
    """Largest absolute difference."""
    relative: float
    """Norm of the difference divided by the norm of the expected values."""


def compare(found: Float32, expected: Float32) -> Difference:
    """Compare two arrays of the same shape, in double precision."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    difference = a - b
    return Difference(
        cosine=float(a @ b) / norms if norms else float(not difference.any()),
        largest=float(np.abs(difference).max()),
        relative=float(np.linalg.norm(difference) / max(float(np.linalg.norm(b)), 1e-30)),
    )


def stored_pictures(image_size: int, geometry: str) -> list[Float32]:
    """pixel_values [1, 3, image_size, image_size] of each picture that comes with the toolkit."""
    folder = Path(str(files("fastvlm_edge"))) / "pictures"
    return [preprocess(folder / name, image_size, geometry) for name in PICTURES]


def stored_conversation(tokenizer: TextTokenizer, manifest: Manifest, rows: int) -> list[int]:
    """Token ids of a question about one picture, which has `rows` visual tokens, and of an answer."""
    template = ChatTemplate(tokenizer, manifest)
    return [*template.opening(), *template.turn(QUESTION, (rows,)), *tokenizer.encode(ANSWER)]


@dataclass(frozen=True)
class Answers:
    """What a backend computes for the stored pictures, and along the stored conversation about the first one."""

    features: Float32
    """[pictures, tokens, hidden]"""
    logits: Float32
    """[positions, vocab]: LOGITS_PER_CALL positions at the end of each of two prefill chunks, then DECODED single steps."""


def answer(backend: Backend, tokenizer: TextTokenizer, manifest: Manifest) -> Answers:
    """Run both graphs on the stored inputs: prefill in two chunks, then ids one by one. Resets the cache before and after."""
    vision = manifest.vision
    encoded = [backend.encode(pixels) for pixels in stored_pictures(vision.image_size, vision.geometry)]
    image_features = (encoded[0],)
    ids = stored_conversation(tokenizer, manifest, encoded[0].rows)
    middle, end = len(ids) // 2, len(ids) - DECODED
    backend.reset()
    rows = []
    for start, stop in ((0, middle), (middle, end), *((i, i + 1) for i in range(end, len(ids)))):
        positions = range(max(stop - start - LOGITS_PER_CALL, 0), stop - start)
        output = backend.step(ids[start:stop], image_features, logit_positions=positions, want_logits=True)
        assert output.logits is not None
        rows.append(output.logits.copy())
    backend.reset()
    return Answers(np.stack([features.numpy() for features in encoded]), np.concatenate(rows))
