"""CUDA as the TensorRT backend uses it: addresses and handles are plain integers, and every error is a FastVLMError.

`drivers.open_cuda` picks the installed binding: cuda-python (`cuda_python.py`) or, without it, PyCUDA (`pycuda_driver.py`). No other file
calls CUDA, and no CUDA package is imported before `open_cuda` is called.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastvlm_edge.errors import FastVLMError

_MIB = 1 << 20

_NO_MEMORY = "close other programs that use the GPU, or choose a smaller context"
_LOST = "start the program again, because the state of the GPU is lost, and report this if it happens again"

_MENDS = {
    "CUDA_ERROR_OUT_OF_MEMORY": _NO_MEMORY,
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot, because the driver's kernel module and its libcuda have different versions",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "remove the cuda-compat libraries from LD_LIBRARY_PATH, which do not work with this GPU",
    "CUDA_ERROR_STUB_LIBRARY": "remove the `stubs` folder of the CUDA toolkit from LD_LIBRARY_PATH, because it hides the driver's libcuda",
    "CUDA_ERROR_UNKNOWN": "check whether nvidia-smi works (on a Jetson: tegrastats), and reboot if it does not",
    # PyCUDA has classes of errors instead of CUDA's names.
    "MemoryError": _NO_MEMORY,
    "LaunchError": _LOST,
}

SYNC = "FASTVLM_EDGE_CUDA_SYNC"
"""Environment variable: how a thread waits for the GPU, see `sync_flag`."""
_SYNC_FLAGS = {"auto": None, "spin": 1, "yield": 2, "block": 4}
"""CU_CTX_SCHED_SPIN, CU_CTX_SCHED_YIELD and CU_CTX_SCHED_BLOCKING_SYNC (CUDA driver API, CUctx_flags)."""

_FIRST_DRIVER = {12: 525, 13: 580}
"""First NVIDIA driver for each CUDA major version (CUDA toolkit release notes, table of driver versions)."""


class CudaError(FastVLMError):
    """A CUDA call failed. Says which call, the error's name, the driver's description and, where it is known, what to do."""

    def __init__(self, call: str, name: str, description: str) -> None:
        """`call` as in the driver API ("cuMemcpyAsync"), `name` as in its headers, or PyCUDA's error class."""
        super().__init__(f"{call} failed: {name} ({description})", _MENDS.get(name))
        self.call, self.name, self.description = call, name, description


class OutOfDeviceMemory(FastVLMError):
    """There is less free memory than was requested: of the GPU, or of the host's memory that the GPU reads."""

    def __init__(self, needed: int | None = None, free: int | None = None, *, kind: str = "GPU memory") -> None:
        """`needed` and `free` in bytes, None if unknown."""
        what = f"more {kind} is needed than is free"
        if needed is not None:
            there = "fewer" if free is None else f"{free // _MIB:,} MiB"
            what = f"{-(-needed // _MIB):,} MiB of {kind} are needed and {there} are free"
        super().__init__(what, "choose a smaller context or image size, a lower precision, or close other programs")
        self.needed, self.free = needed, free


@dataclass(frozen=True)
class DeviceInfo:
    """The GPU and its driver."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    integrated: bool
    """Whether it shares its memory with the host, as on Jetson."""
    driver: str
    """Newest CUDA version that the driver supports, such as "13.0"."""
    multiprocessors: int = 0
    """Number of streaming multiprocessors; 0 if unknown. Jetson Orin boards differ in it, but not in their name."""


class PinnedMemory:
    """Page-locked host memory: a copy from or to it does not block the caller."""

    def __init__(self, address: int, nbytes: int, release: Callable[[int], None]) -> None:
        """`release` takes the address and frees the memory."""
        self.address, self.nbytes = address, nbytes
        self._release = release

    def view(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array over the first bytes. Do not read it before the stream that writes it is synchronized, nor use it after `free`."""
        count = math.prod(shape) if isinstance(shape, tuple) else shape
        needed = count * np.dtype(dtype).itemsize
        if needed > self.nbytes:
            raise ValueError(f"an array of {needed} bytes does not fit into {self.nbytes} pinned bytes")
        return np.ctypeslib.as_array(host_bytes(self.address, needed)).view(dtype).reshape(shape)

    def free(self) -> None:
        """Release the memory. No copy from or to it may be in progress."""
        self._release(self.address)


class Cuda(Protocol):
    """Device 0. Every method may be called from any thread, and raises CudaError if CUDA reports an error.

    Streams are handles of the driver API, as TensorRT's `execute_async_v3` takes them. Graphs are only valid with this object.
    """

    binding: str
    """Python package and version, such as "cuda-python 13.5.0" or "PyCUDA 2025.1"."""
    device: DeviceInfo
    supports_graphs: bool

    def free_bytes(self) -> int:
        """Free device memory in bytes."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory. The address is a multiple of 256; the memory is not cleared. Raises OutOfDeviceMemory."""
        ...

    def free(self, address: int) -> None:
        """Release device memory. No work that uses it may be in progress."""
        ...

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Allocate page-locked host memory. Raises OutOfDeviceMemory."""
        ...

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait for all work of the stream. An error in that work is raised here."""
        ...

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two places in device or pinned memory."""
        ...

    def copy_2d(
        self, destination: int, destination_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Enqueue a copy of `height` rows of `width` bytes within device memory. A pitch is the distance between rows in bytes."""
        ...

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Enqueue the clearing of device memory."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Call `work` and capture what it enqueues on the stream instead of running it. Returns the executable graph.

        An error in `work` ends the capture and is raised again. `work` must not allocate, free or synchronize.
        """
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue the captured work. It uses the addresses of the capture, which must still be allocated."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Release a graph."""
        ...

    def close(self) -> None:
        """Release the device. Everything that was allocated or created must have been released before."""
        ...


def host_bytes(address: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    """Host memory as a writable buffer, without copying it."""
    return (ctypes.c_uint8 * nbytes).from_address(address)


def no_driver() -> FastVLMError:
    """The error for a machine whose driver library cannot be loaded."""
    return FastVLMError(
        "there is no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded)",
        "install it, or start the container with `--gpus all` (on a Jetson: `--runtime nvidia`)",
    )


def no_device() -> FastVLMError:
    """The error for a driver without a GPU."""
    return FastVLMError(
        "the NVIDIA driver sees no GPU",
        "check what `nvidia-smi` lists, whether CUDA_VISIBLE_DEVICES hides the GPU, and whether the container was started with "
        "`--gpus all` (on a Jetson: `--runtime nvidia`)",
    )


def sync_flag() -> int | None:
    """The flag of the CUDA context that `$FASTVLM_EDGE_CUDA_SYNC` asks for, or None to leave the choice to CUDA.

    `spin` waits on a busy CPU core, `yield` lets other threads have it, `block` sleeps until an interrupt. CUDA itself spins, but on a
    Jetson it may block, depending on the power profile (CUDA driver API, cuDevicePrimaryCtxSetFlags). Raises FastVLMError.
    """
    value = os.environ.get(SYNC) or "auto"
    if value not in _SYNC_FLAGS:
        raise FastVLMError(f"{SYNC} is {value!r}", f"set it to {', '.join(_SYNC_FLAGS)}, or unset it")
    return _SYNC_FLAGS[value]


def check_driver(supported: int, built_for: int, binding: str, remedy: str) -> str:
    """Return the CUDA version that the driver supports, as text. Raises FastVLMError if the binding needs a later major version.

    Both versions are CUDA's 1000 * major + 10 * minor. Any driver of the same major version works (CUDA minor version compatibility).
    """
    major = built_for // 1000
    version = f"{supported // 1000}.{supported % 1000 // 10}"
    if supported // 1000 < major:
        driver = f" to {_FIRST_DRIVER[major]} or later" if major in _FIRST_DRIVER else ""
        raise FastVLMError(
            f"the NVIDIA driver supports CUDA {version}, but {binding} needs CUDA {major}",
            f"update the driver{driver} (on a Jetson: install a newer JetPack), or {remedy}",
        )
    return version
