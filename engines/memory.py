"""Predict the memory that a build needs, from the size of the weights, and refuse a build that does not fit.

There are two limits. What the GPU uses must be in memory: swap does not help. What only the builder uses may be swapped out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.memory import read_memory
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.engine_record import PARTS
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.planning.predict import activation_bytes
from fastvlm_edge.planning.workload import shape_of

if TYPE_CHECKING:  # it needs numpy, which `plan` does not
    from fastvlm_edge.nvidia.cuda import Cuda

_MIB = 1 << 20
_BASE = 300 * _MIB
_FACTOR = {"tensorrt_rtx": 2.65, "tensorrt": 4.0}
"""Bytes of anonymous memory per byte of weights. TensorRT for RTX, with one profile: 2.2 for floats and 2.6 for integers, measured with the
0.5B model (`benchmarks/results/engine_builds.json`). TensorRT itself was not measured; users of TensorRT-Edge-LLM report three to four
times the size of the parameters (its issue 30)."""
_CACHES = "drop the file cache (sync; echo 3 | sudo tee /proc/sys/vm/drop_caches)"


def predicted_peak(weight_bytes: int, library: str) -> int:
    """Predicted peak of the anonymous memory, in bytes, of a process that builds an engine from `weight_bytes` bytes of weights."""
    return int(_BASE + _FACTOR[library] * weight_bytes)


def predicted_scratch(manifest: Manifest, prefills: int = 1) -> int:
    """Predicted scratch memory, in bytes, of the engine that needs more; 0 if an early version wrote the manifest.

    `prefills` is the number of conversations that a prefill call of the engine takes.
    """
    try:
        shape = shape_of(manifest)
    except FastVLMError:
        return 0
    fused = manifest.decoder.dtype != "float32"
    return int(activation_bytes(shape, manifest.vision.sizes[-1], manifest.decoder.context, fused=fused, prefills=prefills))


def available_memory() -> tuple[int, int] | None:
    """Available memory and free swap, in bytes. None if the system does not report them."""
    memory = read_memory(Probe())
    return (memory.available, memory.swap_free) if memory.total else None


def check_memory(model: Path, manifest: Manifest, library: str, cuda: Cuda | None, *, decoders: int = 1, prefills: int = 1) -> None:
    """Raise FastVLMError if a build would run out of memory, with the figures and what to do.

    `cuda` is the GPU of this machine, and `decoders` the number of engines of the decoder that run on it at the same time.
    `prefills` as in `predicted_scratch`.
    """
    free = available_memory()
    weights = {part: (model / f"{part}.weights").stat().st_size for part in PARTS}
    part = max(PARTS, key=weights.__getitem__)
    if cuda is not None:
        loaded = weights["vision"] + decoders * weights["decoder"]
        _check_gpu(part, weights[part], loaded, predicted_scratch(manifest, prefills), cuda, free)
    if free is None:
        return
    needed = predicted_peak(weights[part], library)
    if needed > sum(free):
        short = needed - sum(free)
        raise FastVLMError(
            f"building {part}.engine needs about {needed // _MIB:,} MiB of memory, but only {free[0] // _MIB:,} MiB of memory and "
            f"{free[1] // _MIB:,} MiB of swap are free",
            "close other programs (on a Jetson also the desktop: sudo systemctl isolate multi-user), add "
            f"{-(-short // (1 << 30))} GiB of swap, convert with --precision int4, or try anyway with --no-memory-check",
        )


def _check_gpu(part: str, largest: int, loaded: int, scratch: int, cuda: Cuda, free: tuple[int, int] | None) -> None:
    """Compare with the memory of the GPU. An engine has about the size of its weights: `largest` of `part`, `loaded` of all that run."""
    if not cuda.device.integrated:
        needed, there = loaded + scratch, cuda.free_bytes()
        what = f"the engines need about {needed // _MIB:,} MiB of GPU memory, but only {there // _MIB:,} MiB are free"
        mend = "close other programs that use the GPU"
    elif free is not None:
        # Shared with the host: first the finished plan in the builder and its weights on the GPU, then all engines.
        needed, there = max(2 * largest, loaded) + scratch, free[0]
        what = (
            f"{part}.engine and its copy in the builder, or all engines, need about {needed // _MIB:,} MiB that the GPU can use, but only "
            f"{there // _MIB:,} MiB of memory are free, and swap does not count"
        )
        mend = f"close other programs (also the desktop: sudo systemctl isolate multi-user), {_CACHES}"
    else:
        return
    if needed > there:
        raise FastVLMError(what, f"{mend}, convert with --precision int4, or try anyway with --no-memory-check")
