"""CUDA without a GPU: what both bindings do beyond passing calls on, and what `open_cuda` says is missing.

Stubbed: `cuda.bindings.driver` and `pycuda.driver`. The real cuda-python only serves for its signatures, its types and its error without a
driver; test_libcuda.py runs it. The real PyCUDA and a GPU are never used.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
import threading
from enum import IntEnum
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import gpu_extra, install_advice
from fastvlm_edge.nvidia.cuda import SYNC, Cuda, CudaError, OutOfDeviceMemory
from fastvlm_edge.nvidia.drivers import open_cuda

# --- cuda-python --------------------------------------------------------------------------------------------------------------------------


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_DEVICE = 2


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUDA_MEMCPY2D:
    __slots__ = ("Height", "WidthInBytes", "dstDevice", "dstMemoryType", "dstPitch", "srcDevice", "srcMemoryType", "srcPitch")


class Handle:
    """Such as CUstream and CUdeviceptr: an object that turns into an integer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


ATTRIBUTES = {16: 8, 18: 1, 75: 8, 76: 7}
PINNED = ctypes.create_string_buffer(64)

FUNCTIONS: dict[str, tuple[int, Any]] = {
    # number of arguments, and the values returned beside the error
    "cuDriverGetVersion": (0, (13000,)),
    "cuInit": (1, ()),
    "cuDeviceGetCount": (0, (1,)),
    "cuDeviceGet": (1, (Handle(0),)),
    "cuDeviceGetName": (2, (b"Orin\0" + b" " * 251,)),
    "cuDeviceTotalMem": (1, (8 << 30,)),
    "cuDeviceGetAttribute": (2, lambda attribute, device: (ATTRIBUTES[attribute],)),
    "cuDevicePrimaryCtxSetFlags": (2, ()),
    "cuDevicePrimaryCtxRetain": (1, (Handle(0xC0),)),
    "cuDevicePrimaryCtxRelease": (1, ()),
    "cuCtxSetCurrent": (1, ()),
    "cuMemGetInfo": (0, (3 << 20, 8 << 30)),
    "cuMemAlloc": (1, (Handle(0xD000),)),
    "cuMemFree": (1, ()),
    "cuMemHostAlloc": (2, (ctypes.addressof(PINNED),)),
    "cuMemFreeHost": (1, ()),
    "cuStreamCreate": (1, (Handle(0x51),)),
    "cuStreamDestroy": (1, ()),
    "cuStreamSynchronize": (1, ()),
    "cuMemcpyAsync": (4, ()),
    "cuMemcpy2DAsync": (2, ()),
    "cuMemsetD8Async": (4, ()),
    "cuStreamBeginCapture": (2, ()),
    "cuStreamEndCapture": (1, (Handle(0x61),)),
    "cuGraphInstantiate": (2, (Handle(0x71),)),
    "cuGraphDestroy": (1, ()),
    "cuGraphLaunch": (2, ()),
    "cuGraphExecDestroy": (1, ()),
    "cuGetErrorString": (1, (b"as the driver says",)),
}
TYPES = (CUresult, CUdevice_attribute, CUmemorytype, CUstreamCaptureMode, CUDA_MEMCPY2D)


class StubDriver(ModuleType):
    """`cuda.bindings.driver`: records calls; `errors` maps a function to what it shall return, `values` to other values than its usual."""

    CUDA_VERSION = 13000

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, CUresult] = {}
        self.values: dict[str, tuple[Any, ...]] = {}
        for kind in TYPES:
            setattr(self, kind.__name__, kind)

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        arity, usual = FUNCTIONS[name]

        def function(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == arity, name
            if name != "cuGetErrorString":
                self.calls.append((name, *(int(each) if isinstance(each, Handle) else each for each in arguments)))
            error = self.errors.get(name, CUresult.CUDA_SUCCESS)
            values = self.values.get(name, usual(*arguments) if callable(usual) else usual)
            return (error, *(None if error and name != "cuStreamEndCapture" else each for each in values))

        return function

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    package = ModuleType("cuda.bindings")
    package.__version__ = "13.5.0"  # type: ignore[attr-defined]
    stub = StubDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", stub)
    hide(monkeypatch, "pycuda", "pycuda.driver")
    return stub


@pytest.fixture
def cuda(driver: StubDriver) -> Cuda:
    """Opened, with its context current and the calls so far forgotten."""
    opened = open_cuda()
    opened.free_bytes()
    driver.calls.clear()
    return opened


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_arguments_of_the_installed_package(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    signature = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__)
    assert signature
    arguments = signature[1]
    assert len(arguments.split(",")) * bool(arguments) == FUNCTIONS[name][0]


def test_the_stub_has_the_types_of_the_installed_package() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    for kind in TYPES[:-1]:
        for member in kind:
            assert getattr(getattr(real, kind.__name__), member.name).value == member.value
    assert set(CUDA_MEMCPY2D.__slots__) <= set(dir(real.CUDA_MEMCPY2D))
    rows = real.CUDA_MEMCPY2D()
    rows.srcDevice = 0xD000  # an integer does for a CUdeviceptr
    assert int(rows.srcDevice) == 0xD000
    assert real.CUDA_VERSION // 1000 in (12, 13)


def test_opening_retains_the_primary_context_and_describes_the_device(driver: StubDriver) -> None:
    cuda = open_cuda()
    assert (cuda.binding, cuda.supports_graphs) == ("cuda-python 13.5.0", True)
    assert (cuda.device.name, cuda.device.compute_capability, cuda.device.total_bytes) == ("Orin", (8, 7), 8 << 30)
    assert cuda.device.integrated is True and cuda.device.driver == "13.0" and cuda.device.multiprocessors == 8
    assert driver.calls[:2] == [("cuDriverGetVersion",), ("cuInit", 0)]
    assert driver.calls[-1] == ("cuDevicePrimaryCtxRetain", 0)


def test_a_cuda_python_from_before_cuda_bindings(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("cuda")
    package.__version__ = "12.6.0"  # type: ignore[attr-defined]
    hide(monkeypatch, "cuda.bindings", "cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.cuda", driver)
    assert open_cuda().binding == "cuda-python 12.6.0"


def test_everything_that_is_made_is_given_back_with_the_arguments_that_the_package_takes(cuda: Cuda, driver: StubDriver) -> None:
    stream, address, pinned = cuda.create_stream(), cuda.allocate(64), cuda.allocate_pinned(64)
    graph = cuda.capture(stream, lambda: cuda.zero(address, 64, stream))
    cuda.copy(address, pinned.address, 64, stream)
    cuda.launch(graph, stream)
    cuda.synchronize(stream)
    cuda.destroy_graph(graph)
    pinned.free()
    cuda.free(address)
    cuda.destroy_stream(stream)
    cuda.close()
    calls = [(name, *arguments) for name, *arguments in driver.calls]
    for made in (
        ("cuStreamDestroy", 0x51),
        ("cuMemFree", 0xD000),
        ("cuMemFreeHost", ctypes.addressof(PINNED)),
        ("cuGraphExecDestroy", 0x71),
    ):
        assert calls.count(made) == 1
    assert calls[-1] == ("cuDevicePrimaryCtxRelease", 0)


def test_an_error_has_the_call_its_name_and_the_drivers_words(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuMemcpyAsync"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaError, match=r"^cuMemcpyAsync failed: CUDA_ERROR_INVALID_VALUE \(as the driver says\)$") as caught:
        cuda.copy(0xD000, 0xD100, 64, 0x51)
    assert (caught.value.call, caught.value.name) == ("cuMemcpyAsync", "CUDA_ERROR_INVALID_VALUE")


def test_copy_2d_describes_rows_of_device_memory(cuda: Cuda, driver: StubDriver) -> None:
    cuda.copy_2d(0xD000, 128, 0xD800, 64, 32, 8, 0x51)
    ((name, rows, stream),) = driver.calls
    assert (name, stream) == ("cuMemcpy2DAsync", 0x51)
    assert {field: getattr(rows, field) for field in CUDA_MEMCPY2D.__slots__} == {
        "dstMemoryType": 2, "dstDevice": 0xD000, "dstPitch": 128, "srcMemoryType": 2, "srcDevice": 0xD800, "srcPitch": 64,
        "WidthInBytes": 32, "Height": 8,
    }  # fmt: skip


def test_pinned_memory_is_seen_through_arrays(cuda: Cuda, driver: StubDriver) -> None:
    pinned = cuda.allocate_pinned(64)
    pinned.view((4, 4), np.float32)[1, 2] = 1.0
    assert PINNED[24:28] == np.float32(1.0).tobytes()
    assert pinned.view(3, np.uint16).shape == (3,) and pinned.view((), np.int64).shape == ()
    with pytest.raises(ValueError, match="68 bytes does not fit into 64"):
        pinned.view(17, np.float32)
    pinned.free()
    assert driver.calls == [("cuMemHostAlloc", 64, 0), ("cuMemFreeHost", ctypes.addressof(PINNED))]


def test_out_of_device_memory_names_both_sizes_and_what_to_lower(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuMemAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfDeviceMemory, match=r"^5 MiB of GPU memory are needed and 3 MiB are free; choose a smaller context") as caught:
        cuda.allocate((4 << 20) + 1)
    assert (caught.value.needed, caught.value.free) == ((4 << 20) + 1, 3 << 20)


def test_out_of_pinned_memory_is_a_shortage_too(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuMemHostAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfDeviceMemory, match=r"^5 MiB of page-locked host memory are needed and fewer are free; choose"):
        cuda.allocate_pinned((4 << 20) + 1)
    driver.errors["cuMemHostAlloc"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match="cuMemHostAlloc failed"):
        cuda.allocate_pinned(64)


def test_an_error_that_ends_the_context_says_so(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match="start the program again") as caught:
        cuda.synchronize(0x51)
    assert (caught.value.call, caught.value.name) == ("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS")


def test_capture_records_and_instantiates_and_drops_the_template(cuda: Cuda, driver: StubDriver) -> None:
    assert cuda.capture(0x51, lambda: cuda.zero(0xD000, 8, 0x51)) == 0x71
    assert driver.calls == [
        ("cuStreamBeginCapture", 0x51, 1),
        ("cuMemsetD8Async", 0xD000, 0, 8, 0x51),
        ("cuStreamEndCapture", 0x51),
        ("cuGraphInstantiate", 0x61, 0),
        ("cuGraphDestroy", 0x61),
    ]


@pytest.mark.parametrize("ending", [CUresult.CUDA_SUCCESS, CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED])
def test_capture_ends_when_the_work_raises(cuda: Cuda, driver: StubDriver, ending: CUresult) -> None:
    driver.errors["cuStreamEndCapture"] = ending

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cuda.capture(0x51, fail)
    assert driver.names() == ["cuStreamBeginCapture", "cuStreamEndCapture", *([] if ending else ["cuGraphDestroy"])]


def test_capture_drops_the_template_that_cannot_be_instantiated(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuGraphInstantiate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(CudaError, match="cuGraphInstantiate failed"):
        cuda.capture(0x51, lambda: None)
    assert driver.names()[-1] == "cuGraphDestroy"


def test_capture_that_was_invalidated_is_an_error_of_its_own(cuda: Cuda, driver: StubDriver) -> None:
    driver.errors["cuStreamEndCapture"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    with pytest.raises(CudaError, match="cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        cuda.capture(0x51, lambda: None)
    assert driver.names() == ["cuStreamBeginCapture", "cuStreamEndCapture"]


def test_the_context_is_made_current_once_in_every_thread(driver: StubDriver) -> None:
    cuda = open_cuda()

    def work() -> None:
        cuda.free_bytes()
        cuda.free_bytes()

    thread = threading.Thread(target=work)
    for run in (work, thread.start, thread.join):
        run()
    assert driver.names()[-6:] == ["cuCtxSetCurrent", "cuMemGetInfo", "cuMemGetInfo"] * 2
    assert ("cuCtxSetCurrent", 0xC0) in driver.calls


def test_closing_twice_releases_once(cuda: Cuda, driver: StubDriver) -> None:
    cuda.close()
    cuda.close()
    assert driver.calls == [("cuDevicePrimaryCtxRelease", 0)]


# --- what open_cuda says is missing -------------------------------------------------------------------------------------------------------


def test_an_unknown_way_to_wait_is_refused_with_the_known_ones(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SYNC, "Spin")
    with pytest.raises(FastVLMError, match=r"^FASTVLM_EDGE_CUDA_SYNC is 'Spin'; set it to auto, spin, yield, block, or unset it$"):
        open_cuda()
    assert not driver.calls


def test_without_a_binding_it_has_the_command_that_installs_one(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.cuda")
    with pytest.raises(FastVLMError, match="cuda-python, which is not installed") as caught:
        open_cuda()
    assert caught.value.mend == install_advice(gpu_extra(), "cuda")


def test_a_broken_binding_is_named(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "cuda.bindings.driver":
                raise ImportError("GLIBC_2.34 not found")

    monkeypatch.delitem(sys.modules, "cuda.bindings.driver")
    monkeypatch.setattr(sys.modules["cuda.bindings"], "__path__", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(FastVLMError, match=r"GLIBC_2.34 not found\); run: pip install --force-reinstall cuda-bindings"):
        open_cuda()


def test_without_libcuda_it_asks_for_the_driver(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuDriverGetVersion", missing, raising=False)
    with pytest.raises(FastVLMError, match="no NVIDIA driver on this machine"):
        open_cuda()


def test_the_installed_package_without_a_driver_asks_for_it() -> None:
    pytest.importorskip("cuda.bindings.driver")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(FastVLMError, match="no NVIDIA driver on this machine"):
            open_cuda()
    else:
        pytest.skip("this machine has a driver")


@pytest.mark.parametrize("by", ["cuInit", "cuDeviceGetCount"])
def test_without_a_gpu_it_says_where_to_look(driver: StubDriver, by: str) -> None:
    if by == "cuInit":
        driver.errors[by] = CUresult.CUDA_ERROR_NO_DEVICE
    else:
        driver.values[by] = (0,)
    with pytest.raises(FastVLMError, match=r"sees no GPU; .*nvidia-smi"):
        open_cuda()


def test_any_other_error_of_init_is_named(driver: StubDriver) -> None:
    driver.errors["cuInit"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaError, match="cuInit failed"):
        open_cuda()


def test_a_driver_older_than_the_binding_is_named_with_both_ways_out(driver: StubDriver) -> None:
    driver.values["cuDriverGetVersion"] = (12060,)
    expected = (
        "the NVIDIA driver supports CUDA 12.6, but cuda-python 13.5.0 needs CUDA 13; update the driver to 580 or later "
        "(on a Jetson: install a newer JetPack), or install cuda-python for it: pip install 'cuda-bindings==12.*'"
    )
    with pytest.raises(FastVLMError, match=re.escape(expected)):
        open_cuda()
    assert driver.calls == [("cuDriverGetVersion",)]


@pytest.mark.parametrize("version", [13000, 13050, 14000])
def test_a_driver_of_the_same_major_version_or_later_does(driver: StubDriver, version: int) -> None:
    driver.CUDA_VERSION = 13020
    driver.values["cuDriverGetVersion"] = (version,)
    assert open_cuda().device.driver == f"{version // 1000}.{version % 1000 // 10}"


# --- PyCUDA -------------------------------------------------------------------------------------------------------------------------------


class StubPyCuda(ModuleType):
    """`pycuda.driver` of PyCUDA 2022.1 to 2026.1: records what reaches CUDA, each with the depth of the context stack at that moment."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    class RuntimeError(Error):
        pass

    class device_attribute:
        INTEGRATED: ClassVar[str] = "integrated"
        MULTIPROCESSOR_COUNT: ClassVar[str] = "multiprocessors"

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.depth = 0
        self.failing: dict[str, Exception] = {}
        self.devices = 1
        self.driver_version = 12060
        stub = self

        class Context:
            def push(self) -> None:
                stub.depth += 1

            @staticmethod
            def pop() -> None:
                stub.depth -= 1

            def detach(self) -> None:
                stub.cuda("cuDevicePrimaryCtxRelease")
                stub.depth -= 1

        class Device:
            def __init__(self, ordinal: int) -> None:
                assert ordinal == 0

            @staticmethod
            def count() -> int:
                return stub.devices

            def name(self) -> str:
                return "Orin"

            def compute_capability(self) -> tuple[int, int]:
                return (8, 7)

            def total_memory(self) -> int:
                return 8 << 30

            def get_attribute(self, attribute: str) -> int:
                return {"integrated": 1, "multiprocessors": 8}[attribute]

            def retain_primary_context(self) -> Context:
                return Context()

        class DeviceAllocation:
            def __int__(self) -> int:
                return 0xD000

            def free(self) -> None:
                stub.cuda("cuMemFree")

        class PagelockedHostAllocation:
            def __init__(self, nbytes: int) -> None:
                self.data = np.zeros(nbytes, np.uint8)
                self.__array_interface__ = self.data.__array_interface__

            def free(self) -> None:
                stub.cuda("cuMemFreeHost")

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                stub.cuda("cuStreamCreate", flags)
                self.handle = 0x51

            def synchronize(self) -> None:
                stub.cuda("cuStreamSynchronize", self.handle)

            def __del__(self) -> None:
                if hasattr(self, "handle"):  # else it was never made
                    stub.cuda("cuStreamDestroy", self.handle)

        class Memcpy2D:
            __slots__ = ("dst_pitch", "height", "places", "src_pitch", "width_in_bytes")
            dst_pitch: int
            src_pitch: int
            width_in_bytes: int
            height: int

            def set_dst_device(self, address: int) -> None:
                self.places = [address]

            def set_src_device(self, address: int) -> None:
                self.places.append(address)

            def __call__(self, stream: Stream) -> None:
                fields = (self.dst_pitch, self.src_pitch, self.width_in_bytes, self.height)
                stub.cuda("cuMemcpy2DAsync", *self.places, *fields, stream.handle)

        for kind in (Context, Device, Stream, Memcpy2D):
            setattr(self, kind.__name__, kind)
        self.DeviceAllocation, self.PagelockedHostAllocation = DeviceAllocation, PagelockedHostAllocation

    def cuda(self, name: str, *arguments: Any) -> None:
        if name in self.failing:
            raise self.failing[name]
        self.calls.append((name, *arguments, self.depth))

    def init(self, flags: int = 0) -> None:
        self.cuda("cuInit", flags)

    def get_version(self) -> tuple[int, int, int]:
        return (12, 6, 0)

    def get_driver_version(self) -> int:
        return self.driver_version

    def mem_get_info(self) -> tuple[int, int]:
        self.cuda("cuMemGetInfo")
        return (3 << 20, 8 << 30)

    def mem_alloc(self, bytes: int) -> Any:
        self.cuda("cuMemAlloc", bytes)
        return self.DeviceAllocation()

    def pagelocked_empty(self, shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        self.cuda("cuMemHostAlloc", shape)
        assert dtype == np.uint8
        return np.asarray(self.PagelockedHostAllocation(shape))  # whose base is the allocation

    def memcpy_htod_async(self, dest: int, src: Any, stream: Any = None) -> None:
        self.cuda("cuMemcpyHtoDAsync", dest, len(memoryview(src)), stream.handle)

    def memcpy_dtoh_async(self, dest: Any, src: int, stream: Any = None) -> None:
        memoryview(dest).cast("B")[:1] = b"\x07"  # as a copy would
        self.cuda("cuMemcpyDtoHAsync", len(memoryview(dest)), src, stream.handle)

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Any = None) -> None:
        self.cuda("cuMemcpyDtoDAsync", dest, src, size, stream.handle)

    def memset_d8_async(self, dest: int, data: int, size: int, stream: Any = None) -> None:
        self.cuda("cuMemsetD8Async", dest, data, size, stream.handle)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> StubPyCuda:
    package = ModuleType("pycuda")
    package.VERSION_TEXT = "2025.1"  # type: ignore[attr-defined]
    stub = StubPyCuda()
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", stub)
    hide(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.cuda")
    return stub


def test_pycuda_is_taken_where_cuda_python_is_missing(pycuda: StubPyCuda) -> None:
    cuda = open_cuda()
    assert (cuda.binding, cuda.supports_graphs) == ("PyCUDA 2025.1", False)
    assert (cuda.device.name, cuda.device.compute_capability, cuda.device.total_bytes) == ("Orin", (8, 7), 8 << 30)
    assert cuda.device.integrated is True and cuda.device.driver == "12.6" and cuda.device.multiprocessors == 8


def test_pycuda_has_the_context_pushed_in_every_call_and_popped_after_it(pycuda: StubPyCuda) -> None:
    cuda = open_cuda()
    pycuda.calls.clear()
    address, pinned, stream = cuda.allocate(64), cuda.allocate_pinned(32), cuda.create_stream()
    cuda.copy(address, pinned.address + 8, 16, stream)
    cuda.copy(pinned.address + 8, address, 16, stream)
    cuda.copy(address, address + 32, 32, stream)
    cuda.copy_2d(address, 32, address + 32, 16, 8, 2, stream)
    cuda.zero(address, 64, stream)
    cuda.synchronize(stream)
    assert pinned.view(32, np.uint8)[8] == 7
    assert cuda.free_bytes() == 3 << 20
    cuda.destroy_stream(stream)
    pinned.free()
    cuda.free(address)
    cuda.close()
    cuda.close()
    copies = [call[:-1] for call in pycuda.calls if call[0].startswith("cuMemcpy")]
    assert [name for name, *_ in copies] == ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuMemcpy2DAsync"]
    assert copies[-1] == ("cuMemcpy2DAsync", address, address + 32, 32, 16, 8, 2, stream)
    names = [call[0] for call in pycuda.calls]
    for released in ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"):
        assert names.count(released) == 1
    assert {call[-1] for call in pycuda.calls} == {1}
    assert pycuda.depth == 0


def test_an_error_of_pycuda_keeps_its_call_and_pops_the_context(pycuda: StubPyCuda) -> None:
    cuda = open_cuda()
    pycuda.failing["cuStreamCreate"] = StubPyCuda.LogicError("cuStreamCreate failed: invalid argument")
    with pytest.raises(CudaError, match=r"^cuStreamCreate failed: LogicError \(invalid argument\)$") as caught:
        cuda.create_stream()
    assert (caught.value.call, caught.value.name, caught.value.description) == ("cuStreamCreate", "LogicError", "invalid argument")
    assert pycuda.depth == 0
    pycuda.failing.clear()


def test_pycuda_out_of_memory(pycuda: StubPyCuda) -> None:
    cuda = open_cuda()
    pycuda.failing["cuMemAlloc"] = StubPyCuda.MemoryError("cuMemAlloc failed: out of memory")
    with pytest.raises(OutOfDeviceMemory, match="4 MiB of GPU memory are needed and 3 MiB are free"):
        cuda.allocate(4 << 20)


def test_pycuda_out_of_pinned_memory(pycuda: StubPyCuda) -> None:
    cuda = open_cuda()
    pycuda.failing["cuMemHostAlloc"] = StubPyCuda.MemoryError("cuMemHostAlloc failed: out of memory")
    with pytest.raises(OutOfDeviceMemory, match="4 MiB of page-locked host memory are needed and fewer are free"):
        cuda.allocate_pinned(4 << 20)


def test_pycuda_cannot_capture(pycuda: StubPyCuda) -> None:
    with pytest.raises(FastVLMError, match=r"PyCUDA 2025.1 has no CUDA graphs"):
        open_cuda().capture(0, lambda: None)


def test_pycuda_says_that_it_cannot_choose_how_to_wait(pycuda: StubPyCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SYNC, "spin")
    with pytest.raises(FastVLMError, match=r"FASTVLM_EDGE_CUDA_SYNC is set, but PyCUDA 2025\.1 cannot .*; unset FASTVLM_EDGE_CUDA_SYNC"):
        open_cuda()
    assert not pycuda.calls
    monkeypatch.setenv(SYNC, "auto")
    open_cuda().close()


def test_pycuda_without_a_gpu(pycuda: StubPyCuda) -> None:
    pycuda.devices = 0
    with pytest.raises(FastVLMError, match="sees no GPU"):
        open_cuda()
    pycuda.failing["cuInit"] = StubPyCuda.RuntimeError("cuInit failed: no CUDA-capable device is detected")
    with pytest.raises(FastVLMError, match="sees no GPU"):
        open_cuda()
    pycuda.failing["cuInit"] = StubPyCuda.LogicError("cuInit failed: system has unsupported display driver / cuda driver combination")
    with pytest.raises(CudaError, match="unsupported display driver"):
        open_cuda()


def test_pycuda_built_for_a_later_cuda(pycuda: StubPyCuda) -> None:
    pycuda.driver_version = 11040
    with pytest.raises(FastVLMError, match=r"CUDA 11.4, but PyCUDA 2025.1 needs CUDA 12; .* build PyCUDA for that CUDA version"):
        open_cuda()


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("libcuda.so.1: cannot open shared object file", "no NVIDIA driver"),
        ("numpy.core.multiarray failed to import", "PyCUDA cannot be loaded"),
    ],
)
def test_pycuda_that_cannot_be_loaded(pycuda: StubPyCuda, monkeypatch: pytest.MonkeyPatch, reason: str, told: str) -> None:
    real = importlib.import_module

    def load(name: str) -> ModuleType:
        if name == "pycuda.driver":
            raise ImportError(reason)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(FastVLMError, match=told):
        open_cuda()
