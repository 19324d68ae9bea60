"""TensorRT as one interface: `tensorrt` 10.3 to 11.x or `tensorrt_rtx`. Their Python APIs hardly differ; all differences are handled here.

| | `tensorrt` 10.3 .. 10.16 | `tensorrt` 11 | `tensorrt_rtx` 1.x |
| --- | --- | --- | --- |
| strong typing | a flag at `create_network` | always, the flag is accepted | the flag |
| `BuilderFlag.FP16` and similar (weak typing) | yes, deprecated since 10.12 | removed | never existed |
| engines for other GPUs than the local one | no | no | `set_compute_capability`, also without a GPU |
| caller allocates all scratch memory, as CUDA graphs need | no flag | no flag | `REQUIRE_USER_ALLOCATION` |
| timing cache | yes | yes | no effect |
| compiled by the first run | nothing | nothing | kernels, kept in an `IRuntimeCache` |
| CUDA graphs | captured by the caller | captured by the caller | `CudaGraphStrategy.WHOLE_GRAPH_CAPTURE` |

Sources, call by call: docs/tensorrt-versions.md.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.extras import install_command
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory

LIBRARIES = ("tensorrt", "tensorrt_rtx")
OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 2)}
"""Oldest supported version of each."""

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> smallest, optimal and largest shape."""
Monitor = Callable[[float], None]
"""Called often with the finished share of the build, 0 to 1. An exception that it raises, such as KeyboardInterrupt, ends the build."""

_NO_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|MemoryAllocation", re.IGNORECASE)
_REQUESTED = re.compile(r"insufficient memory on requested size of (\d+)")
_SCRATCH = re.compile(r"Total Activation Memory: (\d+)")

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


class GraphRefusedError(FastVLMError):
    """The library does not accept a graph, or finds no kernels for it, although it has enough memory."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings for building an engine from an ONNX graph."""

    profiles: tuple[Profile, ...] = ()
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    """GPUs to build for, with TensorRT for RTX only. Empty means the local GPU."""
    workspace: int | None = None
    """Bytes of scratch memory that a kernel may use. None means all memory of the GPU."""
    weakly_typed: bool = False
    """Use the FP16 builder flag, with the FP32 parts of the graph as constraints: for TensorRT 10.3 if strong typing fails."""


@dataclass(frozen=True)
class Built:
    """The result of a build."""

    plan: Any
    """The serialized engine, a bytes-like object."""
    timing_cache: bytes
    """Timings for later builds; empty with TensorRT for RTX."""
    listing: str
    """The builder's list of the layers of the engine, empty if its log has none."""
    scratch_bytes: int
    """Device memory that a run needs in addition to weights, inputs and outputs: the largest of all profiles. 0 if the log does not say."""


class Library:
    """One of the two libraries, after its import."""

    def __init__(self, module: Any) -> None:
        """Raises FastVLMError if the version is older than `OLDEST`."""
        self.module = module
        self.name: str = module.__name__
        self.version: str = module.__version__
        self.numbers = tuple(int(part) for part in self.version.split(".")[:4] if part.isdigit())
        if self.numbers < OLDEST[self.name]:
            oldest = ".".join(map(str, OLDEST[self.name]))
            mend = "run: pip install --upgrade tensorrt-rtx" if self.is_rtx else "update it, on a Jetson by installing JetPack 6.1 or newer"
            raise FastVLMError(f"{self.name} {self.version} is too old, this toolkit needs {oldest} or newer", mend)
        self.logger, self.log = _make_logger(module)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX."""
        return self.name == "tensorrt_rtx"

    @property
    def always_strongly_typed(self) -> bool:
        """Whether all networks are strongly typed. TensorRT 11 still accepts the flag, but it has no effect."""
        return self.is_rtx or self.numbers >= (11,)

    # Building -------------------------------------------------------------------------------------------------------------------

    def build(self, graph: Path, settings: BuildSettings, *, timing_cache: bytes = b"", monitor: Monitor | None = None) -> Built:
        """Build an engine from an ONNX graph; its external weights must be in the same directory.

        Raises FastVLMError, with the library's reason, if it refuses the graph or the settings, and any exception that the monitor raised.
        """
        if settings.weakly_typed and self.always_strongly_typed:
            raise FastVLMError(f"{self.name} {self.version} has only strongly typed networks", "build without --weakly-typed")
        watch = _make_monitor(self.module, monitor or (lambda _share: None))
        return _in_thread(lambda: self._build(graph, settings, timing_cache, watch), watch)

    def _build(self, graph: Path, settings: BuildSettings, timing_cache: bytes, watch: Any) -> Built:
        trt = self.module
        self.log.clear()
        builder = self._start(trt.Builder)
        network = builder.create_network(self._network_flags(settings))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(graph)):
            raise GraphRefusedError(f"{self.name} {self.version} does not accept {graph}: {self._parser_errors(parser)}")
        config = builder.create_builder_config()
        if settings.weakly_typed:
            self._constrain(network, config)
        if self.is_rtx:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # Side streams only dequantise weights ahead of time: they wait for each other, and hold several times the scratch memory.
        config.max_aux_streams = 0
        self._set_targets(config, settings.compute_capabilities)
        for ranges in () if self._fix_shapes(network, settings.profiles) else settings.profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, optimal, largest) in ranges.items():
                try:
                    profile.set_shape(name, smallest, optimal, largest)
                except (RuntimeError, ValueError) as error:  # raises the first, documents the second
                    what = f"the shapes of {name} in {graph.name}"
                    raise FastVLMError(f"{self.name} {self.version} does not accept {what}: {error}") from None
            if config.add_optimization_profile(profile) < 0:
                raise FastVLMError(f"{self.name} {self.version} does not accept the shapes of {graph.name}: {self._reason()}")
        cache = None if self.is_rtx else self._use_timings(config, timing_cache)
        config.progress_monitor = watch
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._build_error(graph.name, settings.workspace)
        return Built(plan, b"" if cache is None else _bytes(cache.serialize()), self.log.listing, self.log.scratch)

    def _fix_shapes(self, network: Any, profiles: Sequence[Profile]) -> bool:
        """If there is one profile, and all its inputs have one shape, make these the shapes of the network, which then needs no profile."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        if len(profiles) != 1 or any(len({*shapes}) > 1 for shapes in profiles[0].values()):
            return False
        if any(tensor.name not in profiles[0] for tensor in inputs):
            return False
        for tensor in inputs:
            tensor.shape = profiles[0][tensor.name][0]
        return True

    def _start(self, kind: Any) -> Any:
        """Create a Builder or a Runtime. Their constructors raise TypeError if the GPU driver is missing or too old."""
        try:
            return kind(self.logger)
        except TypeError:
            what = f"{self.name} {self.version} does not start: {self._reason()}"
            raise FastVLMError(what, "check whether nvidia-smi sees the GPU") from None

    def _build_error(self, graph: str, workspace: int | None) -> FastVLMError:
        what = f"{self.name} {self.version} could not build {graph}: {self._reason()}"
        if self._lacks_memory():
            return FastVLMError(
                what,
                "close other programs; on a Jetson also drop the file cache (sync; echo 3 | sudo tee /proc/sys/vm/drop_caches), and reboot "
                "if that does not help, because GPU memory can be too fragmented (NvMap error 12)",
            )
        if workspace is not None and self.log.requested > workspace:  # tactics that need more are only skipped, with a warning
            return FastVLMError(what, f"allow more scratch memory: --workspace {-(-self.log.requested // (1 << 20))}")
        return GraphRefusedError(what)

    def _use_timings(self, config: Any, timings: bytes) -> Any:
        """Give the builder a timing cache to add to. TensorRT refuses timings of another version or GPU; then start with an empty one."""
        cache = config.create_timing_cache(timings)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        self.log.errors.clear()  # this refusal must not be reported as the reason of a later error
        return cache

    def _network_flags(self, settings: BuildSettings) -> int:
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        strong = getattr(flags, "STRONGLY_TYPED", None)
        return 0 if settings.weakly_typed or strong is None else 1 << int(strong)

    def _set_targets(self, config: Any, compute_capabilities: Sequence[tuple[int, int]]) -> None:
        if not compute_capabilities:
            return
        if not self.is_rtx:
            raise FastVLMError(f"{self.name} only builds for the local GPU", "leave out --target, or install tensorrt-rtx")
        known = self.module.ComputeCapability
        config.num_compute_capabilities = len(compute_capabilities)
        for index, (major, minor) in enumerate(compute_capabilities):
            wanted = getattr(known, f"SM{major}{minor}", None)
            if wanted is None:
                names = ", ".join(name for name in known.__members__ if name.startswith("SM"))
                what = f"{self.name} {self.version} cannot build for compute capability {major}.{minor}"
                raise FastVLMError(what, f"use one that it supports: {names}")
            if not config.set_compute_capability(wanted, index):
                raise FastVLMError(f"{self.name} {self.version} refuses compute capability {major}.{minor}: {self._reason()}")

    def _constrain(self, network: Any, config: Any) -> None:
        """Weak typing: allow FP16 everywhere, but constrain every tensor that is FP32 in the graph to stay FP32."""
        trt = self.module
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            kinds = [layer.get_output(i).dtype for i in range(layer.num_outputs)]  # an assertion has no outputs
            floats = kinds and all(kind in (trt.DataType.FLOAT, trt.DataType.HALF) for kind in kinds)
            if floats and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
                layer.precision = kinds[0]
                for i, kind in enumerate(kinds):
                    layer.set_output_type(i, kind)

    def _parser_errors(self, parser: Any) -> str:
        """The first error of the parser; later ones follow from it."""
        if not parser.num_errors:
            return self._reason()
        error = parser.get_error(0)
        node = " ".join(word for word in (error.node_operator(), error.node_name()) if word)
        what = " ".join(error.desc().split())[:300]
        if node:
            return f"{node}: {what}"
        logged = self.log.errors[:1]  # only the log names a missing weights file
        return f"{what} ({logged[0]})" if logged and what not in logged[0] else what

    def _reason(self) -> str:
        """The first error in the log; later ones follow from it, and without a GPU there is always one about CUDA."""
        return self.log.errors[0] if self.log.errors else "it gave no reason (FASTVLM_EDGE_DEBUG=1 shows its log)"

    def _lacks_memory(self) -> bool:
        """Whether the log says that memory was short."""
        return any(_NO_MEMORY.search(words) for words in self.log.errors)

    # Running --------------------------------------------------------------------------------------------------------------------

    def inspect(self, plan: Any) -> str:
        """JSON of the engine inspector about every layer. Returns an empty string without the GPU that the engine was built for."""
        engine = self._start(self.module.Runtime).deserialize_cuda_engine(plan)
        if engine is None:
            return ""
        return str(engine.create_engine_inspector().get_engine_information(self.module.LayerInformationFormat.JSON))

    def load(self, path: Path) -> LoadedEngine:
        """Load an engine file onto the GPU. Each call loads the weights again. Raises FastVLMError if the library refuses it."""
        self.log.clear()
        runtime = self._start(self.module.Runtime)
        again = f"run: fastvlm-edge build {path.parents[2]} --force"  # engines are in MODEL/engines/TARGET
        try:
            # Mapped, not read: on a Jetson, a copy of the file in host memory would take memory that the GPU needs.
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise FastVLMError(f"{path} could not be read ({error})", again) from None
        if engine is None:
            if self._lacks_memory():
                raise OutOfDeviceMemory(path.stat().st_size)
            raise FastVLMError(f"{self.name} {self.version} could not load {path}: {self._reason()}", again)
        return LoadedEngine(self, runtime, engine, path)


@dataclass
class _Tensors:
    """Names and types of the inputs and outputs of an engine."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    on_host: list[str] = field(default_factory=list)
    """Those whose values the library reads or writes in host memory."""


class LoadedEngine:
    """An engine on the GPU. `context` creates an execution context, which runs it."""

    waits_for_kernels = False
    """TensorRT for RTX: whether contexts that are created from now on compile the kernels for a new shape before they run it."""

    def __init__(self, library: Library, runtime: Any, engine: Any, path: Path) -> None:
        self._library, self._runtime, self._engine = library, runtime, engine
        self.path = path
        trt, tensors = library.module, _Tensors()
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            borders = tensors.inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else tensors.outputs
            borders[name] = DTYPES.get(kind, kind)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE or engine.is_shape_inference_io(name):
                tensors.on_host.append(name)
        self.inputs, self.outputs, self.on_host = tensors.inputs, tensors.outputs, tensors.on_host
        self._config: Any = None
        self._kernels: Any = None

    @property
    def profiles(self) -> int:
        """Number of optimisation profiles."""
        return int(self._engine.num_optimization_profiles)

    def largest(self, name: str, profile: int = 0) -> Shape:
        """The largest shape of an input in a profile, or its only one."""
        if name not in self.inputs:
            raise FastVLMError(f"{self.path} has no input {name}; it has {', '.join(self.inputs)}")
        shape = tuple(self._engine.get_tensor_shape(name))
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2]) if -1 in shape else shape

    @property
    def scratch_bytes(self) -> int:
        """Bytes of device memory that a run needs in addition to weights, inputs and outputs: the largest of all profiles.

        Contexts that run one after the other on the same stream may share this memory, also those of different engines.
        """
        return int(self._engine.device_memory_size_v2)

    @property
    def captures_itself(self) -> bool:
        """Whether the library makes CUDA graphs itself, so that its work must not be captured."""
        return self._library.is_rtx

    def restore_kernels(self, cache: bytes) -> None:
        """TensorRT for RTX: restore the kernels of earlier runs, see `compiled_kernels`. The library ignores those that do not fit."""
        if not self._library.is_rtx:  # since 10.11 TensorRT has runtime configurations too, but without kernels
            return
        self._config = self._engine.create_runtime_config()
        self._kernels = self._config.create_runtime_cache()
        if cache:
            self._kernels.deserialize(cache)
        self._config.set_runtime_cache(self._kernels)

    def compiled_kernels(self) -> bytes:
        """The kernels compiled so far. Empty for TensorRT itself, which compiles at build time."""
        return b"" if self._kernels is None else _bytes(self._kernels.serialize())

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: int, *, captured: bool) -> Context:
        """Create an execution context for one profile. Its scratch memory is at the device address `scratch`, a multiple of 256.

        `captured` says that calls of the same shape repeat, so that CUDA graphs pay. TensorRT for RTX then makes them itself
        (`captures_itself`). It compiles the kernels for a new shape in the background, runs slower ones until they are ready, and captures
        a graph after that: so the first calls of a shape do not wait, unless `waits_for_kernels` is set.

        Raises OutOfDeviceMemory.
        """
        if not 0 <= profile < self.profiles:  # checked here, because 10.3 raises its error without holding the GIL
            raise FastVLMError(f"{self.path} has no profile {profile}; it has {self.profiles}")
        self._library.log.errors.clear()
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._config is not None:
            self._config.set_execution_context_allocation_strategy(strategy)
            trt = self._library.module
            when = trt.DynamicShapesKernelSpecializationStrategy
            self._config.dynamic_shapes_kernel_specialization_strategy = when.EAGER if self.waits_for_kernels else when.LAZY
            graphs = trt.CudaGraphStrategy
            self._config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if captured else graphs.DISABLED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None:
            if self._library._lacks_memory():
                raise OutOfDeviceMemory()
            raise FastVLMError(f"{self.path} could not be prepared for execution: {self._library._reason()}")
        context.set_device_memory(scratch, scratch_bytes)
        try:
            if profile:
                context.set_optimization_profile_async(profile, stream)
        except RuntimeError:
            raise FastVLMError(f"{self.path} could not be set to profile {profile}: {self._library._reason()}") from None
        return Context(self._library, context, self.path)

    def close(self) -> None:
        """Release the weights. All contexts must be closed before."""
        self._config = self._kernels = self._engine = self._runtime = None


class Context:
    """An execution context: runs an engine on a stream with the shapes and addresses that were set."""

    def __init__(self, library: Library, context: Any, path: Path) -> None:
        self._library, self._context, self._path = library, context, path

    def set_shape(self, name: str, shape: Shape) -> None:
        """Set the shape of an input."""
        if not self._context.set_input_shape(name, shape):
            raise FastVLMError(f"{self._path} does not take {name} of shape {list(shape)}: {self._library._reason()}")

    def set_address(self, name: str, address: int) -> None:
        """Set the device address of an input or output."""
        if not self._context.set_tensor_address(name, address):
            raise FastVLMError(f"{self._path} has no tensor {name}: {self._library._reason()}")

    def close(self) -> None:
        """Release the context. None of its work may be in progress."""
        self._context = None

    def enqueue(self, stream: int) -> None:
        """Enqueue one run on the stream."""
        if not self._context.execute_async_v3(stream):
            raise FastVLMError(f"{self._path} failed to run: {self._library._reason()}")


def find_library(names: Sequence[str] = LIBRARIES) -> Library:
    """Import the first of `names` that is installed. Raises FastVLMError, which says what to install."""
    broken = ""
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a package that is broken may raise anything
            if not isinstance(error, ModuleNotFoundError):
                broken = f"{name} is installed but cannot be loaded ({one_line(error)})"
            elif error.name not in (name, f"{name}_bindings", f"{name}_libs"):
                broken = f"{name} is installed but needs {error.name}, which is not"
        else:
            if hasattr(module, "__version__"):  # a directory of that name, such as a clone of its sources, can be imported too
                return Library(module)
    mend = f"install tensorrt-rtx ({install_command('rtx')})" if "tensorrt_rtx" in names else "install tensorrt"
    if "tensorrt" in names:
        mend += ", or on a Jetson that of JetPack (apt install python3-libnvinfer; a virtual environment needs --system-site-packages)"
    raise FastVLMError(broken or "TensorRT is not installed", mend)


class _Log:
    """What a library logged since the last `clear`: errors, layers, and bytes of scratch memory that the engine needs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.errors: list[str] = []
        self.listing = ""
        self.scratch = 0
        self.requested = 0
        """The most scratch memory that a kernel asked for in vain."""


def _bytes(memory: Any) -> bytes:
    """The bytes of an IHostMemory, which is None if the library failed."""
    return b"" if memory is None else bytes(memoryview(memory))


@functools.cache
def _make_logger(trt: Any) -> tuple[Any, _Log]:
    """Create an ILogger that keeps errors and the list of layers, and with FASTVLM_EDGE_DEBUG=1 prints everything but verbose messages.

    One for the whole process: as long as any builder or runtime exists, TensorRT uses the logger of the first one and ignores others.
    """
    log = _Log()
    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                log.errors.append(" ".join(message.split())[:400])
            if found := _SCRATCH.match(message):
                log.scratch = max(log.scratch, int(found[1]))
            if found := _REQUESTED.search(message[:400]):
                log.requested = max(log.requested, int(found[1]))
            if severity == severities.VERBOSE:
                if message.startswith("Layers:"):
                    log.listing = message
                return
            if os.environ.get("FASTVLM_EDGE_DEBUG"):
                print(f"[{trt.__name__}] {message}", file=sys.stderr, flush=True)

    return Logger(), log


def _in_thread(build: Callable[[], Built], watch: Any) -> Built:
    """Run `build` in a thread, so that this one can handle signals: TensorRT discards exceptions that are raised in its logger callbacks.

    An exception of the monitor, or a signal, stops the build at TensorRT's next step and is raised here.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build)
        try:
            while not future.done():
                wait([future], timeout=0.1)
        except BaseException as error:
            watch.error = error
            wait([future])
    if watch.error is not None:
        raise watch.error
    return future.result()


def _make_monitor(trt: Any, monitor: Monitor) -> Any:
    """Create an IProgressMonitor that combines the nested phases into one share, and stops the build if `monitor` raises."""

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps done, steps in all

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, 0, max(num_steps, 1))
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                parent, _, steps = self._phases[phase_name]
                self._phases[phase_name] = (parent, step + 1, steps)
                self._tell(phase_name)
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _tell(self, phase: str | None) -> None:
            """Report progress. A phase is part of one step of its parent."""
            share, phases = 0.0, dict(self._phases)  # a copy, because TensorRT calls this from several threads
            while phase in phases:
                phase, done, steps = phases.pop(phase)
                share = min((done + share) / steps, 1.0)
            with self._lock:
                if self.error is None:
                    try:
                        monitor(share)
                    except BaseException as error:  # must not pass through C++; it is raised again after the build
                        self.error = error

    return ProgressMonitor()
