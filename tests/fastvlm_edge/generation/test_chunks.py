"""The length of a call changes logits of integer weights a little, and greedy answers only where two tokens are nearly equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastvlm_edge.backends.ort import HostFeatures, OrtDecoder, OrtVision
from fastvlm_edge.backends.ort_session import on_device
from fastvlm_edge.backends.verification.conversation import stored_passage, stored_pictures
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import read_manifest

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo" / "fastvlm-demo"
CHUNKS = (1, 7, 16, 100)
TOKENS = 24
LARGEST = 0.03
"""Of the largest logit: the documented difference (docs/precision.md)."""


@pytest.fixture(scope="module", params=["demo int8", "demo int4", "random int8", "random int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from fastvlm_edge.convert.pipeline import convert
    from tests.support.checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("chunks")
    name, precision = request.param.split()
    checkpoint = DEMO if name == "demo" else write_checkpoint(folder / "checkpoint", layout="native")
    convert(str(checkpoint), folder / "model", precision=precision)
    return folder / "model"


class Answering:
    """A decoder with the stored pictures and passage."""

    def __init__(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        setup = on_device(directory, manifest, threads=1)
        vision, self.decoder = OrtVision(setup), OrtDecoder(setup)
        pixels = stored_pictures(manifest.vision.image_size, manifest.vision.geometry)
        self.pictures: tuple[HostFeatures, ...] = tuple(vision.encode(picture) for picture in pixels)
        self.ids = list(stored_passage(TextTokenizer(directory / "tokenizer.json"), manifest).ids)

    def rows(self, ids: Sequence[int], chunk: int, count: int) -> np.ndarray:
        """Logits [count, vocab] of the last positions, with `chunk` ids in a call."""
        self.decoder.reset()
        rows: list[np.ndarray] = []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            wanted = [at for at in range(len(part)) if start + at >= len(ids) - count]
            out = self.decoder.step(part, self.pictures, logit_positions=wanted or None, want_logits=bool(wanted))
            if out.logits is not None:
                rows.append(out.logits.copy())
        return np.concatenate(rows)

    def answer(self, chunk: int) -> list[int]:
        """Greedy tokens after the passage, which is prefilled in chunks."""
        tokens = [int(self.rows(self.ids, chunk, 1)[-1].argmax())]
        while len(tokens) < TOKENS:
            tokens.append(int(self.decoder.step([tokens[-1]], self.pictures).top_ids[-1, 0]))
        return tokens


@pytest.fixture(scope="module")
def answering(model: Path) -> Answering:
    return Answering(model)


def test_logits_differ_by_no_more_than_documented(answering: Answering) -> None:
    whole = answering.rows(answering.ids, len(answering.ids), 32)
    for chunk in CHUNKS:
        assert np.abs(answering.rows(answering.ids, chunk, 32) - whole).max() <= LARGEST * np.abs(whole).max()


def test_greedy_answers_are_equal_but_where_two_tokens_are_nearly_equal(answering: Answering) -> None:
    whole = answering.answer(len(answering.ids))
    # The row of every token of the answer, from a single call
    rows = answering.rows([*answering.ids, *whole], len(answering.ids) + TOKENS, TOKENS + 1)[:-1]
    best = np.sort(rows, axis=1)
    margins, difference = best[:, -1] - best[:, -2], LARGEST * np.abs(rows).max()
    assert (margins > 2 * difference).any(), "no token is decided clearly, so that nothing is tested"
    for chunk in CHUNKS:
        other = next((at for at, (a, b) in enumerate(zip(answering.answer(chunk), whole, strict=True)) if a != b), None)
        assert other is None or margins[other] <= 2 * difference
