"""onnxruntime sessions for the two graphs: options, loading, running, and its errors as FastVLMError."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np  # noqa: F401 - before onnxruntime, which prints a traceback if numpy is broken
import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.probe import usable_cores
from fastvlm_edge.model_dir.manifest import Manifest, links_outside

ONNX_BFLOAT16 = 16
Provider = str | tuple[str, dict[str, str]]
"""Name of an execution provider, or name and options."""
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}
_CPU_GRAPH = ".cpu.onnx"
CUDA_DECODER = "decoder.cuda.onnx"
CUDA_OPTIONS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
}
"""Options of the CUDA provider. Its arena would grow by powers of two, and it would time every algorithm of every convolution at the first
picture, which takes long and needs the largest of their workspaces."""
ACCURACY_LEVEL = 4
"""Of MatMulNBits: it rounds its inputs to 8 bits in blocks, and multiplies integers."""
INT8_BLOCK = 128
"""Inputs that it rounds together where a matrix has per-channel scales; per-block scales decide it themselves."""
SPIN_MICROSECONDS = 500
"""How long an idle thread spins before it sleeps. It is longer than the pause between two calls of the decoder, so that decoding need not
wake threads. With onnxruntime's default (-1, tens of milliseconds), the threads of one graph take the cores from those of the other.
Versions before 1.26, such as the last one for Python 3.10, ignore this setting."""


def available_threads() -> int:
    """Number of CPU cores that this process may use, by its affinity and the quota of its container (cgroup v2 cpu.max)."""
    cores = usable_cores()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # the file does not exist, or says "max"
    return cores


def session_options(graph: Path, threads: int) -> ort.SessionOptions:
    """Options for running a graph, `vision*.onnx` or `decoder*.onnx`. All tuning of onnxruntime is here."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1" if _arena_is_shared else "0")
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    options.log_severity_level = 2 if os.environ.get("FASTVLM_EDGE_DEBUG") else 4  # errors are raised as exceptions
    if graph.name.startswith("vision"):
        # Fold DequantizeLinear into the convolution weights at load. By default it would run before every convolution of every picture.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        # One kernel for DequantizeLinear + MatMul, with activations quantised to int8 per block: it uses AVX-VNNI and ARM dot products.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(ACCURACY_LEVEL))
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", str(INT8_BLOCK))  # per-block scales keep their own size
        # Arm's own kernels of INT4 products round a whole row of inputs together, to which no certificate of a conversion applies.
        options.add_session_config_entry("mlas.disable_kleidiai", "1")
    return options


_arena_is_shared = False


def share_arena() -> None:
    """Let all sessions created from now on share one CPU arena, which grows by the size requested instead of by powers of two.

    onnxruntime has one environment per process, and an allocator registered there stays until the process ends. That is why only programs
    that ask for it do this, such as the commands. Otherwise each session has its own arena. Measured with the INT8 encoder at 1024 px and
    2 threads: 1,111 MB after a run instead of 1,381 MB, and no slower.
    """
    global _arena_is_shared
    if _arena_is_shared:
        return
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    with contextlib.suppress(Exception):  # versions that accept only one: the program has registered its own
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(as_requested))
    _arena_is_shared = True


@dataclass(frozen=True)
class Setup:
    """What it takes to load both graphs of a model directory."""

    directory: Path
    manifest: Manifest
    """With the types of the graphs that run, see `on_device`."""
    threads: int
    cuda: bool
    slots: int = 1
    """Most conversations in the cache."""

    def load(self, part: str) -> tuple[Path, ort.InferenceSession]:
        """Load `vision` or `decoder`; returns the path of the graph and its session. Raises FastVLMError if onnxruntime refuses it."""
        path = self.directory / graph_name(part, self.manifest, self.cuda)
        return path, load(path, session_options(path, self.threads), providers(self.cuda))

    @property
    def description(self) -> str:
        """Library, version, device and threads, as text for users."""
        return f"onnxruntime {ort.__version__}, {'CUDA' if self.cuda else 'CPU'}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def on_device(directory: Path, manifest: Manifest, *, cuda: bool = False, threads: int | None = None, slots: int = 1) -> Setup:
    """Choose the graphs to run. On the CPU these are `*.cpu.onnx`, which compute in FP32, if the model directory has them.

    Raises FastVLMError if it has no decoder for the CUDA provider.
    """
    if cuda and CUDA_DECODER not in manifest.files:
        what = f"{directory} has no {CUDA_DECODER}, which --backend ort-cuda needs: it was converted with --precision {manifest.precision}"
        raise FastVLMError(what, "convert the checkpoint again with this version and --precision int4, int8, fp16 or bf16")
    if graph_name("decoder", manifest, cuda).endswith(_CPU_GRAPH):
        manifest = replace(manifest, decoder=replace(manifest.decoder, dtype="float32"))
    return Setup(directory, manifest, threads or available_threads(), cuda, slots)


def graph_name(part: str, manifest: Manifest, cuda: bool) -> str:
    """Name of the graph file for `vision` or `decoder`: the one made for the provider, if there is one.

    The CUDA provider has no INT8 convolutions, so it takes the encoder without quantised activations.
    """
    preferred = (CUDA_DECODER, "vision.float-inputs.onnx") if cuda else (part + _CPU_GRAPH,)
    return next((name for name in preferred if name.startswith(part) and name in manifest.files), f"{part}.onnx")


def has_cuda() -> bool:
    """Whether the installed onnxruntime has the CUDA provider; a GPU may still be missing."""
    return "CUDAExecutionProvider" in ort.get_available_providers()


def providers(cuda: bool) -> list[Provider]:
    """Execution providers in order of preference. Raises FastVLMError if CUDA is requested and this onnxruntime lacks it."""
    if not cuda:
        return ["CPUExecutionProvider"]
    if not has_cuda():
        raise FastVLMError(
            "the installed onnxruntime has no CUDA support", "run: fastvlm-edge doctor, which says how to install it, or use --backend ort"
        )
    _load_cuda_libraries()
    return [("CUDAExecutionProvider", CUDA_OPTIONS), "CPUExecutionProvider"]


def _load_cuda_libraries() -> None:
    """Load cuBLAS and cuDNN where pip has installed them; onnxruntime finds only those of the system. It prints what it does not find."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def ort_value(array: NDArray[Any], dtype: str) -> Any:
    """An OrtValue that shares the memory of the array, which the caller must keep alive."""
    if not array.flags.c_contiguous:
        raise ValueError("the array is not contiguous, so onnxruntime would copy it")
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def load(path: Path, options: ort.SessionOptions, providers: list[Provider]) -> ort.InferenceSession:
    """Create a session for the graph at `path`. Raises FastVLMError if onnxruntime refuses it."""
    if not path.is_file():
        raise FastVLMError(f"{path} is missing", "copy the whole model directory, or convert the checkpoint again")
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        mend = "copy the model directory again, or convert the checkpoint again"
        if links := links_outside(path.parent):
            mend = f"{links[0].name} is a link to a file outside it, which some versions refuse: run: cp -rL {path.parent} NEW, and use NEW"
        refuse(error, f"{path} could not be loaded", mend)
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise FastVLMError(f"onnxruntime could not start {wanted}", "check the GPU driver and CUDA libraries, or use --backend ort")
    return session


def run(session: ort.InferenceSession, binding: Any, graph: str) -> None:
    """Run once. Raises FastVLMError, which names `graph`, if onnxruntime fails."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        refuse(error, f"onnxruntime failed in {graph}", "convert the checkpoint again, with another --precision if this repeats")


def lacks_memory(error: Exception) -> bool:
    """Whether an exception of onnxruntime says that memory was short, of the host or of the GPU."""
    reason = str(error)
    return isinstance(error, MemoryError) or any(words in reason for words in ("Failed to allocate memory", "bad_alloc", "out of memory"))


def refuse(error: Exception, what: str, mend: str) -> NoReturn:
    """Turn an exception of onnxruntime, whose classes have no common base, into a FastVLMError."""
    reason = " ".join(str(error).split())
    if lacks_memory(error):
        raise FastVLMError(f"{what}: not enough memory", "close other programs, or convert with --precision int4") from error
    if type(error).__name__ == "NotImplemented":
        mend = "convert the checkpoint with --precision fp32, int8 or int4, or update onnxruntime"
    shown = reason if len(reason) <= 300 else reason[:297] + "..."
    raise FastVLMError(f"{what}: {shown or type(error).__name__}", mend) from error


def check_shapes(path: Path, tensors: Any, wanted: dict[str, tuple[int | None, ...]]) -> None:
    """Compare shapes of inputs or outputs of a graph with the manifest; None is any size. Raises FastVLMError for the first difference.

    A size that is not the graph's own would not always fail: with another `vocab`, ids stand for other tokens and visual tokens.
    """
    for tensor in tensors:
        sizes = wanted.get(tensor.name)
        if sizes is None:
            continue
        differ = any(size is not None and isinstance(own, int) and own != size for own, size in zip(tensor.shape, sizes))  # noqa: B905
        if differ or len(tensor.shape) != len(sizes):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise FastVLMError(
                f"{path} does not match its manifest: tensor {tensor.name} has shape {tensor.shape}, expected [{expected}]",
                "copy the model directory again, or convert the checkpoint again",
            )


def check_tensors(path: Path, tensors: Any, wanted: dict[str, str]) -> None:
    """Compare names and types of the inputs or outputs of a graph with the manifest. Raises FastVLMError for the first difference."""
    found = {tensor.name: DTYPES.get(tensor.type, tensor.type) for tensor in tensors}
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            raise FastVLMError(
                f"{path} does not match its manifest: tensor {name} is {found.get(name, 'missing')}, expected "
                f"{wanted.get(name, 'no such tensor')}",
                "convert the checkpoint again with this version",
            )
