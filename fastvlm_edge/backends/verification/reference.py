"""The reference answers of a model: `reference.npz`, which `convert` writes into the model directory."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.protocol import PREFILL_CHUNK
from fastvlm_edge.backends.verification.compare import Rows, top_rows
from fastvlm_edge.backends.verification.conversation import Passage, stored_passage, stored_pictures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress

REFERENCE_NAME = "reference.npz"
FORMAT = 1
"""Raise this if the stored pictures or the arrays change: files of other formats are refused."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What the stored weights compute in FP32 for the stored pictures and the stored passage."""

    program: str
    """What computed it, as text for users."""
    passage: Passage
    features: Float32
    """[pictures, tokens, hidden]"""
    rows: Rows
    """One row for each of `passage.positions`, computed with `features`."""
    noisy: bool = False
    """Whether the reference itself rounds more than FP32: `compute_reference` does with integer weights."""

    def write(self, directory: Path) -> None:
        """Write `reference.npz`. Features are stored in FP16 with one scale per visual token."""
        largest = np.maximum(np.abs(self.features).max(axis=-1, keepdims=True), 1e-30)
        np.savez_compressed(
            directory / REFERENCE_NAME,
            format=np.int32(FORMAT),
            program=np.array(self.program),
            ids=np.array(self.passage.ids, np.int32),
            turn=np.int32(self.passage.turn),
            positions=np.array(self.passage.positions, np.int32),
            features=(self.features / largest).astype(np.float16),
            feature_scales=largest.astype(np.float32),
            top_ids=self.rows.ids,
            top_values=self.rows.values,
            log_normalizer=self.rows.normalizer,
        )


def read_reference(directory: Path) -> Reference:
    """The reference in a model directory. Raises FastVLMError if there is none, if it is damaged, or of another format."""
    path = directory / REFERENCE_NAME
    if not path.is_file():
        raise FastVLMError(f"{path} is missing, which answers on a GPU are compared with", "convert the checkpoint again")
    try:
        with np.load(path, allow_pickle=False) as stored:
            if int(stored["format"]) != FORMAT:
                what = f"{path} has format {int(stored['format'])}, but this toolkit reads format {FORMAT}"
                raise FastVLMError(what, "convert the checkpoint again")
            return Reference(
                program=str(stored["program"]),
                passage=Passage(stored["ids"].tolist(), int(stored["turn"]), stored["positions"].tolist()),
                features=stored["features"].astype(np.float32) * stored["feature_scales"],
                rows=Rows(stored["top_ids"], stored["top_values"], stored["log_normalizer"]),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = f"{path} is damaged ({type(error).__name__}: {error})"
        raise FastVLMError(what, "copy the model directory again, or convert the checkpoint again") from None


def compute_reference(directory: Path, manifest: Manifest, progress: Progress, threads: int | None = None) -> Reference:
    """The reference that onnxruntime computes on the CPU, for `build --reference ort`. It needs the memory of the whole model."""
    passage = stored_passage(TextTokenizer(directory / "tokenizer.json"), manifest)
    backend = OrtBackend(directory, manifest, threads=threads, progress=progress)
    try:
        progress.stage("running onnxruntime for comparison", len(passage.ids))
        pictures = tuple(backend.encode(pixels) for pixels in stored_pictures(manifest.vision.image_size, manifest.vision.geometry))
        rows = []
        for start in range(0, len(passage.ids), PREFILL_CHUNK):
            ids = passage.ids[start : start + PREFILL_CHUNK]
            asked = [position - start for position in passage.positions if start <= position < start + len(ids)]
            output = backend.step(ids, pictures, logit_positions=asked or None, want_logits=bool(asked))
            if output.logits is not None:
                rows.append(top_rows(output.logits))
            progress.advance(len(ids))
        joined = Rows(*(np.concatenate([getattr(part, name) for part in rows]) for name in ("ids", "values", "normalizer")))
        noisy = any("int" in stage for stage in manifest.plan.values())
        return Reference(backend.description, passage, np.stack([picture.numpy() for picture in pictures]), joined, noisy)
    finally:
        backend.close()
        progress.done()
