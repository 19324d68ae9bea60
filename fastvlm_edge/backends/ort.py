"""onnxruntime backend: the reference on a plain CPU, and on an NVIDIA GPU where onnxruntime was built for one.

Every tensor is bound once (IOBinding): the decoder reads the cache where it lies and writes into buffers that are kept between steps, so a
decode step costs Python a few small writes and one strided copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.backends import ImageFeatures, StepOutput
from fastvlm_edge.dtypes import from_float32, storage, to_float32
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.kv_cache import KVCache
from fastvlm_edge.manifest import Manifest
from fastvlm_edge.progress import Progress, SilentProgress

_ONNX_BFLOAT16 = 16
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}
_CPU_GRAPH = ".cpu.onnx"
_KEPT_SEQ = 16
"""Bindings of calls up to this long (decoding, drafts) are kept; a prefill chunk's are made for the call."""


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
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 2 if os.environ.get("FASTVLM_EDGE_DEBUG") else 4  # its errors arrive as exceptions
    if graph.name.startswith("vision"):
        # Fold DequantizeLinear into the convolution weights at load; left alone, it would run before every convolution of every picture.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        # One kernel for DequantizeLinear + MatMul, activations quantised to int8 by block: what AVX-VNNI and ARM dot products are for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")  # for scales a channel; blocked ones keep theirs
    return options


def _graph_path(directory: Path, part: str, manifest: Manifest, cuda: bool) -> Path:
    """The graph to run: on the CPU the one made for it, where the plan has a type that onnxruntime lacks there (BF16)."""
    twin = part + _CPU_GRAPH
    return directory / (twin if twin in manifest.files and not cuda else f"{part}.onnx")


@dataclass(frozen=True, eq=False)
class HostFeatures:
    """Features of one picture in host memory, in the decoder's type."""

    data: NDArray[Any]
    dtype: str

    @property
    def rows(self) -> int:
        """How many visual tokens."""
        return int(self.data.shape[0])

    def numpy(self) -> NDArray[np.float32]:
        """A copy: [rows, hidden]."""
        return np.array(to_float32(self.data, self.dtype))


@dataclass(eq=False)
class _Call:
    """A binding of the decoder for one (seq, m), with the buffers it reads and writes."""

    binding: Any
    input_ids: NDArray[np.int64]  # [1, seq]
    position_ids: NDArray[np.int64]  # [1, seq]
    logit_positions: NDArray[np.int64]  # [1, m]
    kv_new: NDArray[Any]  # [layers, 2, 1, kv_heads, seq, head_dim]
    top_values: NDArray[Any]  # [1, m, candidates]
    top_ids: NDArray[np.int64]  # [1, m, candidates]
    logits: NDArray[Any] | None  # [1, m, vocab]


class OrtBackend:
    """Implements `fastvlm_edge.backends.Backend`."""

    def __init__(
        self, directory: Path, manifest: Manifest, *, cuda: bool = False, threads: int | None = None, progress: Progress | None = None
    ) -> None:
        """Load both graphs, at the same time. Raises FastVLMError where onnxruntime refuses them."""
        progress = progress or SilentProgress()
        threads = threads or available_threads()
        providers = _providers(cuda)
        self.name = "ort-cuda" if cuda else "ort"
        self.description = f"onnxruntime {ort.__version__}, {'CUDA' if cuda else 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"
        paths = [_graph_path(directory, part, manifest, cuda) for part in ("vision", "decoder")]
        if any(path.name.endswith(_CPU_GRAPH) for path in paths):
            vision, decoder = replace(manifest.vision, dtype="float32"), replace(manifest.decoder, dtype="float32")
            manifest = replace(manifest, vision=vision, decoder=decoder)
        self._manifest = manifest
        progress.stage(f"loading {manifest.name} ({manifest.precision})", 2)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(_load, path, session_options(path, threads), providers) for path in paths]
            sessions = []
            for job in jobs:
                sessions.append(job.result())
                progress.advance()
        progress.done()
        self._vision, self._decoder = sessions
        self._output_types = _check_contract(paths, manifest, self._vision, self._decoder)
        spec = manifest.decoder
        self._cache = KVCache(layers=spec.layers, kv_heads=spec.kv_heads, head_dim=spec.head_dim, context=spec.context, dtype=spec.dtype)
        self._no_picture = np.zeros((1, spec.hidden), dtype=storage(spec.dtype))
        self._pictures: tuple[ImageFeatures, ...] = ()
        self._features = self._no_picture
        self._shared_inputs: list[tuple[str, Any]] | None = None
        self._calls: dict[tuple[int, int, bool], _Call] = {}

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._cache.length

    def encode(self, pixel_values: NDArray[np.float32]) -> HostFeatures:
        """pixel_values [1, 3, S, S] -> features [tokens, hidden]."""
        vision, decoder = self._manifest.vision, self._manifest.decoder
        expected = (1, 3, vision.image_size, vision.image_size)
        if pixel_values.shape != expected:
            raise FastVLMError(f"pixel_values have shape {list(pixel_values.shape)}; this model takes {list(expected)}")
        pixels = np.ascontiguousarray(from_float32(pixel_values, vision.dtype))
        features = np.empty((1, vision.tokens, vision.hidden), dtype=storage(vision.dtype))
        binding = self._vision.io_binding()
        binding.bind_ortvalue_input("pixel_values", _ort_value(pixels, vision.dtype))
        binding.bind_ortvalue_output("image_features", _ort_value(features, vision.dtype))
        _run(self._vision, binding, "the vision graph")
        rows = features[0]
        if vision.dtype != decoder.dtype:
            rows = from_float32(to_float32(rows, vision.dtype), decoder.dtype)
        return HostFeatures(rows, decoder.dtype)

    def step(
        self,
        input_ids: Sequence[int],
        pictures: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` after what the cache holds, and append to it."""
        seq, start = len(input_ids), self._cache.length
        if start + seq > self._cache.context:
            raise FastVLMError(f"{start + seq} positions do not fit into the context of {self._cache.context}; shorten the conversation")
        positions = (seq - 1,) if logit_positions is None else logit_positions
        self._show(pictures)
        call = self._call(seq, len(positions), want_logits)
        call.input_ids[0] = input_ids
        call.position_ids[0] = range(start, start + seq) if seq < _KEPT_SEQ else np.arange(start, start + seq)
        call.logit_positions[0] = positions
        _run(self._decoder, call.binding, "the decoder graph")
        if self._cache.append(call.kv_new, start):
            self._forget_bindings()
        types = self._output_types
        return StepOutput(
            top_values=to_float32(call.top_values[0], types["top_values"]),
            top_ids=call.top_ids[0],
            logits=None if call.logits is None else to_float32(call.logits[0], types["logits"]),
        )

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self._cache.truncate(length)

    def reset(self) -> None:
        """Forget all positions, and give back the memory of a long conversation."""
        if self._cache.reset():
            self._forget_bindings()

    def close(self) -> None:
        """Give back sessions, cache and buffers."""
        self._forget_bindings()
        self._features = self._no_picture
        del self._vision, self._decoder, self._cache

    def _show(self, pictures: tuple[ImageFeatures, ...]) -> None:
        """Make `pictures` the rows of image_features, unless they are already."""
        if len(pictures) == len(self._pictures) and all(new is old for new, old in zip(pictures, self._pictures, strict=True)):
            return
        spec = self._manifest.decoder
        hosts = [picture for picture in pictures if isinstance(picture, HostFeatures)]
        if len(hosts) < len(pictures) or any((host.dtype, host.data.shape[1]) != (spec.dtype, spec.hidden) for host in hosts):
            raise FastVLMError("image features come from another model or backend; encode the picture again with this one")
        self._features = np.concatenate([host.data for host in hosts]) if hosts else self._no_picture
        self._pictures = pictures
        self._forget_bindings()

    def _forget_bindings(self) -> None:
        self._calls.clear()
        self._shared_inputs = None

    def _call(self, seq: int, m: int, want_logits: bool) -> _Call:
        key = (seq, m, want_logits)
        call = self._calls.get(key)
        if call is None:
            call = self._bind(seq, m, want_logits)
            if seq <= _KEPT_SEQ:
                self._calls[key] = call
        return call

    def _bind(self, seq: int, m: int, want_logits: bool) -> _Call:
        spec, types = self._manifest.decoder, self._output_types
        if self._shared_inputs is None:
            views = [*self._cache.views(), ("image_features", self._features)]
            self._shared_inputs = [(name, _ort_value(view, spec.dtype)) for name, view in views]
        call = _Call(
            binding=self._decoder.io_binding(),
            input_ids=np.empty((1, seq), np.int64),
            position_ids=np.empty((1, seq), np.int64),
            logit_positions=np.empty((1, m), np.int64),
            kv_new=np.empty((spec.layers, 2, 1, spec.kv_heads, seq, spec.head_dim), storage(spec.dtype)),
            top_values=np.empty((1, m, spec.candidates), storage(types["top_values"])),
            top_ids=np.empty((1, m, spec.candidates), np.int64),
            logits=np.empty((1, m, spec.vocab), storage(types["logits"])) if want_logits else None,
        )
        for name, value in self._shared_inputs:
            call.binding.bind_ortvalue_input(name, value)
        for name in ("input_ids", "position_ids", "logit_positions"):
            call.binding.bind_ortvalue_input(name, _ort_value(getattr(call, name), "int64"))
        for name in ("kv_new", "top_values", "top_ids", *(("logits",) if want_logits else ())):
            call.binding.bind_ortvalue_output(name, _ort_value(getattr(call, name), types[name]))
        return call


def _providers(cuda: bool) -> list[str]:
    if not cuda:
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise FastVLMError("this onnxruntime has no CUDA support; install onnxruntime-gpu, or use --backend ort")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _ort_value(array: NDArray[Any], dtype: str) -> Any:
    """An OrtValue over the array's own memory, which the caller keeps alive."""
    if not array.flags.c_contiguous:
        raise ValueError("onnxruntime would copy an array that is not contiguous")
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _load(path: Path, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    if not path.is_file():
        raise FastVLMError(f"{path} is missing; copy the whole model directory, or convert the checkpoint again")
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        _refuse(error, f"{path} could not be loaded", "copy the model directory again, or convert the checkpoint again")
    if session.get_providers()[0] != providers[0]:
        raise FastVLMError(f"onnxruntime could not start {providers[0]}; check the GPU driver and CUDA libraries, or use --backend ort")
    return session


def _run(session: ort.InferenceSession, binding: Any, graph: str) -> None:
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


def _check_contract(paths: list[Path], manifest: Manifest, vision: Any, decoder: Any) -> dict[str, str]:
    """Compare names and types of the graphs with the manifest; the types of the decoder's outputs by name."""
    spec = manifest.decoder
    past = {f"past_key_values.{layer}.{part}": spec.dtype for layer in range(spec.layers) for part in ("key", "value")}
    wanted = {"input_ids": "int64", "position_ids": "int64", "logit_positions": "int64", "image_features": spec.dtype, **past}
    _check_tensors(paths[0], vision.get_inputs(), {"pixel_values": manifest.vision.dtype})
    _check_tensors(paths[0], vision.get_outputs(), {"image_features": manifest.vision.dtype})
    _check_tensors(paths[1], decoder.get_inputs(), wanted)
    found = {tensor.name: _DTYPES.get(tensor.type, tensor.type) for tensor in decoder.get_outputs()}
    outputs = {"kv_new": spec.dtype, "top_ids": "int64"} | {name: found.get(name, "float32") for name in ("top_values", "logits")}
    _check_tensors(paths[1], decoder.get_outputs(), outputs)
    return outputs


def _check_tensors(path: Path, tensors: Any, wanted: dict[str, str]) -> None:
    found = {tensor.name: _DTYPES.get(tensor.type, tensor.type) for tensor in tensors}
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            raise FastVLMError(
                f"{path} does not belong to its manifest: tensor {name} is {found.get(name, 'missing')}, expected "
                f"{wanted.get(name, 'none of that name')}; convert the checkpoint again with this version"
            )
