"""A stand-in for a TensorRT engine: it computes with onnxruntime in the memory of `FakeCuda`, so that the backend runs without a GPU.

The file of a fake engine is JSON: the ONNX graph that it runs, and the largest shapes of its profiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort

from fastvlm_edge.backends import load_engines
from fastvlm_edge.backends.dtypes import storage
from fastvlm_edge.backends.ort_session import DTYPES, ort_value
from fastvlm_edge.backends.tensorrt import Platform
from fastvlm_edge.model_dir.engine_record import ENGINES, EngineRecord, onnx_hashes
from fastvlm_edge.model_dir.manifest import FileRecord, read_manifest, sha256
from fastvlm_edge.nvidia.tensorrt_library import Context, LoadedEngine
from tests.support.fake_cuda import FakeCuda

VERSION = "10.3.0"
CHUNK, POSITIONS = 48, 16


class FakeEngine(LoadedEngine):
    """Overrides everything of `LoadedEngine`."""

    def __init__(self, path: Path, cuda: FakeCuda) -> None:
        document = json.loads(path.read_text())
        self.cuda, self.path, self.document = cuda, path, document
        self.session = ort.InferenceSession(path.parents[2] / document["onnx"], providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: DTYPES[tensor.type] for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: DTYPES[tensor.type] for tensor in self.session.get_outputs()}
        self.weights = cuda.allocate(max(document["weights"], 1))
        self.restored: bytes | None = None

    @property
    def profiles(self) -> int:
        return len(self.document["largest"])

    @property
    def scratch_bytes(self) -> int:
        return int(self.document["scratch"])

    def largest(self, name: str, profile: int = 0) -> tuple[int, ...]:
        return tuple(self.document["largest"][profile][name])

    def restore_kernels(self, cache: bytes) -> None:
        self.restored = cache

    def compiled_kernels(self) -> bytes:
        return b"kernels of " + self.document["onnx"].encode() if self.document["kernels"] else b""

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: int, *, captured: bool) -> FakeContext:
        assert 0 <= profile < self.profiles
        assert scratch_bytes >= self.scratch_bytes
        return FakeContext(self, profile, scratch, captured)

    def close(self) -> None:
        self.cuda.free(self.weights)


class FakeContext(Context):
    """Overrides everything of `Context`. It fails if a graph is launched after its context was changed."""

    def __init__(self, engine: FakeEngine, profile: int, scratch: int, captured: bool) -> None:
        self.engine, self.profile, self.scratch, self.captured = engine, profile, scratch, captured
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = 0

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        largest = self.engine.largest(name, self.profile)
        assert len(shape) == len(largest) and all(0 < size <= most for size, most in zip(shape, largest, strict=True)), (name, shape)
        self.changes += 1
        self.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        assert name in self.engine.inputs or name in self.engine.outputs, name
        assert address % 256 == 0, f"{name} at {address:#x} is not aligned"
        self.changes += 1
        self.addresses[name] = address

    def close(self) -> None:
        self.addresses.clear()

    def enqueue(self, stream: int) -> None:
        """Queue the run with the shapes and addresses of now."""
        engine, cuda = self.engine, self.engine.cuda
        shapes, addresses, changes = dict(self.shapes), dict(self.addresses), self.changes
        outputs = self._output_shapes(shapes)
        spans = {name: self._nbytes(name, shape) for name, shape in {**shapes, **outputs}.items()}
        assert set(shapes) == set(engine.inputs), "an input has no shape"
        assert set(addresses) == {*engine.inputs, *engine.outputs}, "a tensor has no address"

        assert self.captured or not cuda.is_capturing(stream), "this context was not made for graphs"

        def run() -> None:
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
    model: Path, *, target: str = "sm87", profiles: int = 1, verified: bool = True, kernels: bool = False, weights: int = 1, **changes: Any
) -> Path:
    """Write `engines/<target>/` of fake engines into a model directory and return it; `changes` are fields of the record."""
    manifest = read_manifest(model)
    decoder, vision = manifest.decoder, manifest.vision
    capacity = -(-decoder.context // 512) * 512
    cache = (1, decoder.kv_heads, capacity, decoder.head_dim)
    past = {f"past_key_values.{n}.{part}": cache for n in range(decoder.layers) for part in ("key", "value")}
    prefill = {"input_ids": (1, CHUNK), "position_ids": (1, CHUNK), "logit_positions": (1, POSITIONS), **past}
    prefill["image_features"] = (decoder.context, decoder.hidden)
    decode = {**prefill, "input_ids": (1, 1), "position_ids": (1, 1), "logit_positions": (1, 1)}
    pixels = {"pixel_values": (1, 3, vision.image_size, vision.image_size)}
    directory = model / ENGINES / target
    directory.mkdir(parents=True)
    files = {}
    for part, largest in (("vision", [pixels]), ("decoder", [prefill, decode][:profiles])):
        path = directory / f"{part}.engine"
        path.write_text(json.dumps({"onnx": f"{part}.onnx", "largest": largest, "scratch": 4096, "kernels": kernels, "weights": weights}))
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
        parity={"logits": {}} if verified else {},
    )
    replace(record, **changes).write(directory)
    return directory
