"""Backends run the two graphs and own the KV cache. `select` makes the one asked for; nothing is imported before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.engine_record import ENGINES
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.manifest import Manifest, VisionSpec
from fastvlm_edge.progress import Progress, SilentProgress

BACKENDS = ("auto", "ort", "ort-cuda", "tensorrt")


class ImageFeatures(Protocol):
    """The visual tokens of one picture, wherever the backend that made them keeps them."""

    @property
    def rows(self) -> int:
        """How many visual tokens."""

    def numpy(self) -> NDArray[np.float32]:
        """A copy on the host: [rows, hidden]."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a step says about its `m` asked-for positions. The arrays may be reused by the next step: take from them what you need first."""

    top_values: NDArray[np.float32]
    """[m, candidates], largest first."""
    top_ids: NDArray[np.int64]
    """[m, candidates]"""
    logits: NDArray[np.float32] | None
    """[m, vocab], where asked for."""


class Backend(Protocol):
    """Runs `vision.onnx` and `decoder.onnx` (docs/graphs.md) for one conversation at a time.

    Positions are implied: a step continues after the `length` positions that the cache holds.
    """

    name: str
    """As in `select`, after `auto` was resolved."""
    description: str
    """Library, version and device, for a person to read."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """pixel_values [1, 3, S, S] in 0..1 -> the features of that picture."""

    def step(
        self,
        input_ids: Sequence[int],
        pictures: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to the cache.

        An id of `vocab + k` is row k of all `pictures` one after another. `logit_positions` index into `input_ids`; None is the last.
        Raises FastVLMError where the context is full or the library fails; the cache then is as before.
        """

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on: a conversation branches, or a draft was refused."""

    def reset(self) -> None:
        """Forget all positions."""

    def close(self) -> None:
        """Give back sessions and memory. The backend cannot be used afterwards."""


def check_pixels(pixel_values: NDArray[np.float32], vision: VisionSpec) -> None:
    """Refuse pixel_values of another shape than the encoder's own with a FastVLMError."""
    expected = (1, 3, vision.image_size, vision.image_size)
    if pixel_values.shape != expected:
        raise FastVLMError(f"pixel_values have shape {list(pixel_values.shape)}; this model takes {list(expected)}")


def select(name: str, directory: Path, manifest: Manifest, *, threads: int | None = None, progress: Progress | None = None) -> Backend:
    """Load the model directory into a backend.

    `tensorrt` runs the engines that `fastvlm-edge build` made, `ort` is onnxruntime on the CPU, `ort-cuda` onnxruntime on an NVIDIA GPU.
    `auto` takes the first of tensorrt, ort-cuda and ort that this machine can run, and its description says why not the others.
    Raises FastVLMError for a name that is unknown, or a backend that this machine or this model directory cannot run.
    """
    if name not in BACKENDS:
        raise FastVLMError(f"backend {name!r} is unknown; use one of: {', '.join(BACKENDS)}")
    if name == "auto":
        return _first_that_runs(directory, manifest, threads, progress or SilentProgress())
    return _load(name, directory, manifest, threads, progress)


def _load(name: str, directory: Path, manifest: Manifest, threads: int | None, progress: Progress | None) -> Backend:
    if name == "tensorrt":
        from fastvlm_edge.backends.load_engines import load_engines

        return load_engines(directory, manifest, threads=threads, progress=progress)
    from fastvlm_edge.backends.ort import OrtBackend

    return OrtBackend(directory, manifest, cuda=name == "ort-cuda", threads=threads, progress=progress)


def _first_that_runs(directory: Path, manifest: Manifest, threads: int | None, progress: Progress) -> Backend:
    passed_over: list[str] = []
    for name in ("tensorrt", "ort-cuda"):
        reason = _absent(name, directory)
        if reason is None:
            try:
                backend = _load(name, directory, manifest, threads, progress)
                break
            except FastVLMError as error:  # it is there and does not run: worth a line of its own
                reason = str(error)
                progress.done()
                progress.note(f"not on {name}: {reason}")
        passed_over.append(reason)
    else:
        backend = _load("ort", directory, manifest, threads, progress)
    backend.description += f" (auto: {'; '.join(passed_over)})" if passed_over else " (auto)"
    return backend


def _absent(name: str, directory: Path) -> str | None:
    """Why there is no need to try, None where there is."""
    if name == "tensorrt":
        return None if (directory / ENGINES).is_dir() else "no TensorRT engines"
    import onnxruntime

    return None if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "onnxruntime without CUDA"
