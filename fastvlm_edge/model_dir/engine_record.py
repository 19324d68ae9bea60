"""`engines/<target>/build.json`: the record of a pair of engines: inputs, library, GPUs, and the comparison with the reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.host import read_jetson
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import from_json, parse_json
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest, check_file_records

if TYPE_CHECKING:
    from fastvlm_edge.nvidia.cuda import DeviceInfo

RECORD_NAME = "build.json"
ENGINES = "engines"
PARTS = ("vision", "decoder")
LIBRARIES = ("tensorrt", "tensorrt_rtx")
SCHEMA = 1
VISION_GRAPHS = {
    "vision.onnx": "as converted",
    "vision.fp32-scales.onnx": "with FP32 scales",
    "vision.float-inputs.onnx": "without INT8 activations",
}
"""Graphs that vision.engine can be built from, the preferred one first. A calibrated model directory has all three: TensorRT 10.16 is
reported to refuse INT8 activations with FP16 scales on Orin (NVIDIA/TensorRT#4832). All of them use vision.weights."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that engines are built on or run on. What is unknown is 0 or empty."""

    name: str
    """As CUDA calls it, which is "Orin" for every Orin."""
    compute_capability: tuple[int, int]
    multiprocessors: int = 0
    memory_bytes: int = 0
    board: str = ""
    """Name of the Jetson module or board."""


def gpu_of(device: DeviceInfo) -> Gpu:
    """The GPU of this machine, with the name of its board."""
    jetson = read_jetson(Probe())
    name = jetson.name if jetson is not None else ""
    return Gpu(device.name, device.compute_capability, device.multiprocessors, device.total_bytes, name)


@dataclass(frozen=True)
class EngineRecord:
    """A pair of engines, `vision.engine` and `decoder.engine`, in `engines/<target>/` of a model directory."""

    target: str
    library: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    """Version of the library. An engine runs only with the version that built it."""
    compute_capabilities: list[list[int]]
    """[major, minor] of every GPU architecture that the engines run on."""
    device: str
    """Name of the GPU on which they were built; empty if the machine had no GPU."""
    flags: dict[str, Any]
    """Options of the build, by name."""
    onnx: dict[str, str]
    """File name -> sha256 of the graphs and weights that the engines were built from."""
    files: dict[str, FileRecord]
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    """Part -> its optimization profiles: input name -> [smallest, optimal, largest] shape."""
    build: dict[str, Any]
    """Date, duration and peak memory of the build, per part."""
    parity: dict[str, Any] = field(default_factory=dict)
    """Figures of the comparison with the reference, its `faults`, and the `device` and `compute_capability` that ran the engines.
    Empty until a GPU has run them."""
    multiprocessors: int = 0
    """Of the GPU on which they were built, like the two fields below: 0 or empty without one, and in older records."""
    memory_bytes: int = 0
    board: str = ""
    schema: int = SCHEMA

    @property
    def verified(self) -> bool:
        """Whether the engines ran on a GPU and agreed with their reference."""
        return bool(self.parity) and not self.faults

    @property
    def faults(self) -> list[dict[str, str]]:
        """What disagreed with the reference, each with its `part` and `text`: nothing loads these engines on that device."""
        return list(self.parity.get("faults", ()))

    def judged_on(self, name: str, compute_capability: tuple[int, int]) -> bool:
        """Whether `verified` and `faults` hold on a GPU: if they were found on the same one, or if agreement holds on all.

        TensorRT proper fixes the kernels at build time, and `mismatch` refuses other GPUs. TensorRT for RTX compiles them on each GPU.
        """
        same = (self.parity.get("device"), self.parity.get("compute_capability")) == (name, list(compute_capability))
        return bool(self.parity) and (same or (self.library == "tensorrt" and not self.faults))

    def write(self, directory: Path) -> None:
        """Write `build.json` into `directory`, completely or not at all."""
        with whole_file(directory / RECORD_NAME) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_record(directory: Path) -> EngineRecord:
    """Read `build.json`. Raises FastVLMError if it is damaged or written by an incompatible version of the toolkit."""
    path = directory / RECORD_NAME
    again = f"run: fastvlm-edge build {directory.parent.parent} --target {directory.name} --force"
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise FastVLMError(f"{path} has schema {document['schema']}, but this toolkit reads schema {SCHEMA}", again)
        record: EngineRecord = from_json(EngineRecord, document)
        _check_values(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastVLMError(f"{path} is damaged ({type(error).__name__}: {error})", again) from None
    return record


def _check_values(record: EngineRecord) -> None:
    """Raise ValueError for the first value that no build writes."""
    if record.library not in LIBRARIES:
        raise ValueError(f"library is {record.library!r}, not one of {', '.join(LIBRARIES)}")
    if not record.compute_capabilities or any(len(each) != 2 or min(each) < 0 for each in record.compute_capabilities):
        raise ValueError(f"compute_capabilities is {record.compute_capabilities}")
    if record.multiprocessors < 0 or record.memory_bytes < 0:
        raise ValueError(f"multiprocessors is {record.multiprocessors} and memory_bytes is {record.memory_bytes}")
    faults = record.parity.get("faults", [])
    if not isinstance(faults, list) or not all(isinstance(fault, dict) and {"part", "text"} <= set(fault) for fault in faults):
        raise ValueError("faults is not a list of objects with a part and a text")
    check_file_records(record.files)
    for part, profiles in record.profiles.items():
        for name, shapes in ((name, shapes) for profile in profiles for name, shapes in profile.items()):
            smallest, optimal, largest = shapes if len(shapes) == 3 else ([], [], [-1])
            if not len(smallest) == len(optimal) == len(largest) or not all(0 <= a <= b <= c for a, b, c in zip(*shapes)):  # noqa: B905
                raise ValueError(f"the profile of {part} has shapes {shapes} for {name}")


def engine_folders(model: Path) -> list[Path]:
    """The directories `engines/<target>/` of a model directory that have a record, sorted by target."""
    directories = sorted(path.parent for path in (model / ENGINES).glob(f"*/{RECORD_NAME}"))
    return [directory for directory in directories if not directory.name.startswith(".")]


def find_records(model: Path) -> list[EngineRecord]:
    """The records of a model directory. A record that cannot be read is left out."""
    records = []
    for folder in engine_folders(model):
        with contextlib.suppress(FastVLMError):
            records.append(read_record(folder))
    return records


def onnx_hashes(manifest: Manifest) -> dict[str, str]:
    """File name -> sha256 of the files that engines are built from: the graphs for a GPU, and the weights."""
    names = [f"{part}.{kind}" for part in PARTS for kind in ("onnx", "weights")]
    return {name: manifest.files[name].sha256 for name in names if name in manifest.files}


def capability(numbers: tuple[int, ...] | list[int]) -> str:
    """A compute capability as NVIDIA writes it: (8, 7) -> "8.7"."""
    return ".".join(map(str, numbers))


def mismatch(record: EngineRecord, manifest: Manifest, library: str, version: str, gpu: Gpu) -> str | None:
    """Why engines cannot run on this machine, as a clause that begins with "they were built"; None if they can."""
    if record.onnx != onnx_hashes(manifest):
        return "they were built from another conversion of the model"
    if record.library != library:
        return f"they were built with {record.library}, but this machine has {library}"
    if record.version != version:
        return f"they were built with {record.library} {record.version}, but this machine has {version}"
    if list(gpu.compute_capability) not in record.compute_capabilities:
        built = ", ".join(capability(numbers) for numbers in record.compute_capabilities)
        return f"they were built for compute capability {built}, but {gpu.name} has {capability(gpu.compute_capability)}"
    if record.library == "tensorrt" and _is_other_model(record, gpu):  # TensorRT for RTX adapts its kernels when it runs
        built = _describe(record.board or record.device, record.multiprocessors, record.memory_bytes)
        return f"they were built on {built}, but this is {_describe(gpu.board or gpu.name, gpu.multiprocessors, gpu.memory_bytes)}"
    return None


def _is_other_model(record: EngineRecord, gpu: Gpu) -> bool:
    """Whether engines come from another model of GPU. TensorRT chooses their kernels by measuring, with all the memory that is there."""
    pairs = ((record.multiprocessors, gpu.multiprocessors), (record.board, gpu.board))
    known = record.memory_bytes and gpu.memory_bytes
    return any(there and here and there != here for there, here in pairs) or bool(known and gpu.memory_bytes < 0.9 * record.memory_bytes)


def _describe(name: str, multiprocessors: int, memory_bytes: int) -> str:
    details = [f"{multiprocessors} multiprocessors"] if multiprocessors else []
    details += [f"{memory_bytes / (1 << 30):.1f} GiB"] if memory_bytes else []
    return f"{name} ({', '.join(details)})" if details else name
