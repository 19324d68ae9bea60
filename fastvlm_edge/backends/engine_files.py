"""The engine files of a directory: which there are, loading and checking them, and the kernels that TensorRT for RTX compiled for them.

`decoder.engine` takes calls of any size. A build with `--static` writes `decoder.prefill.N.engine` and `decoder.decode.N.engine` instead,
two engines of fixed shapes for each capacity N of the KV cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.cuda import Cuda
from fastvlm_edge.nvidia.tensorrt_library import LoadedEngine

PREFILL, DECODE = "prefill", "decode"


def static_part(kind: str, capacity: int) -> str:
    """Name of a static engine of the decoder, without its suffix: `kind` is PREFILL or DECODE."""
    return f"decoder.{kind}.{capacity}"


class EngineFiles:
    """Loads the engines of a directory."""

    def __init__(self, directory: Path, manifest: Manifest, cuda: Cuda, load: Callable[[Path], LoadedEngine]) -> None:
        self._directory, self._manifest, self._cuda, self._load = directory, manifest, cuda, load
        self.capacities = sorted(int(path.name.split(".")[2]) for path in directory.glob("decoder.decode.*.engine"))
        """Of the static engines, in ascending order. Empty if the decoder is one engine."""

    def load(self, part: str) -> LoadedEngine:
        """Load `<part>.engine` onto the GPU. Raises FastVLMError if it does not fit the manifest."""
        path = self._directory / f"{part}.engine"
        engine = self._load(path)
        try:
            check_engine(path, engine, part.partition(".")[0], self._manifest)
            engine.restore_kernels(read_kernels(kernels_path(self._directory, part, self._cuda)))
        except BaseException:
            engine.close()
            raise
        return engine

    def save_kernels(self, part: str, engine: LoadedEngine) -> None:
        """Save the kernels compiled so far, if there are new ones. On a full or read-only disk, the next load only takes longer."""
        kernels = engine.compiled_kernels()
        path = kernels_path(self._directory, part, self._cuda)
        if kernels and kernels != read_kernels(path):
            with contextlib.suppress(OSError), whole_file(path) as partial:
                partial.write_bytes(kernels)

    def largest_bytes(self) -> int:
        """Size of the engine files that are loaded at the same time, at most."""
        sizes = {path.name: path.stat().st_size for path in self._directory.glob("*.engine")}
        vision = sizes.pop("vision.engine", 0)
        if not self.capacities:
            return vision + sum(sizes.values())
        pairs = [sum(sizes.get(f"{static_part(kind, capacity)}.engine", 0) for kind in (PREFILL, DECODE)) for capacity in self.capacities]
        return vision + max(pairs)


def kernels_path(directory: Path, part: str, cuda: Cuda) -> Path:
    """File with the compiled kernels of an engine for this kind of GPU; other GPUs cannot use them."""
    major, minor = cuda.device.compute_capability
    return directory / f"{part}.sm{major}{minor}.kernels"


def read_kernels(path: Path) -> bytes:
    """The kernels that `save_kernels` wrote, or no bytes."""
    return path.read_bytes() if path.is_file() else b""


def check_engine(path: Path, engine: LoadedEngine, model: str, manifest: Manifest) -> None:
    """Compare the inputs and outputs of an engine of `model`, vision or decoder, with the manifest: names, types, and all on the device.

    Raises FastVLMError for the first difference.
    """
    dtype, layers = manifest.decoder.dtype, range(manifest.decoder.layers)
    past = {f"past_key_values.{layer}.{kind}": dtype for layer in layers for kind in ("key", "value")}
    int64 = dict.fromkeys(("input_ids", "position_ids", "logit_positions"), "int64")
    if model == "vision":
        inputs, outputs = {"pixel_values": "float32"}, {"image_features": dtype}
    else:
        inputs = {**int64, "image_features": dtype, **past}
        outputs = {"kv_new": dtype, "logits": "float32", "top_values": "float32", "top_ids": "int64", "log_normalizer": "float32"}
    again = f"run: fastvlm-edge build {path.parents[2]} --force"
    for found, wanted in ((engine.inputs, inputs), (engine.outputs, outputs)):
        for name in sorted(set(wanted) | set(found)):
            if wanted.get(name) != found.get(name):
                raise FastVLMError(
                    f"{path} does not match its manifest: tensor {name} is {found.get(name, 'missing')}, expected "
                    f"{wanted.get(name, 'no such tensor')}",
                    again,
                )
    if engine.on_host:
        raise FastVLMError(f"{path} reads {engine.on_host[0]} on the host, but the backend keeps every input and output on the GPU", again)
