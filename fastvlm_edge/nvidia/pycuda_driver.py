"""CUDA through PyCUDA, for systems that have it but not cuda-python. No release of it has CUDA graphs (up to 2026.1; pull request 343).

PyCUDA releases a resource when its Python object is garbage, so this module keeps those objects by their handles. PyCUDA also aborts the
process when a thread ends with a context on PyCUDA's own stack, so every call pushes the context and pops it again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.extras import gpu_extra, install_advice
from fastvlm_edge.nvidia.cuda import (
    SYNC,
    CudaError,
    DeviceInfo,
    OutOfDeviceMemory,
    PinnedMemory,
    check_driver,
    host_bytes,
    no_device,
    no_driver,
    sync_flag,
)

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING; PyCUDA has no name for it


def load() -> tuple[Any, str]:
    """Import PyCUDA. Returns its driver module, and name and version of the package.

    Raises ModuleNotFoundError if it is not installed, and FastVLMError if it cannot be loaded.
    """
    try:
        package = importlib.import_module("pycuda")
        driver = importlib.import_module("pycuda.driver")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a package that is broken may raise anything
        if "libcuda" in str(error):
            raise no_driver() from error
        raise FastVLMError(f"PyCUDA cannot be loaded ({one_line(error)})", install_advice(gpu_extra())) from error
    return driver, f"PyCUDA {package.VERSION_TEXT}"


class PyCuda:
    """Implements `nvidia.cuda.Cuda` with PyCUDA."""

    supports_graphs = False

    def __init__(self, driver: Any, binding: str) -> None:
        """Retain the primary context of device 0. Raises FastVLMError if there is no device or the driver is too old."""
        if sync_flag() is not None:
            what = f"{SYNC} is set, but {binding} cannot choose how to wait for the GPU; cuda-python can"
            raise FastVLMError(what, f"unset {SYNC}, or {install_advice(gpu_extra())}")
        self.binding = binding
        self._driver = driver
        self._closed = False
        self._memory: dict[int, Any] = {}  # DeviceAllocation
        self._pinned: dict[int, Any] = {}  # ndarray that owns a PagelockedHostAllocation
        self._streams: dict[int, Any] = {}
        with self._errors():
            major, minor, _ = driver.get_version()
            version = check_driver(driver.get_driver_version(), 1000 * major + 10 * minor, binding, "build PyCUDA for that CUDA version")
            device = self._first_device()
            self.device = DeviceInfo(
                name=device.name(),
                compute_capability=tuple(device.compute_capability()),
                total_bytes=int(device.total_memory()),
                integrated=bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
                driver=version,
                multiprocessors=int(device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)),
            )
            self._context = device.retain_primary_context()

    def free_bytes(self) -> int:
        """Free device memory in bytes."""
        with self._entered():
            return int(self._driver.mem_get_info()[0])

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory and return its address."""
        try:
            with self._entered():
                memory = self._driver.mem_alloc(nbytes)
        except CudaError as error:
            if error.name != "MemoryError":
                raise
            raise OutOfDeviceMemory(nbytes, self.free_bytes()) from None
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """Release device memory."""
        with self._entered():
            self._memory.pop(address).free()

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Allocate page-locked host memory."""
        try:
            with self._entered():
                array = self._driver.pagelocked_empty(nbytes, np.uint8)
        except CudaError as error:
            if error.name != "MemoryError":
                raise
            raise OutOfDeviceMemory(nbytes, kind="page-locked host memory") from None
        address = int(array.ctypes.data)
        self._pinned[address] = array
        return PinnedMemory(address, nbytes, self._free_pinned)

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        with self._entered():
            stream = self._driver.Stream(_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        with self._entered():
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """Wait for all work of the stream."""
        with self._entered():
            self._streams[stream].synchronize()

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two places in device or pinned memory."""
        # PyCUDA lacks cuMemcpyAsync, which finds the direction by itself. With unified addressing, a pinned address is also a device
        # address, so the first case works between two pinned addresses too.
        with self._entered():
            if self._is_pinned(source):
                self._driver.memcpy_htod_async(destination, host_bytes(source, nbytes), self._streams[stream])
            elif self._is_pinned(destination):
                self._driver.memcpy_dtoh_async(host_bytes(destination, nbytes), source, self._streams[stream])
            else:
                self._driver.memcpy_dtod_async(destination, source, nbytes, self._streams[stream])

    def copy_2d(
        self, destination: int, destination_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Enqueue a copy of rows within device memory."""
        rows = self._driver.Memcpy2D()
        rows.set_dst_device(destination)
        rows.set_src_device(source)
        rows.dst_pitch, rows.src_pitch = destination_pitch, source_pitch
        rows.width_in_bytes, rows.height = width, height
        with self._entered():
            rows(self._streams[stream])

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Enqueue the clearing of device memory."""
        with self._entered():
            self._driver.memset_d8_async(address, 0, nbytes, self._streams[stream])

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Raise FastVLMError, because PyCUDA cannot capture."""
        raise FastVLMError(f"{self.binding} has no CUDA graphs, cuda-python has", install_advice(gpu_extra()))

    def launch(self, graph: int, stream: int) -> None:
        """Never called, because `capture` makes no graph."""
        raise NotImplementedError

    def destroy_graph(self, graph: int) -> None:
        """Never called, because `capture` makes no graph."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the primary context. A second call does nothing."""
        if not self._closed:
            self._closed = True
            with self._errors():
                self._context.push()  # detach() releases nothing on a thread that neither retained the context nor has it current
                self._context.detach()

    def _first_device(self) -> Any:
        try:
            self._driver.init()
        except self._driver.Error as error:
            if "no CUDA-capable device" in str(error):
                raise no_device() from None
            raise
        if self._driver.Device.count() == 0:
            raise no_device()
        return self._driver.Device(0)

    def _free_pinned(self, address: int) -> None:
        with self._entered():
            self._pinned.pop(address).base.free()

    def _is_pinned(self, address: int) -> bool:
        return any(first <= address < first + array.nbytes for first, array in self._pinned.items())

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Make the context current for this block, on any thread."""
        with self._errors():
            self._context.push()
            try:
                yield
            finally:
                self._driver.Context.pop()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn PyCUDA's errors, such as MemoryError("cuMemAlloc failed: out of memory"), into CudaError."""
        try:
            yield
        except self._driver.Error as error:
            call, _, description = str(error).partition(" failed: ")
            raise CudaError(call, type(error).__name__, description) from None
