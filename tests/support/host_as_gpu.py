"""A machine whose onnxruntime has the CUDA provider: its CPU provider runs in place of it, and host memory is the memory of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fastvlm_edge.backends import load_ort_cuda, ort_device, ort_session

GPU = "NVIDIA GeForce RTX 4060 8.9"
DRIVER = "580.95.05"


@contextlib.contextmanager
def host_as_gpu(gpu: str = GPU, driver: str = DRIVER) -> Iterator[None]:
    """Within this block `ort-cuda` can be loaded."""
    with (
        mock.patch.object(ort_session, "has_cuda", return_value=True),
        mock.patch.object(ort_session, "providers", return_value=["CPUExecutionProvider"]),
        mock.patch.object(ort_device, "DEVICE", "cpu"),
        mock.patch.object(load_ort_cuda, "describe_device", return_value=(gpu, driver)),
    ):
        yield
