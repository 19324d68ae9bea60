"""Will a build fit? Host memory that TensorRT takes to build an engine, predicted from the weights that go in."""

from __future__ import annotations

from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import PARTS

_MIB = 1 << 20
_BASE = 300 * _MIB
_FACTOR = {"tensorrt_rtx": 2.5, "tensorrt": 4.0}
"""Bytes for each byte of weights, the mapped weights file not counted. TensorRT for RTX: 2.15 for floats and 2.5 for integers in the 0.5B
model (`benchmarks/results/engine_builds.json`). TensorRT proper was not measured here; users of TensorRT-Edge-LLM report three to four
times the parameters (its issue 30)."""


def predicted_peak(weight_bytes: int, library: str) -> int:
    """Memory of the process at its largest while it builds an engine of that many bytes of weights."""
    return int(_BASE + _FACTOR[library] * weight_bytes)


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int] | None:
    """Bytes of memory and of swap that are free for a new program, None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10, int(lines["SwapFree"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def check_memory(model: Path, library: str, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Refuse a build that would run out of memory halfway. Raises FastVLMError with the figures and what to do."""
    free = available_memory(meminfo)
    if free is None:
        return
    part = max(PARTS, key=lambda name: (model / f"{name}.weights").stat().st_size)
    needed = predicted_peak((model / f"{part}.weights").stat().st_size, library)
    if needed > sum(free):
        short = needed - sum(free)
        raise FastVLMError(
            f"building {part}.engine takes about {needed // _MIB:,} MiB of memory, and {free[0] // _MIB:,} MiB and {free[1] // _MIB:,} MiB "
            "of swap are free; close other programs (on a Jetson the desktop: sudo systemctl isolate multi-user), add "
            f"{-(-short // (1 << 30))} GiB of swap, or convert with --precision int4; --no-memory-check tries all the same"
        )
