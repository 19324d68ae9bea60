"""Choose the backend for a model directory: the one that the user named, or with `auto` the best that this machine can run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastvlm_edge.backends import malloc
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.model_dir.engine_record import ENGINES
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress, SilentProgress

BACKENDS = ("auto", "ort", "ort-cuda", "tensorrt")


def select(
    name: str,
    directory: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    slots: int = 1,
    tune_process: bool = False,
    progress: Progress | None = None,
) -> Backend:
    """Load the model directory into a backend whose cache holds at most `slots` conversations.

    `tensorrt` runs the engines that `fastvlm-edge build` made, `ort` is onnxruntime on the CPU, `ort-cuda` is onnxruntime on an NVIDIA GPU.
    Engines and `ort-cuda` are checked at their first load on a GPU, and refused if their answers are not those of the conversion.
    `auto` takes the first that runs on this machine: `tensorrt` if there are engines, `ort-cuda` if onnxruntime has the CUDA provider, and
    `ort`; the backend's description then says why not the others.
    `slots` is how many conversations the cache may hold at a time; a backend may have fewer.
    `tune_process` changes two settings of the whole process until it ends: the thresholds of the C heap (`malloc.loading`), and one memory
    arena for all onnxruntime sessions (`ort_session.share_arena`). Both save memory, and results are the same. Without it, the load changes
    neither.
    Raises FastVLMError for an unknown name, a package that is missing or broken, or a backend that cannot run on this machine or with this
    model directory.
    """
    if name not in BACKENDS:
        raise FastVLMError(f"backend {name!r} is unknown", f"use one of: {', '.join(BACKENDS)}")
    with package_errors(), _tuned() if tune_process else contextlib.nullcontext():
        if name == "auto":
            return _first_that_runs(directory, manifest, threads, slots, progress or SilentProgress())
        return _load(name, directory, manifest, threads, slots, progress)


@contextlib.contextmanager
def _tuned() -> Iterator[None]:
    from fastvlm_edge.backends.ort_session import share_arena

    share_arena()
    with malloc.loading():
        yield


def _load(name: str, directory: Path, manifest: Manifest, threads: int | None, slots: int, progress: Progress | None) -> Backend:
    if name == "tensorrt":
        from fastvlm_edge.backends.load_engines import load_engines

        return load_engines(directory, manifest, slots=slots, progress=progress)
    if name == "ort-cuda":
        from fastvlm_edge.backends.load_ort_cuda import load_ort_cuda

        return load_ort_cuda(directory, manifest, threads=threads, slots=slots, progress=progress)
    from fastvlm_edge.backends.ort import OrtBackend

    return OrtBackend(directory, manifest, threads=threads, slots=slots, progress=progress)


def _first_that_runs(directory: Path, manifest: Manifest, threads: int | None, slots: int, progress: Progress) -> Backend:
    engines = any(not path.name.startswith(".") for path in (directory / ENGINES).glob("*"))
    reasons = [] if engines else ["no TensorRT engines"]
    for name in ("tensorrt", "ort-cuda"):
        if not (engines if name == "tensorrt" else _runs_on_cuda(manifest)):
            continue
        try:
            backend = _load(name, directory, manifest, threads, slots, progress)
        except FastVLMError as error:  # the user expects it to run, so say why it does not
            progress.done()
            progress.note(f"not using {name}: {error}")
            reasons.append(str(error))
        else:
            break
    else:
        backend = _load("ort", directory, manifest, threads, slots, progress)
    backend.description += f" (auto: {'; '.join(reasons)})" if reasons else " (auto)"
    return backend


def _runs_on_cuda(manifest: Manifest) -> bool:
    """Whether onnxruntime has the CUDA provider, and the model directory a decoder for it."""
    from fastvlm_edge.backends.ort_session import CUDA_DECODER, has_cuda

    return CUDA_DECODER in manifest.files and has_cuda()
