"""CUDA through cuda-python: the driver API, in the primary context that TensorRT uses too."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastvlm_edge.nvidia.cuda import CudaError, DeviceInfo, OutOfDeviceMemory, PinnedMemory, check_driver, no_device, no_driver, sync_flag

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


def load() -> tuple[Any, str]:
    """Import the driver API. Returns the module, and name and version of the package. Raises ImportError. Needs no driver."""
    try:
        package = importlib.import_module("cuda.bindings")
        driver = importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError:  # up to cuda-python 12.6.0
        package = importlib.import_module("cuda")
        driver = importlib.import_module("cuda.cuda")
    return driver, f"cuda-python {package.__version__}"


class CudaPython:
    """Implements `nvidia.cuda.Cuda` with cuda-python."""

    supports_graphs = True

    def __init__(self, driver: Any, binding: str) -> None:
        """Retain the primary context of device 0. Raises FastVLMError if there is no driver or no device."""
        sync = sync_flag()
        self.binding = binding
        self._driver = driver
        self._thread = threading.local()
        self._closed = False
        try:
            supported = self._check("cuDriverGetVersion")
        except RuntimeError as error:  # cuda-python raises this without libcuda
            raise no_driver() from error
        remedy = f"install cuda-python for it: pip install 'cuda-bindings=={supported // 1000}.*'"
        version = check_driver(supported, driver.CUDA_VERSION, binding, remedy)
        self._device = self._first_device()
        self.device = self._describe(version)
        if sync is not None:
            self._check("cuDevicePrimaryCtxSetFlags", self._device, sync)
        self._context = self._check("cuDevicePrimaryCtxRetain", self._device)

    def free_bytes(self) -> int:
        """Free device memory in bytes."""
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory and return its address."""
        try:
            return int(self._call("cuMemAlloc", nbytes))
        except CudaError as error:
            if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
        raise OutOfDeviceMemory(nbytes, self.free_bytes())

    def free(self, address: int) -> None:
        """Release device memory."""
        self._call("cuMemFree", address)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Allocate page-locked host memory."""
        try:
            address = int(self._call("cuMemHostAlloc", nbytes, 0))
        except CudaError as error:
            if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            raise OutOfDeviceMemory(nbytes, kind="page-locked host memory") from None
        return PinnedMemory(address, nbytes, lambda address: self._call("cuMemFreeHost", address))

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work of the stream."""
        self._call("cuStreamSynchronize", stream)

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two places in device or pinned memory."""
        self._call("cuMemcpyAsync", destination, source, nbytes, stream)

    def copy_2d(
        self, destination: int, destination_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Enqueue a copy of rows within device memory."""
        rows = self._driver.CUDA_MEMCPY2D()
        rows.srcMemoryType = rows.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        rows.dstDevice, rows.dstPitch = destination, destination_pitch
        rows.srcDevice, rows.srcPitch = source, source_pitch
        rows.WidthInBytes, rows.Height = width, height
        self._call("cuMemcpy2DAsync", rows, stream)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Enqueue the clearing of device memory."""
        self._call("cuMemsetD8Async", address, 0, nbytes, stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Capture what `work` enqueues on the stream. Returns the executable graph."""
        # Thread-local: other threads may allocate during the capture, this one may not.
        self._call("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            with suppress(CudaError):  # the capture may be invalid already; this call ends it anyway
                self._destroy_template(self._call("cuStreamEndCapture", stream))
            raise
        template = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", template, 0))
        finally:
            with suppress(CudaError):  # or the executable graph would be lost
                self._destroy_template(template)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue the captured work."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Release a graph."""
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Release the primary context. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._check("cuDevicePrimaryCtxRelease", self._device)

    def _first_device(self) -> Any:
        try:
            self._check("cuInit", 0)
        except CudaError as error:
            if error.name == "CUDA_ERROR_NO_DEVICE":
                raise no_device() from None
            raise
        if self._check("cuDeviceGetCount") == 0:
            raise no_device()
        return self._check("cuDeviceGet", 0)

    def _describe(self, version: str) -> DeviceInfo:
        def attribute(name: str) -> int:
            key = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._check("cuDeviceGetAttribute", key, self._device))

        return DeviceInfo(
            name=self._check("cuDeviceGetName", 256, self._device).partition(b"\0")[0].decode(),
            compute_capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
            total_bytes=int(self._check("cuDeviceTotalMem", self._device)),
            integrated=bool(attribute("INTEGRATED")),
            driver=version,
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        )

    def _destroy_template(self, template: Any) -> None:
        if int(template):  # 0 after a capture that failed
            self._call("cuGraphDestroy", template)

    def _call(self, name: str, *arguments: Any) -> Any:
        # A thread has no current context until one is set. Once is enough, because TensorRT and the CUDA runtime use the same context.
        if not hasattr(self._thread, "entered"):
            self._check("cuCtxSetCurrent", self._context)
            self._thread.entered = True
        return self._check(name, *arguments)

    def _check(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if int(error):
            _, description = self._driver.cuGetErrorString(error)
            raise CudaError(name, error.name, (description or b"no description").decode())
        return values[0] if len(values) == 1 else tuple(values)
