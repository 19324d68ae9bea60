"""Which machine and versions a figure was measured with. Standard library only."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
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


def describe_gpu() -> dict[str, Any]:
    """The GPU and its driver, as CUDA reports them; `{"missing": why}` if there is no GPU. Opens a CUDA context and closes it."""
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
    """Version that nvidia-smi prints; None if there is no nvidia-smi, as on some Jetsons."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
