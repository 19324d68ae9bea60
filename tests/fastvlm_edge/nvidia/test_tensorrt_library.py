"""Both TensorRT libraries without a GPU: which calls each generation of the API gets, and what becomes of its refusals.

Stubbed: `tensorrt` 10.3, 10.16 and 11, written from NVIDIA's documentation and never compared with the real ones, and `tensorrt_rtx`, which
is compared with the installed one. The tests at the end build with the real tensorrt_rtx. No engine runs in this file.
"""

from __future__ import annotations

import _thread
import importlib
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory
from fastvlm_edge.nvidia.tensorrt_library import DTYPES, BuildSettings, GraphRefusedError, Library, _make_monitor, find_library

# --- What each generation has -------------------------------------------------------------------------------------------------------------

VERSIONS = {"10.3": "10.3.0", "10.16": "10.16.1.11", "11": "11.1.0.106", "rtx": "1.7.1.116"}
EVERY, PROPER = tuple(VERSIONS), ("10.3", "10.16", "11")
FLAGS = {"STRONGLY_TYPED": 1}  # not 0, which is what EXPLICIT_BATCH was
MAGIC = b"ftrt"


class Strict:
    """Like a class of pybind11, an instance has no attribute but its own."""

    settable: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.settable and not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name} to set")
        object.__setattr__(self, name, value)


def enum(name: str, *members: str, first: int = 0) -> Any:
    return IntEnum(name, members, start=first)


def stub_of(generation: str) -> Any:
    """`tensorrt` or `tensorrt_rtx`: does nothing, writes down `calls`, and fails in the calls named in `fails` as the real one does."""
    rtx, weak = generation == "rtx", generation in ("10.3", "10.16")
    trt: Any = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    trt.__version__ = VERSIONS[generation]
    trt.calls, trt.fails, trt.words = [], set(), []  # `words` are what a call that fails logs
    trt.layers, trt.parser_errors, trt.listing = [], [], ""
    trt.runs = []  # profile, address of the scratch memory and stream of each run
    trt.profiles, trt.scratch = 2, [4096, 8192]  # bytes of scratch memory of each profile
    trt.on_host, trt.shape_tensors, trt.fixed = set(), set(), {}
    trt.network_inputs = [SimpleNamespace(name="x", shape=(-1, 8))]
    trt.steps = [("Building", None, 2), ("Tactics", "Building", 3)]

    trt.DataType = enum("DataType", "FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL")
    trt.TensorLocation = enum("TensorLocation", "DEVICE", "HOST")
    trt.TensorIOMode = enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    trt.LayerType = enum("LayerType", "MATRIX_MULTIPLY", "SOFTMAX", "CONSTANT", "SHAPE", "ASSERTION", "TOPK")
    trt.MemoryPoolType = enum("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM")
    trt.ProfilingVerbosity = enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE")
    trt.LayerInformationFormat = enum("LayerInformationFormat", "ONELINE", "JSON")
    trt.ExecutionContextAllocationStrategy = enum("ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED")
    trt.NetworkDefinitionCreationFlag = enum("NetworkDefinitionCreationFlag", *FLAGS, first=FLAGS["STRONGLY_TYPED"])
    trt.BuilderFlag = enum(
        "BuilderFlag", "TF32", *(["FP16", "OBEY_PRECISION_CONSTRAINTS"] if weak else []), *(["REQUIRE_USER_ALLOCATION"] if rtx else [])
    )
    if rtx:
        trt.CudaGraphStrategy = enum("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE")
        trt.DynamicShapesKernelSpecializationStrategy = enum("DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE")
        trt.ComputeCapability = enum("ComputeCapability", "NONE", "CURRENT", "SM75", "SM86", "SM89", "SM120")
    trt.tensors = {
        "input_ids": (trt.DataType.INT64, "INPUT"),
        "image_features": (trt.DataType.HALF, "INPUT"),
        "mask": (trt.DataType.BOOL, "INPUT"),
        "logits": (trt.DataType.FLOAT, "OUTPUT"),
        "top_ids": (trt.DataType.INT64, "OUTPUT"),
        "kv_new": (trt.DataType.BF16, "OUTPUT"),
    }

    class ILogger:
        Severity = enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

        def __init__(self) -> None:
            self._initialised = True

    def say(severity: str, message: str) -> None:
        for logger in trt.loggers:
            logger.log(ILogger.Severity[severity], message)

    def fail(call: str) -> bool:
        trt.calls.append(call)
        if call in trt.fails:
            for word in trt.words:
                say("ERROR", word.format(call=call))
        return call in trt.fails

    def register(logger: Any, call: str) -> None:
        assert logger._initialised, "ILogger.__init__ was not called"
        trt.loggers = trt.loggers or [logger]  # the first stays
        if fail(call):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class IProgressMonitor:
        pass

    class IHostMemory(bytes):
        pass

    class IOptimizationProfile(Strict):
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if fail("set_shape"):
                raise RuntimeError("Shape provided for min is inconsistent with other shapes.")
            trt.calls.append((input, min, opt, max))

    class ITimingCache(Strict):
        def __init__(self, known: bytes) -> None:
            self._known = known

        def serialize(self) -> IHostMemory | None:
            return None if fail("ITimingCache.serialize") else IHostMemory(self._known + b"+new")

    class IBuilderConfig(Strict):
        settable = ("progress_monitor", "profiling_verbosity", "max_aux_streams", *(["num_compute_capabilities"] if rtx else []))
        num_compute_capabilities: int

        def __init__(self) -> None:
            self._capabilities: dict[int, Any] = {}

        def set_flag(self, flag: Any) -> None:
            assert isinstance(flag, trt.BuilderFlag)
            trt.calls.append(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            trt.calls.append((pool.name, pool_size))

        def add_optimization_profile(self, profile: Any) -> int:
            return -1 if fail("add_optimization_profile") else 0

        if rtx:

            def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
                assert 0 <= index < self.num_compute_capabilities
                trt.calls.append((compute_capability.name, index))
                return not fail("set_compute_capability")
        else:

            def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
                return None if serialized_timing_cache and fail("create_timing_cache") else ITimingCache(bytes(serialized_timing_cache))

            def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
                assert not ignore_mismatch
                return not (cache._known and fail("set_timing_cache"))

    class Builder(Strict):
        def __init__(self, logger: Any) -> None:
            register(logger, "Builder")

        def create_network(self, flags: int = 0) -> Any:
            trt.calls.append(("create_network", flags))
            inputs = {"num_inputs": len(trt.network_inputs), "get_input": lambda index: trt.network_inputs[index]}
            return SimpleNamespace(num_layers=len(trt.layers), get_layer=lambda index: trt.layers[index], **inputs)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None:
            assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED and config.max_aux_streams == 0
            monitor = config.progress_monitor
            for name, parent, count in trt.steps:
                monitor.phase_start(name, parent, count)
            going = all(monitor.step_complete(name, step) for name, _, count in reversed(trt.steps) for step in range(count))
            for name, _, _ in reversed(trt.steps):
                monitor.phase_finish(name)
            if not going:
                say("ERROR", "Build canceled by user")
            if fail("build_serialized_network") or not going:
                return None
            for size in trt.scratch:
                say("INFO", f"Total Activation Memory: {size} bytes")
            say("VERBOSE", f"Layers:\n{trt.listing}")
            return IHostMemory(MAGIC + b" plan")

    class OnnxParser(Strict):
        num_errors = property(lambda self: len(trt.parser_errors))

        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse_from_file(self, model: str) -> bool:
            assert isinstance(model, str)
            return not fail("parse_from_file")

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(**{part: lambda words=words: words for part, words in trt.parser_errors[index].items()})

    class IRuntimeConfig(Strict):
        def __init__(self) -> None:
            self._seen: dict[str, Any] = {}

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._seen["strategy"] = strategy

        if rtx:
            settable = ("dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy")

            def create_runtime_cache(self) -> Any:
                return IRuntimeCache()

            def set_runtime_cache(self, cache: Any = None) -> bool:
                self._seen["cache"] = cache
                return True

    class IRuntimeCache(Strict):
        def __init__(self) -> None:
            self._kernels = b""

        def deserialize(self, blob: bytes) -> bool:
            self._kernels = blob
            return True

        def serialize(self) -> IHostMemory | None:
            return None if fail("IRuntimeCache.serialize") else IHostMemory(self._kernels + b"+jit")

    class IExecutionContext(Strict):
        def __init__(self, how: Any) -> None:
            if isinstance(how, IRuntimeConfig):
                chosen = {"when": "dynamic_shapes_kernel_specialization_strategy", "graphs": "cuda_graph_strategy"}
                how = {**how._seen, **{key: getattr(how, name, None) for key, name in chosen.items()}}
            trt.calls.append(("create_execution_context", how))

            self._scratch: int | None = None
            self._profile = 0
            self._shapes: dict[str, Any] = {}
            self._addresses: dict[str, int] = {}

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory % 256 == 0 and size >= max(trt.scratch)
            self._scratch = memory
            trt.calls.append(("set_device_memory", memory, size))

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert profile_index < trt.profiles, "10.3 raises this without the GIL"
            if fail("set_optimization_profile_async"):
                raise RuntimeError("Error in set optimization profile async.")
            self._profile = profile_index
            self._shapes.clear()  # "will invalidate all dynamic bindings"
            trt.calls.append(("set_optimization_profile_async", profile_index, stream_handle))
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            known = trt.tensors.get(name, (None, ""))[1] == "INPUT"
            least, _, most = ICudaEngine().get_tensor_profile_shape(name, self._profile)
            fits = known and len(shape) == 2 and all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
            if fail("set_input_shape") or not fits:
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory % 256 == 0, f"{name} at {memory:#x} is not aligned"
            if fail("set_tensor_address") or name not in trt.tensors:
                return False
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert self._scratch is not None, "set_device_memory was not called"
            assert {*self._shapes} == {name for name, (_, mode) in trt.tensors.items() if mode == "INPUT"}, "an input has no shape"
            assert {*self._addresses} == {*trt.tensors}, "a tensor has no address"
            trt.runs.append((self._profile, self._scratch, stream_handle))
            return not fail("execute_async_v3")

    class ICudaEngine(Strict):
        num_io_tensors = property(lambda self: len(trt.tensors))
        num_optimization_profiles = property(lambda self: trt.profiles)
        device_memory_size_v2 = property(lambda self: max(trt.scratch))

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return int(trt.scratch[profile_index])

        def get_tensor_name(self, index: int) -> str:
            return list(trt.tensors)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.tensors[name][0]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode[trt.tensors[name][1]]

        def get_tensor_location(self, name: str) -> Any:
            return trt.TensorLocation.HOST if name in trt.on_host else trt.TensorLocation.DEVICE

        def is_shape_inference_io(self, name: str) -> bool:
            return name in trt.shape_tensors

        def get_tensor_shape(self, name: str) -> list[int]:
            return trt.fixed.get(name, [1, -1])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
            return [[1, 1], [1, 2 + profile_index], [1, 48 + profile_index]]

        def create_execution_context(self, strategy: Any) -> Any:
            return None if fail("create_execution_context") else IExecutionContext(strategy)

        def create_engine_inspector(self) -> Any:
            return SimpleNamespace(get_engine_information=lambda format: f'{{"format": "{format.name}"}}')

        if generation != "10.3":

            def create_runtime_config(self) -> IRuntimeConfig:
                return IRuntimeConfig()

    class Runtime(Strict):
        def __init__(self, logger: Any) -> None:
            register(logger, "Runtime")

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            with memoryview(serialized_engine) as plan:
                good = bytes(plan[:4]) == MAGIC
            return ICudaEngine() if good and not fail("deserialize_cuda_engine") else None

    trt.loggers = []
    classes = [ILogger, IProgressMonitor, IHostMemory, IOptimizationProfile, ITimingCache, IBuilderConfig, Builder, OnnxParser]
    for kind in (*classes, IRuntimeConfig, IRuntimeCache, IExecutionContext, ICudaEngine, Runtime):
        setattr(trt, kind.__name__, kind)
    return trt


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Puts the stub of a generation where it is imported from, and nothing of the other library."""

    def put(generation: str) -> Any:
        stub = stub_of(generation)
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, stub if name == stub.__name__ else None)
        return stub

    return put


@pytest.fixture(params=EVERY)
def trt(request: pytest.FixtureRequest, install: Callable[..., Any]) -> Any:
    """Each generation in turn, for what differs between them."""
    return install(request.param)


@pytest.fixture
def oldest(install: Callable[..., Any]) -> Any:
    """One generation, for what is the same in all."""
    return install(EVERY[0])


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "engines" / "orin" / "decoder.engine"
    path.parent.mkdir(parents=True)
    path.write_bytes(MAGIC + b"...")
    return path


def test_the_stub_of_rtx_has_nothing_that_the_installed_package_has_not() -> None:
    real, stub = pytest.importorskip("tensorrt_rtx"), stub_of("rtx")
    for name, kind in vars(stub).items():
        if not isinstance(kind, type):
            continue
        own = getattr(kind, "__members__", None) or {key for key in vars(kind) if not key.startswith("_")}
        missing = {member for member in (*own, *getattr(kind, "settable", ())) if member not in (*dir(getattr(real, name)), "settable")}
        assert not missing, name


# --- Which library ------------------------------------------------------------------------------------------------------------------------


def test_it_is_found_by_name_and_version(trt: Any) -> None:
    library = find_library()
    assert (library.name, library.version, library.is_rtx) == (trt.__name__, trt.__version__, trt.__name__ == "tensorrt_rtx")
    assert library.always_strongly_typed == (trt.__version__.startswith(("1.", "11.")))


@pytest.mark.parametrize(
    ("generation", "version", "remedy"),
    [
        ("10.3", "8.6.2", "needs 10.3 or newer; update it, on a Jetson by installing JetPack 6.1 or newer"),
        ("10.3", "10.2.0.post1", "needs 10.3 or newer"),
        ("rtx", "1.1.1.26", "needs 1.2 or newer; run: pip install --upgrade tensorrt-rtx"),
    ],
)
def test_one_that_is_too_old_is_refused_with_the_remedy(install: Callable[..., Any], generation: str, version: str, remedy: str) -> None:
    install(generation).__version__ = version
    with pytest.raises(FastVLMError, match=rf"{version} is too old, this toolkit {remedy}"):
        find_library()


def test_without_either_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FastVLMError, match=r"^TensorRT is not installed; install tensorrt-rtx \(pip .*\), or on a Jetson that of JetPack"):
        find_library()
    with pytest.raises(FastVLMError, match=r"install tensorrt, or on a Jetson .*--system-site-packages"):
        find_library(("tensorrt",))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libnvinfer.so.10: cannot open shared object file"), "cannot be loaded (ImportError: libnvinfer.so.10: cannot open"),
        (OSError("libcudart.so.13: cannot open"), "cannot be loaded (OSError: libcudart.so.13"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "needs x"),
    ],
)
def test_one_that_is_installed_but_broken_is_explained(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(FastVLMError) as caught:
        find_library(("tensorrt",))
    assert str(caught.value).startswith(f"tensorrt is installed but {words}")


def test_a_folder_of_that_name_is_no_library(install: Callable[..., Any]) -> None:
    del install("10.3").__version__
    with pytest.raises(FastVLMError, match="TensorRT is not installed"):
        find_library()


def test_a_process_has_one_logger(oldest: Any) -> None:
    first, second = Library(oldest), Library(oldest)
    assert first.logger is second.logger and first.log is second.log


# --- Building -----------------------------------------------------------------------------------------------------------------------------

SHAPES = ({"x": ((1, 8), (2, 8), (4, 8))},)
GRAPH = Path("models/decoder.onnx")


def test_a_build_says_how_much_scratch_memory_the_engine_needs(trt: Any) -> None:
    assert find_library().build(GRAPH, BuildSettings(SHAPES)).scratch_bytes == max(trt.scratch)


def test_a_graph_that_is_refused_is_told_from_memory_that_is_short(oldest: Any) -> None:
    library = find_library()
    for call, words in (("parse_from_file", "No importer for Foo"), ("build_serialized_network", "No matching rules for dequantize")):
        oldest.fails, oldest.words = {call}, [words]
        with pytest.raises(GraphRefusedError, match=words):
            library.build(GRAPH, BuildSettings(SHAPES))
    oldest.words = ["Error Code 1: Cuda Runtime (out of memory)"]
    says = r"out of memory\)[^;]*; close other programs; on a Jetson .*drop_caches\), and reboot .*NvMap error 12"
    with pytest.raises(FastVLMError, match=says) as caught:
        library.build(GRAPH, BuildSettings(SHAPES))
    assert not isinstance(caught.value, GraphRefusedError)


def test_a_workspace_that_is_too_small_is_named(oldest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = find_library()
    oldest.fails, oldest.words = {"build_serialized_network"}, ["Could not find any implementation for node {{ForeignNode[a...b]}}"]
    start = oldest.Builder.create_network

    def warn(self: Any, flags: int = 0) -> Any:
        oldest.loggers[0].log(
            oldest.ILogger.Severity.WARNING, "Skipping tactic 0 due to insufficient memory on requested size of 2598728448 detected"
        )
        return start(self, flags)

    monkeypatch.setattr(oldest.Builder, "create_network", warn)
    with pytest.raises(FastVLMError, match=r"Could not find any implementation .*; allow more scratch memory: --workspace 2479$") as caught:
        library.build(GRAPH, BuildSettings(SHAPES, workspace=1 << 30))
    assert not isinstance(caught.value, GraphRefusedError), "build would take another graph"
    with pytest.raises(GraphRefusedError, match=r"a\.\.\.b\]\}$"):
        library.build(GRAPH, BuildSettings(SHAPES))


def test_a_profile_of_one_shape_makes_a_network_of_fixed_shapes(trt: Any) -> None:
    one = (2, 8)
    find_library().build(GRAPH, BuildSettings(({"x": (one, one, one)},)))
    assert trt.network_inputs[0].shape == one and "set_shape" not in trt.calls and "add_optimization_profile" not in trt.calls


@pytest.mark.parametrize("profiles", [SHAPES, ({"x": ((2, 8),) * 3},) * 2])
def test_other_profiles_leave_the_network_as_it_is(oldest: Any, profiles: Any) -> None:
    find_library().build(GRAPH, BuildSettings(profiles))
    assert oldest.network_inputs[0].shape == (-1, 8)
    assert oldest.calls.count("add_optimization_profile") == len(profiles)


def test_an_input_that_the_profile_does_not_name_leaves_all_shapes_as_they_were(oldest: Any) -> None:
    oldest.network_inputs.append(SimpleNamespace(name="y", shape=(-1, 8)))
    one = (1, 8)
    find_library().build(GRAPH, BuildSettings(({"x": (one, one, one)},)))
    assert [tensor.shape for tensor in oldest.network_inputs] == [(-1, 8), (-1, 8)]


def test_a_strongly_typed_network_is_asked_for_by_a_flag(trt: Any) -> None:
    built = find_library().build(GRAPH, BuildSettings(SHAPES, workspace=1 << 20))
    assert bytes(built.plan) == MAGIC + b" plan"
    assert ("create_network", 1 << FLAGS["STRONGLY_TYPED"]) in trt.calls
    assert ("WORKSPACE", 1 << 20) in trt.calls
    assert ("x", (1, 8), (2, 8), (4, 8)) in trt.calls
    assert "FP16" not in trt.calls


def test_rtx_alone_is_told_to_leave_the_scratch_memory_to_us(trt: Any) -> None:
    find_library().build(GRAPH, BuildSettings(SHAPES))
    assert ("REQUIRE_USER_ALLOCATION" in trt.calls) == (trt.__name__ == "tensorrt_rtx")


def layer(trt: Any, kind: str, *dtypes: str) -> Any:
    class Layer(Strict):
        settable = ("precision", "outputs")

        def __init__(self) -> None:
            self.outputs = [trt.DataType[each] for each in dtypes]

        type = property(lambda self: trt.LayerType[kind])
        num_outputs = property(lambda self: len(self.outputs))

        def get_output(self, index: int) -> Any:
            return SimpleNamespace(dtype=self.outputs[index])

        def set_output_type(self, index: int, dtype: Any) -> None:
            trt.calls.append((kind, index, dtype.name))

    return Layer()


@pytest.mark.parametrize("generation", ["10.3", "10.16"])
def test_weak_typing_allows_fp16_and_keeps_what_the_graph_has_in_fp32(install: Callable[..., Any], generation: str) -> None:
    trt = install(generation)
    rest = [("CONSTANT", "FLOAT"), ("SHAPE", "INT64"), ("TOPK", "FLOAT", "INT32"), ("ASSERTION",)]
    trt.layers = [layer(trt, "MATRIX_MULTIPLY", "HALF"), layer(trt, "SOFTMAX", "FLOAT"), *(layer(trt, *each) for each in rest)]
    find_library().build(GRAPH, BuildSettings(SHAPES, weakly_typed=True))
    assert ("create_network", 0) in trt.calls
    assert [call for call in trt.calls if call in ("FP16", "OBEY_PRECISION_CONSTRAINTS")] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert [each.precision.name for each in trt.layers[:2]] == ["HALF", "FLOAT"]
    assert [call for call in trt.calls if isinstance(call, tuple) and call[0] in trt.LayerType.__members__] == [
        ("MATRIX_MULTIPLY", 0, "HALF"),
        ("SOFTMAX", 0, "FLOAT"),
    ]


@pytest.mark.parametrize("generation", ["11", "rtx"])
def test_weak_typing_is_refused_where_it_is_gone(install: Callable[..., Any], generation: str) -> None:
    install(generation)
    with pytest.raises(FastVLMError, match=r"has only strongly typed networks; build without --weakly-typed"):
        find_library().build(GRAPH, BuildSettings(SHAPES, weakly_typed=True))


@pytest.mark.parametrize("generation", PROPER)
def test_tensorrt_proper_builds_for_no_other_gpu(install: Callable[..., Any], generation: str) -> None:
    install(generation)
    with pytest.raises(FastVLMError, match="only builds for the local GPU; leave out --target, or install tensorrt-rtx"):
        find_library().build(GRAPH, BuildSettings(SHAPES, ((8, 7),)))


def test_rtx_builds_for_several_compute_capabilities(install: Callable[..., Any]) -> None:
    trt = install("rtx")
    find_library().build(GRAPH, BuildSettings(SHAPES, ((8, 6), (12, 0))))
    assert {("SM86", 0), ("SM120", 1)} <= set(trt.calls)


def test_a_compute_capability_that_rtx_does_not_know_is_named_with_those_it_does(install: Callable[..., Any]) -> None:
    install("rtx")
    with pytest.raises(FastVLMError, match=r"cannot build for compute capability 8\.7; use one that it supports: SM75, SM86, SM89, SM120$"):
        find_library().build(GRAPH, BuildSettings(SHAPES, ((8, 7),)))


def test_the_list_of_layers_comes_from_the_log(oldest: Any) -> None:
    oldest.listing = "Name: /mm, LayerType: gemm"
    assert find_library().build(GRAPH, BuildSettings(SHAPES)).listing == "Layers:\nName: /mm, LayerType: gemm"


def test_timings_are_kept_except_by_rtx(trt: Any) -> None:
    built = find_library().build(GRAPH, BuildSettings(SHAPES), timing_cache=b"old")
    assert built.timing_cache == (b"" if trt.__name__ == "tensorrt_rtx" else b"old+new")


@pytest.mark.parametrize("refusal", ["create_timing_cache", "set_timing_cache"])
@pytest.mark.parametrize("generation", PROPER)
def test_timings_of_another_gpu_are_begun_anew(install: Callable[..., Any], generation: str, refusal: str) -> None:
    trt = install(generation)
    trt.fails, trt.words = {refusal}, ["{call} failed"]
    assert find_library().build(GRAPH, BuildSettings(SHAPES), timing_cache=b"old").timing_cache == b"+new"
    trt.fails.add("build_serialized_network")
    with pytest.raises(FastVLMError, match=r"could not build decoder\.onnx: build_serialized_network failed"):
        find_library().build(GRAPH, BuildSettings(SHAPES), timing_cache=b"old")


def test_timings_that_cannot_be_written_cost_no_build(install: Callable[..., Any]) -> None:
    install("10.3").fails = {"ITimingCache.serialize"}
    assert find_library().build(GRAPH, BuildSettings(SHAPES)).timing_cache == b""


REFUSALS = {
    "Builder": r"does not start: the cause; check whether nvidia-smi sees the GPU",
    "parse_from_file": f"does not accept {GRAPH}: the cause",
    "set_shape": "does not accept the shapes of x in decoder.onnx: Shape provided for min is inconsistent",
    "add_optimization_profile": "does not accept the shapes of decoder.onnx: the cause",
    "build_serialized_network": "could not build decoder.onnx: the cause",
}


@pytest.mark.parametrize("call", REFUSALS)
def test_a_refusal_is_one_sentence_with_the_librarys_first_error(oldest: Any, call: str) -> None:
    oldest.fails, oldest.words = {call}, ["the\n  cause", "what came of it"]
    with pytest.raises(FastVLMError, match=rf"^{oldest.__name__} {oldest.__version__} {REFUSALS[call]}") as caught:
        find_library().build(GRAPH, BuildSettings(SHAPES))
    assert "\n" not in str(caught.value) and "what came of it" not in str(caught.value)


def test_a_compute_capability_that_is_refused_is_one_sentence_too(install: Callable[..., Any]) -> None:
    trt = install("rtx")
    trt.fails, trt.words = {"set_compute_capability"}, ["the cause"]
    with pytest.raises(FastVLMError, match=r"refuses compute capability 8\.6: the cause"):
        find_library().build(GRAPH, BuildSettings(SHAPES, ((8, 6),)))


def test_a_refusal_without_a_reason_says_so(oldest: Any) -> None:
    oldest.fails = {"build_serialized_network"}
    with pytest.raises(FastVLMError, match=r"it gave no reason \(FASTVLM_EDGE_DEBUG=1 shows its log\)"):
        find_library().build(GRAPH, BuildSettings(SHAPES))


@pytest.mark.parametrize(
    ("operator", "node", "sentence"),
    [
        ("Sigmoix", "/mlp/act", "Sigmoix /mlp/act: no importer"),
        ("Sigmoix", "", "Sigmoix: no importer"),
        ("", "", r"no importer \(Failed to open file: decoder.weights\)"),
    ],
)
def test_the_parsers_first_error_names_its_node(oldest: Any, operator: str, node: str, sentence: str) -> None:
    error = {"node_operator": operator, "node_name": node, "desc": "no\n importer"}
    oldest.fails, oldest.words, oldest.parser_errors = {"parse_from_file"}, ["Failed to open file: decoder.weights"], [error, error]
    with pytest.raises(FastVLMError, match=f"does not accept {GRAPH}: {sentence}$"):
        find_library().build(GRAPH, BuildSettings(SHAPES))


# --- The monitor --------------------------------------------------------------------------------------------------------------------------


def test_progress_is_a_share_of_the_nested_phases(oldest: Any) -> None:
    shares: list[float] = []
    find_library().build(GRAPH, BuildSettings(SHAPES), monitor=shares.append)
    assert shares == pytest.approx([0, 0, 1 / 6, 2 / 6, 3 / 6, 1 / 2 + 0, 1], abs=1e-6)


def test_progress_stays_within_bounds_whatever_the_phases_say(oldest: Any) -> None:
    shares: list[float] = []
    monitor = _make_monitor(oldest, shares.append)
    monitor.phase_start("own parent", "own parent", 0)
    monitor.phase_start("a", "b", 1)
    monitor.phase_start("b", "a", 1)
    monitor.phase_start("orphan", "never begun", 2)
    assert all(monitor.step_complete(name, step) for name in ("own parent", "a", "b", "orphan", "unknown") for step in (0, 1, 7))
    monitor.phase_finish("unknown")
    assert shares and all(0 <= share <= 1 for share in shares)


def test_phases_may_come_from_several_threads(oldest: Any) -> None:
    shares: list[float] = []
    inside = 0

    def watch(share: float) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1, "two threads at once"
        time.sleep(0.0001)
        shares.append(share)
        inside -= 1

    monitor = _make_monitor(oldest, watch)

    def work(name: str) -> None:
        for _ in range(20):
            monitor.phase_start(name, "all", 4)
            assert all(monitor.step_complete(name, step) for step in range(4))
            monitor.phase_finish(name)

    monitor.phase_start("all", None, 3)
    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert monitor.error is None and len(shares) == 1 + 3 * 20 * 5


class Enough(Exception):
    pass


@pytest.mark.parametrize("error", [Enough, KeyboardInterrupt, SystemExit])
def test_what_the_monitor_raises_ends_the_build_and_comes_out(oldest: Any, error: type[BaseException]) -> None:
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0:
            raise error

    with pytest.raises(error):
        find_library().build(GRAPH, BuildSettings(SHAPES), monitor=stop)
    assert len(shares) == 3  # and is not asked again


def test_a_signal_ends_the_build(oldest: Any) -> None:
    oldest.steps = [("Building", None, 10_000)]
    shares: list[float] = []

    def slowly(share: float) -> None:
        shares.append(share)
        if len(shares) == 2:
            _thread.interrupt_main()
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        find_library().build(GRAPH, BuildSettings(SHAPES), monitor=slowly)
    assert len(shares) < 5_000


def test_the_log_is_printed_on_request(oldest: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = find_library().logger
    for asked, printed in (("", ""), ("1", f"[{oldest.__name__}] slow\n")):
        monkeypatch.setenv("FASTVLM_EDGE_DEBUG", asked)
        logger.log(oldest.ILogger.Severity.WARNING, "slow")
        logger.log(oldest.ILogger.Severity.VERBOSE, "a thousand of these")
        assert capsys.readouterr().err == printed


# --- Running ------------------------------------------------------------------------------------------------------------------------------


def test_borders_have_names_and_types(trt: Any, engine_file: Path) -> None:
    engine = find_library().load(engine_file)
    assert engine.inputs == {"input_ids": "int64", "image_features": "float16", "mask": "BOOL"}
    assert engine.outputs == {"logits": "float32", "top_ids": "int64", "kv_new": "bfloat16"}
    assert engine.profiles == 2
    assert (engine.largest("input_ids"), engine.largest("input_ids", 1)) == ((1, 48), (1, 49))
    with pytest.raises(FastVLMError, match=r"decoder\.engine has no input logits; it has input_ids, image_features, mask"):
        engine.largest("logits")


def test_the_largest_shape_of_a_static_input_is_its_own(trt: Any, engine_file: Path) -> None:
    trt.fixed = {"input_ids": [1, 512]}
    assert find_library().load(engine_file).largest("input_ids") == (1, 512)


def test_tensors_on_the_host_are_known(trt: Any, engine_file: Path) -> None:
    assert find_library().load(engine_file).on_host == []
    trt.on_host, trt.shape_tensors = {"mask"}, {"input_ids"}
    assert find_library().load(engine_file).on_host == ["input_ids", "mask"]


def test_the_scratch_memory_is_that_of_the_largest_profile(trt: Any, engine_file: Path) -> None:
    trt.scratch = [4096, 12288]
    assert find_library().load(engine_file).scratch_bytes == 12288


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_is_missing_or_empty_is_named(oldest: Any, engine_file: Path, content: bytes | None) -> None:
    path = engine_file.with_name("vision.engine")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FastVLMError, match=r"vision\.engine could not be read ") as caught:
        find_library().load(path)
    assert caught.value.mend == f"run: fastvlm-edge build {engine_file.parents[2]} --force"


def test_an_engine_that_is_refused_is_named(oldest: Any, engine_file: Path) -> None:
    oldest.fails, oldest.words = {"deserialize_cuda_engine"}, ["built by another version"]
    with pytest.raises(FastVLMError, match=rf"^{oldest.__name__} .* could not load {engine_file}: built by another version") as caught:
        find_library().load(engine_file)
    assert caught.value.mend == f"run: fastvlm-edge build {engine_file.parents[2]} --force"
    assert find_library().inspect(MAGIC) == ""


def test_a_runtime_that_does_not_start_is_explained(oldest: Any, engine_file: Path) -> None:
    oldest.fails, oldest.words = {"Runtime"}, ["CUDA driver version is insufficient"]
    with pytest.raises(FastVLMError, match=r"does not start: CUDA driver version is insufficient; check whether nvidia-smi sees the GPU"):
        find_library().load(engine_file)


def test_an_engine_that_does_not_fit_into_the_gpu_is_told_from_a_wrong_one(oldest: Any, engine_file: Path) -> None:
    oldest.fails, oldest.words = {"deserialize_cuda_engine"}, ["Error Code 2: OutOfMemory (Requested size was 497 MiB)"]
    with pytest.raises(OutOfDeviceMemory, match=r"^1 MiB of GPU memory are needed and fewer are free; choose") as caught:
        find_library().load(engine_file)
    assert (caught.value.needed, caught.value.free) == (engine_file.stat().st_size, None)


@pytest.mark.parametrize("generation", EVERY)
def test_a_context_that_does_not_fit_into_the_gpu_is_told_from_a_wrong_one(
    install: Callable[..., Any], engine_file: Path, generation: str
) -> None:
    trt = install(generation)
    engine = find_library().load(engine_file)
    trt.fails, trt.words = {"create_execution_context"}, ["Error Code 2: OutOfMemory (Requested size was 497 MiB)"]
    with pytest.raises(OutOfDeviceMemory, match=r"^more GPU memory is needed than is free; choose a smaller context"):
        engine.context(0, 0, 8192, 1, captured=True)


def test_a_mapped_file_is_let_go_after_loading(oldest: Any, engine_file: Path) -> None:
    engine = find_library().load(engine_file)
    engine_file.write_bytes(b"")
    assert engine.profiles == 2


@pytest.mark.parametrize("generation", PROPER)
def test_tensorrt_proper_compiles_nothing_at_its_first_run(install: Callable[..., Any], engine_file: Path, generation: str) -> None:
    trt = install(generation)
    engine = find_library().load(engine_file)
    engine.restore_kernels(b"of another library")
    engine.context(0, 0x1000, 8192, 0x51, captured=True)
    assert ("create_execution_context", trt.ExecutionContextAllocationStrategy.USER_MANAGED) in trt.calls
    assert engine.compiled_kernels() == b"" and not engine.captures_itself


@pytest.mark.parametrize(("kept", "now"), [(b"", b"+jit"), (b"kernels", b"kernels+jit")])
def test_rtx_keeps_what_its_first_run_compiled(install: Callable[..., Any], engine_file: Path, kept: bytes, now: bytes) -> None:
    trt = install("rtx")
    engine = find_library().load(engine_file)
    engine.restore_kernels(kept)
    for profile in (0, 1):
        engine.context(profile, 0x1000, 8192, 0x51, captured=profile == 1)
    configs = [call[1] for call in trt.calls if isinstance(call, tuple) and call[0] == "create_execution_context"]
    assert [each["strategy"].name for each in configs] == ["USER_MANAGED"] * 2
    assert [each["when"].name for each in configs] == ["LAZY"] * 2
    assert [each["graphs"].name for each in configs] == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]
    assert engine.captures_itself
    assert configs[0]["cache"] is configs[1]["cache"]
    assert engine.compiled_kernels() == now
    trt.fails = {"IRuntimeCache.serialize"}
    assert engine.compiled_kernels() == b""
    engine.close()
    assert engine.compiled_kernels() == b""


def test_rtx_waits_for_its_kernels_if_asked(install: Callable[..., Any], engine_file: Path) -> None:
    trt = install("rtx")
    engine = find_library().load(engine_file)
    engine.restore_kernels(b"")
    engine.waits_for_kernels = True
    engine.context(0, 0x1000, 8192, 0x51, captured=False)
    (config,) = [call[1] for call in trt.calls if isinstance(call, tuple) and call[0] == "create_execution_context"]
    assert config["when"].name == "EAGER"


def bound(engine: Any, profile: int, scratch: int = 0) -> Any:
    """A context with every shape and address."""
    context = engine.context(profile, scratch, 8192, 0x51, captured=True)
    for name in engine.inputs:
        context.set_shape(name, (1, 9))
    for name in (*engine.inputs, *engine.outputs):
        context.set_address(name, 256)
    return context


CONTEXT_FAILURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "create_execution_context": (lambda engine: engine.context(0, 0, 8192, 1, captured=True), "could not be prepared for execution"),
    "set_optimization_profile_async": (lambda engine: engine.context(1, 0, 8192, 1, captured=True), "could not be set to profile 1"),
    "set_input_shape": (
        lambda engine: engine.context(0, 0, 8192, 1, captured=True).set_shape("input_ids", (1, 9)),
        r"does not take input_ids of shape \[1, 9\]",
    ),
    "set_tensor_address": (lambda engine: engine.context(0, 0, 8192, 1, captured=True).set_address("x", 256), "has no tensor x"),
    "execute_async_v3": (lambda engine: bound(engine, 0).enqueue(1), "failed to run"),
}


@pytest.mark.parametrize("call", CONTEXT_FAILURES)
def test_a_call_of_a_context_that_fails_names_engine_and_tensor(oldest: Any, engine_file: Path, call: str) -> None:
    run, sentence = CONTEXT_FAILURES[call]
    engine = find_library().load(engine_file)
    engine._library.log.errors.append("of long ago")
    oldest.fails, oldest.words = {call}, ["the cause"]
    with pytest.raises(FastVLMError, match=rf"^{engine_file} {sentence}: the cause$"):
        run(engine)


@pytest.mark.parametrize("profile", [-1, 2])
def test_a_profile_that_is_not_there_is_never_asked_for(oldest: Any, engine_file: Path, profile: int) -> None:
    with pytest.raises(FastVLMError, match=rf"decoder\.engine has no profile {profile}; it has 2"):
        find_library().load(engine_file).context(profile, 0, 8192, 1, captured=True)


def test_a_context_gets_the_scratch_memory_and_its_profile(trt: Any, engine_file: Path) -> None:
    engine = find_library().load(engine_file)
    trt.calls.clear()
    engine.context(0, 0x1000, 8192, 0x51, captured=True)
    engine.context(1, 0x2000, 8448, 0x52, captured=True)
    user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert [call for call in trt.calls if isinstance(call, tuple)] == [
        ("create_execution_context", user_managed),
        ("set_device_memory", 0x1000, 8192),
        ("create_execution_context", user_managed),
        ("set_device_memory", 0x2000, 8448),
        ("set_optimization_profile_async", 1, 0x52),
    ]


def test_a_context_runs_on_the_stream_of_the_call(trt: Any, engine_file: Path) -> None:
    engine = find_library().load(engine_file)
    prefill, decode = (bound(engine, profile, 0x1000) for profile in (0, 1))
    prefill.enqueue(0x51)
    decode.enqueue(0x51)
    decode.enqueue(0x52)
    assert trt.runs == [(0, 0x1000, 0x51), (1, 0x1000, 0x51), (1, 0x1000, 0x52)]


def test_a_shape_outside_the_profile_in_use_is_refused(trt: Any, engine_file: Path) -> None:
    engine = find_library().load(engine_file)
    for profile, most in ((0, 48), (1, 49)):
        context = engine.context(profile, 0x1000, 8192, 0x51, captured=True)
        context.set_shape("input_ids", (1, most))
        for size in (0, most + 1):
            with pytest.raises(FastVLMError, match=rf"does not take input_ids of shape \[1, {size}\]"):
                context.set_shape("input_ids", (1, size))


@pytest.mark.parametrize("missing", ["memory", "shape", "address", "shape after the profile"])
def test_the_stub_catches_a_run_that_nobody_prepared(trt: Any, engine_file: Path, missing: str) -> None:
    context = bound(find_library().load(engine_file), 1)
    inner = context._context
    if missing == "memory":
        inner._scratch = None
    elif missing == "shape":
        del inner._shapes["input_ids"]
    elif missing == "address":
        del inner._addresses["kv_new"]
    else:
        inner.set_optimization_profile_async(0, 0x51)
    with pytest.raises(AssertionError, match=r"was not called|has no shape|has no address"):
        context.enqueue(0x51)
    assert not trt.runs


# --- TensorRT for RTX itself, which builds without a GPU ----------------------------------------------------------------------------------


@pytest.fixture
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return find_library(("tensorrt_rtx",))


ROWS = ({"x": ((1, 64), (4, 64), (8, 64))},)


def write_graph(folder: Path, op: str = "MatMul") -> Path:
    """y = x w, with `w` in graph.weights beside it."""
    weights = numpy_helper.from_array(np.ones((64, 32), np.float16), "w")
    borders = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", size]) for name, size in (("x", 64), ("y", 32))]
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], name="/mm")], "graph", borders[:1], borders[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.weights", size_threshold=0)
    return path


def test_rtx_builds_a_network_of_fixed_shapes(rtx: Library, tmp_path: Path) -> None:
    listings = [
        rtx.build(write_graph(tmp_path), BuildSettings(({"x": shapes},), ((8, 6),))).listing for shapes in (((4, 64),) * 3, ROWS[0]["x"])
    ]
    assert "Dimensions: [4,64]" in listings[0] and "Dimensions: [4,64]" not in listings[1]


@pytest.mark.parametrize("capabilities", [((8, 6),), ((8, 9),), ((12, 0),), ((8, 6), (8, 9), (12, 0))])
def test_rtx_builds_without_a_gpu(rtx: Library, tmp_path: Path, capabilities: tuple[tuple[int, int], ...]) -> None:
    shares: list[float] = []
    built = rtx.build(write_graph(tmp_path), BuildSettings(ROWS, capabilities, workspace=1 << 26), monitor=shares.append)
    assert memoryview(built.plan).nbytes > 2 * 64 * 32
    assert "/mm" in built.listing and "LayerType: gemm" in built.listing
    assert built.timing_cache == b""
    assert len(shares) > 10 and all(0 <= share <= 1 for share in shares)


def test_rtx_stops_where_the_monitor_raises(rtx: Library, tmp_path: Path) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    graph = write_graph(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        rtx.build(graph, BuildSettings(ROWS, ((8, 6),)), monitor=stop)
    assert "canceled" in rtx.log.errors[0].lower()
    assert rtx.build(graph, BuildSettings(ROWS, ((8, 6),))).listing


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda graph: write_graph(graph.parent, "Sigmoix"), r"does not accept .*graph\.onnx: Sigmoix /mm: "),
        (lambda graph: graph.unlink(), r"does not accept .*graph\.onnx: .*cannot be found"),
        (lambda graph: graph.write_bytes(b"junk"), r"does not accept .*graph\.onnx: .*[Ff]ailed to parse"),
        (lambda graph: graph.with_suffix(".weights").unlink(), r"does not accept .*graph\.onnx: .*graph\.weights"),
    ],
)
def test_rtx_explains_a_graph_that_it_does_not_parse(rtx: Library, tmp_path: Path, damage: Callable[[Path], Any], sentence: str) -> None:
    graph = write_graph(tmp_path)
    damage(graph)
    with pytest.raises(FastVLMError, match=sentence):
        rtx.build(graph, BuildSettings(ROWS, ((8, 6),)))


@pytest.mark.parametrize(
    ("profiles", "sentence"),
    [
        (({"x": ((8, 64), (4, 64), (8, 64))},), r"does not accept the shapes of .*MIN<=OPT<=MAX"),
        (({"x": ((1, 65), (4, 65), (8, 65))},), r"could not build graph\.onnx: .*Dimension mismatch for tensor x"),
        ((), r"could not build graph\.onnx: .*no optimization profile"),
    ],
)
def test_rtx_explains_profiles_that_do_not_fit(rtx: Library, tmp_path: Path, profiles: Any, sentence: str) -> None:
    with pytest.raises(FastVLMError, match=sentence):
        rtx.build(write_graph(tmp_path), BuildSettings(profiles, ((8, 6),)))


def test_rtx_names_the_capabilities_it_knows(rtx: Library, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=r"compute capability 8\.7; use one that it supports: SM75, .*SM120"):
        rtx.build(write_graph(tmp_path), BuildSettings(ROWS, ((8, 7),)))


def test_rtx_refuses_a_file_that_is_no_engine(rtx: Library, tmp_path: Path) -> None:
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(FastVLMError, match=rf"^tensorrt_rtx .* could not load {path}: .*engine"):
        rtx.load(path)


def test_the_types_we_name_are_those_of_rtx() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    assert set(DTYPES) <= set(real.DataType.__members__)
    assert {kind.name for kind in (real.float16, real.int64)} == {"HALF", "INT64"}
