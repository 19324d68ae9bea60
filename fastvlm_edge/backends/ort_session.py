"""onnxruntime sessions for the two graphs: options, loading, running, and errors that say what to do."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import Manifest

_ONNX_BFLOAT16 = 16
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}
_CPU_GRAPH = ".cpu.onnx"
SPIN_MICROSECONDS = 500
"""How long a thread without work waits awake: longer than the pause between two calls of the decoder, so that decoding need not wake it.
onnxruntime's own is tens of milliseconds (-1), in which the threads of one graph take the cores from the other's. Versions before 1.26, the
last for Python 3.10 among them, know no other."""


def available_threads() -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container (cgroup v2 cpu.max)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no such file, or "max"
    return cores


def session_options(graph: Path, threads: int) -> ort.SessionOptions:
    """How onnxruntime runs a graph, `vision*.onnx` or `decoder*.onnx`. The one place to tune it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1" if _arena_is_shared else "0")
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    options.log_severity_level = 2 if os.environ.get("FASTVLM_EDGE_DEBUG") else 4  # its errors arrive as exceptions
    if graph.name.startswith("vision"):
        # Fold DequantizeLinear into the convolution weights at load; left alone, it would run before every convolution of every picture.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        # One kernel for DequantizeLinear + MatMul, activations quantised to int8 by block: what AVX-VNNI and ARM dot products are for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")  # for scales a channel; blocked ones keep theirs
    return options


_arena_is_shared = False


def share_arena() -> None:
    """One CPU arena for all sessions that are made from now on, which grows by what is asked for instead of by powers of two.

    onnxruntime has one environment per process, and what is registered there stays: this is for a program that asks for it, such as the
    commands. Without it every session has an arena of its own. Measured on vision in INT8 at 1024 px with 2 threads: 1,111 MB after a run
    instead of 1,381, and no slower.
    """
    global _arena_is_shared
    if _arena_is_shared:
        return
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    with contextlib.suppress(Exception):  # versions that take only one: the program around us has its own
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(as_requested))
    _arena_is_shared = True


@dataclass(frozen=True)
class Setup:
    """What both graphs of a model directory need to be loaded."""

    directory: Path
    manifest: Manifest
    """With the types of the graphs that are run, see `on_device`."""
    threads: int
    cuda: bool

    def load(self, part: str) -> tuple[Path, ort.InferenceSession]:
        """Load `vision` or `decoder`; the graph's path and its session. Raises FastVLMError where onnxruntime refuses it."""
        path = self.directory / graph_name(part, self.manifest, self.cuda)
        return path, load(path, session_options(path, self.threads), providers(self.cuda))

    @property
    def description(self) -> str:
        """Library, version, device and threads."""
        return f"onnxruntime {ort.__version__}, {'CUDA' if self.cuda else 'CPU'}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def on_device(directory: Path, manifest: Manifest, *, cuda: bool = False, threads: int | None = None) -> Setup:
    """Choose the graphs to run: on the CPU those made for it, which compute in FP32, where there are such."""
    if graph_name("decoder", manifest, cuda).endswith(_CPU_GRAPH):
        manifest = replace(manifest, decoder=replace(manifest.decoder, dtype="float32"))
    return Setup(directory, manifest, threads or available_threads(), cuda)


def graph_name(part: str, manifest: Manifest, cuda: bool) -> str:
    """The file to run for `vision` or `decoder`: on the CPU the one made for it, where there is one."""
    twin = part + _CPU_GRAPH
    return twin if twin in manifest.files and not cuda else f"{part}.onnx"


def providers(cuda: bool) -> list[str]:
    """Execution providers in order of preference. Raises FastVLMError where CUDA is asked for and not built in."""
    if not cuda:
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise FastVLMError("this onnxruntime has no CUDA support; install onnxruntime-gpu, or use --backend ort")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def ort_value(array: NDArray[Any], dtype: str) -> Any:
    """An OrtValue over the array's own memory, which the caller keeps alive."""
    if not array.flags.c_contiguous:
        raise ValueError("onnxruntime would copy an array that is not contiguous")
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def load(path: Path, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    """A session of the graph at `path`. Raises FastVLMError where onnxruntime refuses it."""
    if not path.is_file():
        raise FastVLMError(f"{path} is missing; copy the whole model directory, or convert the checkpoint again")
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        _refuse(error, f"{path} could not be loaded", "copy the model directory again, or convert the checkpoint again")
    if session.get_providers()[0] != providers[0]:
        raise FastVLMError(f"onnxruntime could not start {providers[0]}; check the GPU driver and CUDA libraries, or use --backend ort")
    return session


def run(session: ort.InferenceSession, binding: Any, graph: str) -> None:
    """Run once. Raises FastVLMError that names `graph` where onnxruntime fails."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        _refuse(error, f"onnxruntime failed in {graph}", "convert the checkpoint again, with another --precision if this repeats")


def _refuse(error: Exception, what: str, remedy: str) -> NoReturn:
    """Turn an exception of onnxruntime, whose classes share no base, into one sentence."""
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "Failed to allocate memory" in reason or "bad_alloc" in reason:
        raise FastVLMError(f"{what}: not enough memory; close other programs, or convert with --precision int4") from error
    if type(error).__name__ == "NotImplemented":
        remedy = "convert the checkpoint with --precision fp32, int8 or int4, or update onnxruntime"
    shown = reason if len(reason) <= 300 else reason[:297] + "..."
    raise FastVLMError(f"{what}: {shown or type(error).__name__}; {remedy}") from error


def check_tensors(path: Path, tensors: Any, wanted: dict[str, str]) -> None:
    """Compare names and types of a graph's inputs or outputs with what its manifest promises."""
    found = {tensor.name: DTYPES.get(tensor.type, tensor.type) for tensor in tensors}
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            raise FastVLMError(
                f"{path} does not belong to its manifest: tensor {name} is {found.get(name, 'missing')}, expected "
                f"{wanted.get(name, 'none of that name')}; convert the checkpoint again with this version"
            )
