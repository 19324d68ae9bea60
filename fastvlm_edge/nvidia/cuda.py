"""CUDA as the TensorRT backend sees it: addresses and handles are plain integers, every error is a sentence.

`open_cuda` picks what is installed: cuda-python (`cuda_python.py`) or, without it, PyCUDA (`pycuda_driver.py`). No other file makes a CUDA
call, and nothing of CUDA is imported before `open_cuda` is called.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastvlm_edge.errors import FastVLMError

_MIB = 1 << 20

_NO_MEMORY = "close other programs that use the GPU, or choose a smaller context"
_LOST = "the GPU's state is lost: start the program again, and report this if it comes back"
_NO_CAPTURE = "this work cannot be recorded into a CUDA graph"

_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": _NO_MEMORY,
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": _NO_CAPTURE,
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": _NO_CAPTURE,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's kernel module and its libcuda are of different versions: reboot",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "take the cuda-compat libraries out of LD_LIBRARY_PATH: this GPU needs the driver's own",
    "CUDA_ERROR_STUB_LIBRARY": "take the CUDA toolkit's `stubs` folder out of LD_LIBRARY_PATH: it hides the driver's own libcuda",
    "CUDA_ERROR_UNKNOWN": "see whether nvidia-smi works (Jetson: tegrastats); if not, reboot",
    # PyCUDA keeps the error's class and drops its name.
    "MemoryError": _NO_MEMORY,
    "LaunchError": _LOST,
}

_FIRST_DRIVER = {12: 525, 13: 580}
"""NVIDIA driver that brought each CUDA major version (CUDA toolkit release notes, table of driver versions)."""


class CudaError(FastVLMError):
    """A CUDA call failed: which, the error's name, the driver's own description, and what to do where that is known."""

    def __init__(self, call: str, name: str, description: str) -> None:
        """`call` as in the driver API ("cuMemcpyAsync"); `name` as in its headers, or PyCUDA's class of error."""
        hint = f"; {_HINTS[name]}" if name in _HINTS else ""
        super().__init__(f"{call} failed: {name} ({description}){hint}")
        self.call, self.name, self.description = call, name, description


class OutOfDeviceMemory(FastVLMError):
    """The GPU has less free memory than was asked for."""

    def __init__(self, needed: int, free: int) -> None:
        """Both in bytes."""
        super().__init__(
            f"{-(-needed // _MIB):,} MiB of GPU memory are needed and {free // _MIB:,} MiB are free; "
            "choose a smaller context or image size, a lower precision, or close other programs"
        )
        self.needed, self.free = needed, free


@dataclass(frozen=True)
class DeviceInfo:
    """The GPU and its driver."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    integrated: bool
    """Shares its memory with the host, as on Jetson."""
    driver: str
    """Newest CUDA version that the driver supports: "13.0"."""


class PinnedMemory:
    """Host memory that the GPU reaches without a detour: a copy from or to it does not hold up the caller."""

    def __init__(self, address: int, nbytes: int, release: Callable[[int], None]) -> None:
        """`release` takes the address and gives the memory back."""
        self.address, self.nbytes = address, nbytes
        self._release = release

    def view(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Array over the first bytes; not to be read before the stream that writes it is synchronized, nor used after `free`."""
        count = math.prod(shape) if isinstance(shape, tuple) else shape
        needed = count * np.dtype(dtype).itemsize
        if needed > self.nbytes:
            raise ValueError(f"an array of {needed} bytes does not fit into {self.nbytes} pinned bytes")
        return np.ctypeslib.as_array(host_bytes(self.address, needed)).view(dtype).reshape(shape)

    def free(self) -> None:
        """Give the memory back; no copy from or to it may be under way."""
        self._release(self.address)


class Cuda(Protocol):
    """Device 0. Every call may come from any thread and raises CudaError where CUDA refuses it.

    Streams are those of the driver API, as TensorRT's `execute_async_v3` takes them. Events and graphs are known to this object alone.
    """

    binding: str
    """Python package and version: "cuda-python 13.5.0", "PyCUDA 2025.1"."""
    device: DeviceInfo
    supports_graphs: bool

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory, aligned to 256 bytes, not cleared. Raises OutOfDeviceMemory."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back; no work that uses it may be under way."""
        ...

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """New page-locked host memory."""
        ...

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait for all work of the stream; an error of that work is raised here."""
        ...

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any of device and pinned memory."""
        ...

    def copy_2d(
        self, destination: int, destination_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Copy `height` rows of `width` bytes within device memory; a pitch is the bytes from one row to the next."""
        ...

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Clear device memory."""
        ...

    def create_event(self) -> int:
        """An event that takes the time."""
        ...

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Let the event take the time when the stream gets here."""
        ...

    def elapsed_ms(self, begin: int, end: int) -> float:
        """Milliseconds between two recorded events whose stream is synchronized."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Call `work`, recording what it enqueues on the stream instead of running it; returns the executable graph.

        An error in `work` ends the capture and is raised again. `work` must neither allocate, free nor synchronize.
        """
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue the recorded work. The addresses are those of the capture and must still be allocated."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        ...

    def close(self) -> None:
        """Leave the device. Everything allocated or created must have been given back before."""
        ...


def host_bytes(address: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    """Host memory as a writable buffer, without a copy."""
    return (ctypes.c_uint8 * nbytes).from_address(address)


def no_driver() -> FastVLMError:
    """The error for a machine whose driver library cannot be loaded."""
    return FastVLMError(
        "no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded): install it, or start the container with `--gpus all` "
        "(Jetson: `--runtime nvidia`)"
    )


def no_device() -> FastVLMError:
    """The error for a driver without a GPU."""
    return FastVLMError(
        "the NVIDIA driver sees no GPU: see what `nvidia-smi` lists, whether CUDA_VISIBLE_DEVICES hides it, and whether the container was "
        "started with `--gpus all` (Jetson: `--runtime nvidia`)"
    )


def check_driver(supported: int, built_for: int, binding: str, remedy: str) -> str:
    """The CUDA version that the driver supports, as text. Raises FastVLMError where the binding needs a later major version.

    Both versions are CUDA's 1000 * major + 10 * minor. Within a major version any driver does (CUDA's minor version compatibility).
    """
    major = built_for // 1000
    version = f"{supported // 1000}.{supported % 1000 // 10}"
    if supported // 1000 < major:
        driver = f" to {_FIRST_DRIVER[major]} or later" if major in _FIRST_DRIVER else ""
        raise FastVLMError(
            f"the NVIDIA driver supports CUDA {version}, but {binding} needs CUDA {major}; update the driver{driver} (Jetson: a newer "
            f"JetPack), or {remedy}"
        )
    return version
