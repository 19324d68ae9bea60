"""The reference answers of a model: `reference.npz`, which `convert` writes into the model directory."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    other_sizes: dict[int, Float32] = field(default_factory=dict)
    """Further sizes of pictures -> their features, as `features`."""
    noisy: bool = False
    """Whether the reference itself rounds more than FP32: `compute_reference` does with integer weights."""

    def write(self, directory: Path) -> None:
        """Write `reference.npz`. Features are stored in FP16 with one scale per visual token."""
        features = {"": self.features, **{f".{size}": each for size, each in self.other_sizes.items()}}
        arrays: dict[str, Any] = {}
        for ending, each in features.items():
            largest = np.maximum(np.abs(each).max(axis=-1, keepdims=True), 1e-30)
            arrays[f"features{ending}"] = (each / largest).astype(np.float16)
            arrays[f"feature_scales{ending}"] = largest.astype(np.float32)
        np.savez_compressed(
            directory / REFERENCE_NAME,
            format=np.int32(FORMAT),
            program=np.array(self.program),
            ids=np.array(self.passage.ids, np.int32),
            turn=np.int32(self.passage.turn),
            positions=np.array(self.passage.positions, np.int32),
            top_ids=self.rows.ids,
            top_values=self.rows.values,
            log_normalizer=self.rows.normalizer,
            **arrays,
        )

    def features_at(self, size: int, default: int) -> Float32:
        """The features of pictures of `size` pixels, where `default` is the size of `features`. Raises FastVLMError if it has none."""
        if size == default:
            return self.features
        if size not in self.other_sizes:
            raise FastVLMError(
                f"{REFERENCE_NAME} has no image features of {size} px, which the manifest names", "convert the checkpoint again"
            )
        return self.other_sizes[size]


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
            names = [name.partition(".") for name in stored.files]
            return Reference(
                program=str(stored["program"]),
                passage=Passage(stored["ids"].tolist(), int(stored["turn"]), stored["positions"].tolist()),
                features=_features(stored, ""),
                rows=Rows(stored["top_ids"], stored["top_values"], stored["log_normalizer"]),
                other_sizes={int(size): _features(stored, f".{size}") for kind, _, size in names if kind == "features" and size},
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = f"{path} is damaged ({type(error).__name__}: {error})"
        raise FastVLMError(what, "copy the model directory again, or convert the checkpoint again") from None


def _features(stored: Mapping[str, NDArray[Any]], ending: str) -> Float32:
    features: Float32 = stored[f"features{ending}"].astype(np.float32) * stored[f"feature_scales{ending}"]
    return features


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
        others = {
            size: np.stack([backend.encode(pixels).numpy() for pixels in stored_pictures(size, manifest.vision.geometry)])
            for size in manifest.vision.other_sizes
        }
        noisy = any("int" in stage for stage in manifest.plan.values())
        features = np.stack([picture.numpy() for picture in pictures])
        return Reference(backend.description, passage, features, joined, others, noisy)
    finally:
        backend.close()
        progress.done()
