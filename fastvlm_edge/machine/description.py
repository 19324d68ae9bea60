"""Which machine and versions a figure was measured with. Standard library only."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.memory import total_bytes
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.machine.processor import read_cpuinfo
from fastvlm_edge.version import __version__

PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow")
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt_rtx", "cuda-bindings", "pycuda")
IDENTITY = ("cpu", "cores", "memory_gib", "architecture", "board", "gpu")
"""Fields in which two records of the same kind of machine agree. Versions are not among them, because one may want to compare versions."""


def describe(packages: Sequence[str] = PACKAGES, root: Path = Path("/")) -> dict[str, Any]:
    """Processor, cores, memory in GiB, board, operating system, versions of Python and `packages`, and today's date."""
    probe = Probe(root)
    cpu = read_cpuinfo(probe)
    described: dict[str, Any] = {
        "cpu": cpu.name or platform.processor() or platform.machine(),
        "cores": probe.cores,
        "instructions": sorted(cpu.flags),
        "memory_gib": round(total_bytes() / 2**30, 1),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"fastvlm-edge": __version__, **{name: package_version(name) for name in packages}},
        "date": datetime.date.today().isoformat(),
    }
    board = probe.text("proc/device-tree/model")
    if board:
        described["board"] = board
    jetson_linux = (probe.text("etc/nv_tegra_release") or "").splitlines()
    if jetson_linux:
        described["jetson_linux"] = jetson_linux[0].strip("# ")
    return described


def gpu_versions() -> dict[str, str]:
    """Version of each installed package that the figures of a GPU depend on."""
    names = {(each.metadata["Name"] or "").lower(): each.version for each in distributions()}
    return {name: names[name] for name in GPU_PACKAGES if name in names}


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
