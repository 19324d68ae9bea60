"""A stand-in for a TensorRT engine: it computes with onnxruntime in the memory of `FakeCuda` or of the stand-in for libcuda.so.1.

The file of a fake engine is JSON: the ONNX graph that it runs, and the smallest and largest shapes of its profiles. A context asserts what
NVIDIA documents: nothing runs before shapes and addresses are set, shapes are within the profile in use, addresses are aligned, a new shape
runs once before it is captured, and nothing is used after it was closed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.backends import load_engines
from fastvlm_edge.backends.dtypes import storage
from fastvlm_edge.backends.ort_session import DTYPES, ort_value
from fastvlm_edge.backends.protocol import LOGIT_POSITIONS
from fastvlm_edge.backends.tensorrt import Platform
from fastvlm_edge.engines.profiles import static_profiles
from fastvlm_edge.model_dir.engine_record import ENGINES, EngineRecord, onnx_hashes
from fastvlm_edge.model_dir.manifest import FileRecord, read_manifest, sha256, visual_tokens
from fastvlm_edge.nvidia.tensorrt_library import Context, LoadedEngine
from tests.support.fake_cuda import FakeCuda, Range

VERSION = "10.3.0"
CHUNK = 48
"""Most ids per call of an engine that takes calls of any size: fewer than the product's, so that short tests have several calls."""
POSITIONS = LOGIT_POSITIONS
Sizes = tuple[int, int]
"""Smallest and largest."""


class Device(Protocol):
    """What fake engines need of CUDA; `FakeCuda` describes the methods."""

    def allocate(self, nbytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def memory(self, address: int, nbytes: int) -> NDArray[np.uint8]: ...

    def enqueue(self, stream: int, run: Callable[[], object], *, name: str = ..., uses: Sequence[Range] = ...) -> None: ...

    def is_capturing(self, stream: int) -> bool: ...


@functools.lru_cache(maxsize=16)
def _session(graph: Path, _modified: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # more only wait, because the graphs are tiny
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class FakeEngine(LoadedEngine):
    """Overrides everything of `LoadedEngine`."""

    def __init__(self, path: Path, cuda: Device) -> None:
        document = json.loads(path.read_text())
        self.cuda, self.path, self.document = cuda, path, document
        graph = path.parents[2] / document["onnx"]
        self.session = _session(graph, graph.stat().st_mtime_ns)
        self.inputs = {tensor.name: DTYPES[tensor.type] for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: DTYPES[tensor.type] for tensor in self.session.get_outputs()}
        self.weights = cuda.allocate(max(document["weights"], 1))
        self.restored: bytes | None = None
        self.on_host: list[str] = []
        self.open = True
        self.contexts: list[FakeContext] = []

    @property
    def profiles(self) -> int:
        return len(self.document["shapes"])

    @property
    def scratch_bytes(self) -> int:
        return int(self.document["scratch"])

    def largest(self, name: str, profile: int = 0) -> tuple[int, ...]:
        return tuple(self.document["shapes"][profile][name][1])

    @property
    def captures_itself(self) -> bool:
        return bool(self.document["rtx"])

    def restore_kernels(self, cache: bytes) -> None:
        self.restored = cache

    def compiled_kernels(self) -> bytes:
        return b"kernels of " + self.document["onnx"].encode() if self.document["kernels"] else b""

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: int, *, captured: bool) -> FakeContext:
        assert self.open, "the engine was closed"
        assert 0 <= profile < self.profiles, f"there is no profile {profile}"
        assert scratch_bytes >= self.scratch_bytes, f"{scratch_bytes} bytes of scratch memory, {self.scratch_bytes} are needed"
        assert scratch % 256 == 0, f"scratch memory at {scratch:#x} is not aligned"
        self.contexts.append(FakeContext(self, profile, scratch, captured))
        return self.contexts[-1]

    def close(self) -> None:
        assert all(context.closed for context in self.contexts), "the engine was closed before its contexts"
        self.open = False
        self.cuda.free(self.weights)


class FakeContext(Context):
    """Overrides everything of `Context`. It fails if a graph is launched after its context was changed."""

    def __init__(self, engine: FakeEngine, profile: int, scratch: int, captured: bool) -> None:
        self.engine, self.profile, self.scratch, self.captured = engine, profile, scratch, captured
        self.waits_for_kernels = engine.waits_for_kernels
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = 0
        self.has_run = False
        """Whether a run followed the last change of a shape."""
        self.closed = False

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert not self.closed, "the context was closed"
        least, most = self.engine.document["shapes"][self.profile][name]
        fits = len(shape) == len(most) and all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        assert fits, f"{name} of shape {list(shape)} is outside profile {self.profile}: {least} to {most}"
        self.changes += 1
        if self.shapes.get(name) != tuple(shape):
            self.has_run = False
        self.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        assert not self.closed, "the context was closed"
        assert name in self.engine.inputs or name in self.engine.outputs, name
        assert address % 256 == 0, f"{name} at {address:#x} is not aligned"
        self.changes += 1
        self.addresses[name] = address

    def close(self) -> None:
        self.closed = True
        self.addresses.clear()

    def enqueue(self, stream: int) -> None:
        """Queue the run with the shapes and addresses of now."""
        engine, cuda = self.engine, self.engine.cuda
        assert not self.closed, "the context was closed"
        assert set(self.shapes) == set(engine.inputs), "an input has no shape"
        assert set(self.addresses) == {*engine.inputs, *engine.outputs}, "a tensor has no address"
        if cuda.is_capturing(stream):
            assert self.captured, "this context was not made for graphs"
            assert not engine.captures_itself, "the library captures this work itself"
            assert self.has_run, "a new shape was captured before it ran once"
        self.has_run = True
        shapes, addresses, changes = dict(self.shapes), dict(self.addresses), self.changes
        outputs = self._output_shapes(shapes)
        spans = {name: self._nbytes(name, shape) for name, shape in {**shapes, **outputs}.items()}

        def run() -> None:
            assert not self.closed, "a graph was replayed after its context was closed"
            assert self.changes == changes, "a graph was replayed after its context had changed"
            feeds = {name: self._value(name, addresses[name], shape) for name, shape in shapes.items()}
            fetched = {name: self._value(name, addresses[name], shape) for name, shape in outputs.items()}
            binding = engine.session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in fetched.items():
                binding.bind_ortvalue_output(name, value)
            engine.session.run_with_iobinding(binding)
            cuda.memory(self.scratch, max(engine.scratch_bytes, 1)).fill(0x5C)  # it is scratch

        uses = [(addresses[name], nbytes) for name, nbytes in spans.items()]
        cuda.enqueue(stream, run, name=f"{engine.path.stem} engine", uses=[*uses, (self.scratch, engine.scratch_bytes)])

    def _output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        known: dict[str, int] = {}
        for tensor in self.engine.session.get_inputs():
            known.update({size: value for size, value in zip(tensor.shape, shapes[tensor.name], strict=True) if isinstance(size, str)})
        if "size" in known:
            known["tokens"] = visual_tokens(known["size"])
        return {
            tensor.name: tuple(known[size] if isinstance(size, str) else size for size in tensor.shape)
            for tensor in self.engine.session.get_outputs()
        }

    def _dtype(self, name: str) -> str:
        return {**self.engine.inputs, **self.engine.outputs}[name]

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * storage(self._dtype(name)).itemsize

    def _value(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        memory = self.engine.cuda.memory(address, self._nbytes(name, shape))
        return ort_value(memory.view(storage(self._dtype(name))).reshape(shape), self._dtype(name))


def fake_platform(cuda: FakeCuda, *, library: str = "tensorrt", version: str = VERSION) -> Platform:
    """The result of `open_platform` on a machine with that GPU."""
    return Platform(cuda, library, version, lambda path: FakeEngine(path, cuda))


@contextmanager
def fake_gpu(cuda: FakeCuda, *, library: str = "tensorrt", version: str = VERSION) -> Iterator[None]:
    """Within this block the machine has `cuda` and a fake TensorRT: `load_engines`, `select` and `FastVLM.load` find them."""
    platform = fake_platform(cuda, library=library, version=version)
    with mock.patch.object(load_engines, "open_platform", return_value=platform):
        yield


def build_engines(
    model: Path,
    *,
    target: str = "sm87",
    profiles: int = 1,
    static: Sequence[int] = (),
    max_batch: int = 1,
    verified: bool = True,
    kernels: bool = False,
    weights: int = 1,
    **changes: Any,
) -> Path:
    """Write `engines/<target>/` of fake engines into a model directory and return it.

    `static` are the capacities of static engines. `max_batch` is the largest number of conversations in a call; with two profiles, in
    one of the second. `changes` are fields of the record.
    """
    manifest = read_manifest(model)
    decoder, vision = manifest.decoder, manifest.vision

    def shapes(batch: int, ids: Sizes, positions: Sizes, rows: Sizes, capacities: Sizes) -> dict[str, Any]:
        batches = (1, batch)
        cache = [(size, decoder.kv_heads, capacity, decoder.head_dim) for size, capacity in zip(batches, capacities, strict=True)]
        return {
            "input_ids": list(zip(batches, ids, strict=True)),
            "position_ids": list(zip(batches, ids, strict=True)),
            "logit_positions": list(zip(batches, positions, strict=True)),
            "image_features": [(count, decoder.hidden) for count in rows],
            **{f"past_key_values.{n}.{part}": cache for n in range(decoder.layers) for part in ("key", "value")},
        }

    engines: dict[str, list[dict[str, Any]]] = {"vision": [{"pixel_values": [(1, 3, size, size)] * 2} for size in vision.every_size]}
    for part, (profile,) in static_profiles(manifest, static).items():
        engines[part] = [{name: [smallest, largest] for name, (smallest, _, largest) in profile.items()}]
    if not static:
        sizes = (128, -(-decoder.context // 512) * 512)
        prefill = shapes(max_batch if profiles == 1 else 1, (1, CHUNK), (1, POSITIONS), (1, decoder.context), sizes)
        engines["decoder"] = [prefill, shapes(max_batch, (1, POSITIONS), (1, POSITIONS), (1, 1), sizes)][:profiles]
    directory = model / ENGINES / target
    directory.mkdir(parents=True)
    files = {}
    for part, ranges in engines.items():
        path = directory / f"{part}.engine"
        document = {"onnx": f"{part.partition('.')[0]}.onnx", "shapes": ranges, "scratch": 4096, "kernels": kernels, "weights": weights}
        path.write_text(json.dumps({**document, "rtx": changes.get("library") == "tensorrt_rtx"}))
        files[path.name] = FileRecord(sha256(path), path.stat().st_size)
    record = EngineRecord(
        target=target,
        library="tensorrt",
        version=VERSION,
        compute_capabilities=[[8, 7]],
        device="",
        flags={},
        onnx=onnx_hashes(manifest),
        files=files,
        profiles={},
        build={},
        parity={"device": "Fake GPU", "compute_capability": [8, 7]} if verified else {},
    )
    replace(record, **changes).write(directory)
    return directory
