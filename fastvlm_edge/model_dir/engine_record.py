"""`engines/<target>/build.json`: what a pair of engines was built from, with and for, and whether it was ever compared on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import from_json
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest

RECORD_NAME = "build.json"
ENGINES = "engines"
PARTS = ("vision", "decoder")
SCHEMA = 1


@dataclass(frozen=True)
class EngineRecord:
    """A built pair of engines, in `engines/<target>/` of a model directory."""

    target: str
    library: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    """Of the library: an engine runs on the very version that built it."""
    compute_capabilities: list[list[int]]
    """[major, minor] of every GPU that the engines run on."""
    device: str
    """Name of the GPU that they were built on; empty where there was none."""
    flags: dict[str, Any]
    onnx: dict[str, str]
    """File name -> sha256 of every graph and weights file that went in."""
    files: dict[str, FileRecord]
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    """Part -> profiles: input name -> smallest, optimal and largest shape."""
    build: dict[str, Any]
    """Date, seconds and peak memory of each part."""
    parity: dict[str, Any] = field(default_factory=dict)
    """Figures of the comparison with onnxruntime; empty as long as no GPU has run them."""
    schema: int = SCHEMA

    @property
    def verified(self) -> bool:
        """Whether the engines were compared with onnxruntime on a GPU, and held."""
        return bool(self.parity)

    def write(self, directory: Path) -> None:
        """Write `build.json` into `directory`, whole or not at all."""
        with whole_file(directory / RECORD_NAME) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_record(directory: Path) -> EngineRecord:
    """Read `build.json`. Raises FastVLMError where it is damaged or from another version of the toolkit."""
    path = directory / RECORD_NAME
    again = f"run: fastvlm-edge build {directory.parent.parent} --target {directory.name} --force"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise FastVLMError(f"{path} has schema {document['schema']}, this toolkit reads {SCHEMA}; {again}")
        record: EngineRecord = from_json(EngineRecord, document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastVLMError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    return record


def engine_folders(model: Path) -> list[Path]:
    """Where a model directory has a pair of engines, by name of the target."""
    directories = sorted(path.parent for path in (model / ENGINES).glob(f"*/{RECORD_NAME}"))
    return [directory for directory in directories if not directory.name.startswith(".")]


def find_records(model: Path) -> list[EngineRecord]:
    """Of every pair of engines whose record can be read."""
    records = []
    for folder in engine_folders(model):
        with contextlib.suppress(FastVLMError):
            records.append(read_record(folder))
    return records


def onnx_hashes(manifest: Manifest) -> dict[str, str]:
    """sha256 of the files that engines are built from: the graphs for a GPU and the weights."""
    names = [f"{part}.{kind}" for part in PARTS for kind in ("onnx", "weights")]
    return {name: manifest.files[name].sha256 for name in names if name in manifest.files}


def capability(numbers: tuple[int, ...] | list[int]) -> str:
    """A compute capability as NVIDIA writes it."""
    return ".".join(map(str, numbers))


def mismatch(
    record: EngineRecord, manifest: Manifest, library: str, version: str, device: str, compute_capability: tuple[int, int]
) -> str | None:
    """Why engines cannot run here, in half a sentence; None where they can."""
    if record.onnx != onnx_hashes(manifest):
        return "they were built from another conversion of the model"
    if record.library != library:
        return f"they were built with {record.library}, here is {library}"
    if record.version != version:
        return f"they were built with {record.library} {record.version}, here is {version}"
    if list(compute_capability) not in record.compute_capabilities:
        built = ", ".join(capability(numbers) for numbers in record.compute_capabilities)
        return f"they were built for compute capability {built}, {device} has {capability(compute_capability)}"
    return None
