"""What machine and which versions a figure comes from. Standard library only, so that it runs on a board."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.version import __version__

PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow")
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt_rtx", "cuda-bindings", "pycuda")
IDENTITY = ("cpu", "cores", "memory_gib", "architecture", "board", "gpu")
"""What two records must share to be of the same kind of machine. Versions may differ: those are what one may want to compare."""
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve")


def describe(packages: Sequence[str] = PACKAGES, root: Path = Path("/")) -> dict[str, Any]:
    """Processor, cores, memory, board, operating system, versions and today's date."""
    fields = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    described: dict[str, Any] = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": sorted(flags & set(_FLAGS)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"fastvlm-edge": __version__, **{name: package_version(name) for name in packages}},
        "date": datetime.date.today().isoformat(),
    }
    board = _read(root / "proc/device-tree/model").strip("\0 \n")
    if board:
        described["board"] = board
    jetson_linux = _read(root / "etc/nv_tegra_release").splitlines()
    if jetson_linux:
        described["jetson_linux"] = jetson_linux[0].strip("# ")
    return described


def gpu_versions() -> dict[str, str]:
    """The installed packages that a GPU's figures depend on."""
    names = {(each.metadata["Name"] or "").lower(): each.version for each in distributions()}
    return {name: names[name] for name in GPU_PACKAGES if name in names}


def describe_gpu() -> dict[str, Any]:
    """The GPU and its driver, as CUDA has them; `{"missing": why}` where there is none. Makes a CUDA context and closes it."""
    from fastvlm_edge.nvidia.drivers import open_cuda

    try:
        cuda = open_cuda()
    except FastVLMError as error:
        return {"missing": str(error)}
    device = cuda.device
    cuda.close()
    return {
        "name": device.name,
        "compute_capability": list(device.compute_capability),
        "memory_mib": device.total_bytes >> 20,
        "integrated": device.integrated,
        "driver": driver_version(),
        "cuda_of_driver": device.driver,
    }


def driver_version() -> str | None:
    """As nvidia-smi has it; None where there is none, as on some Jetsons."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def package_version(name: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
