"""Which backend runs a model directory: the one asked for, or the first that this machine can run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastvlm_edge.backends import malloc
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.errors import FastVLMError
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
    tune_process: bool = False,
    progress: Progress | None = None,
) -> Backend:
    """Load the model directory into a backend.

    `tensorrt` runs the engines that `fastvlm-edge build` made, `ort` is onnxruntime on the CPU, `ort-cuda` onnxruntime on an NVIDIA GPU.
    `auto` takes the first of tensorrt, ort-cuda and ort that this machine can run, and its description says why not the others.
    `tune_process` changes two settings of the whole process, for good: it sets the thresholds of the C heap (`malloc.loading`), and has all
    onnxruntime sessions share one memory arena (`ort_session.share_arena`). Both save memory and do not change results. Without it the load
    changes neither.
    Raises FastVLMError for a name that is unknown, or a backend that this machine or this model directory cannot run.
    """
    if name not in BACKENDS:
        raise FastVLMError(f"backend {name!r} is unknown; use one of: {', '.join(BACKENDS)}")
    with _tuned() if tune_process else contextlib.nullcontext():
        if name == "auto":
            return _first_that_runs(directory, manifest, threads, progress or SilentProgress())
        return _load(name, directory, manifest, threads, progress)


@contextlib.contextmanager
def _tuned() -> Iterator[None]:
    from fastvlm_edge.backends.ort_session import share_arena

    share_arena()
    with malloc.loading():
        yield


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
