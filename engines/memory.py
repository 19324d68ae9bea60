"""Predict the host memory that TensorRT needs to build an engine, from the size of the weights, and refuse a build that does not fit."""

from __future__ import annotations

from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.memory import read_memory
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.engine_record import PARTS

_MIB = 1 << 20
_BASE = 300 * _MIB
_FACTOR = {"tensorrt_rtx": 2.5, "tensorrt": 4.0}
"""Bytes of memory per byte of weights, without the mapped weights file. TensorRT for RTX: 2.15 for floats and 2.5 for integers, measured
with the 0.5B model (`benchmarks/results/engine_builds.json`). TensorRT itself was not measured; users of TensorRT-Edge-LLM report three to
four times the size of the parameters (its issue 30)."""


def predicted_peak(weight_bytes: int, library: str) -> int:
    """Predicted peak memory, in bytes, of a process that builds an engine from `weight_bytes` bytes of weights."""
    return int(_BASE + _FACTOR[library] * weight_bytes)


def available_memory() -> tuple[int, int] | None:
    """Available memory and free swap, in bytes. None if the system does not report them."""
    memory = read_memory(Probe())
    return (memory.available, memory.swap_free) if memory.total else None


def check_memory(model: Path, library: str) -> None:
    """Raise FastVLMError if a build would run out of memory, with the figures and what to do."""
    free = available_memory()
    if free is None:
        return
    part = max(PARTS, key=lambda name: (model / f"{name}.weights").stat().st_size)
    needed = predicted_peak((model / f"{part}.weights").stat().st_size, library)
    if needed > sum(free):
        short = needed - sum(free)
        raise FastVLMError(
            f"building {part}.engine needs about {needed // _MIB:,} MiB of memory, but only {free[0] // _MIB:,} MiB of memory and "
            f"{free[1] // _MIB:,} MiB of swap are free",
            "close other programs (on a Jetson also the desktop: sudo systemctl isolate multi-user), add "
            f"{-(-short // (1 << 30))} GiB of swap, convert with --precision int4, or try anyway with --no-memory-check",
        )
