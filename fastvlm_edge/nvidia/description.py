"""The GPU and its driver, for the records of measurements."""

from __future__ import annotations

import subprocess
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia import drivers


def describe_gpu() -> dict[str, Any]:
    """The GPU and its driver, as CUDA reports them; `{"missing": why}` if there is no GPU. Opens a CUDA context and closes it."""
    try:
        cuda = drivers.open_cuda()
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
