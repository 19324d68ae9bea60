"""The layers of an engine: its kernels with their types, and the nodes of the ONNX graph that each of them fuses.

There are two sources. The engine inspector needs the GPU. The verbose log of the TensorRT for RTX builder has the same list, also on a
machine without a GPU (with profiling verbosity DETAILED).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(
    r"Name: (?P<name>\S+), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*), .*?Metadata: (?P<nodes>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_LARGE = 10_000
"""A constant with at least this many values counts as a weight."""


@dataclass(frozen=True)
class Tensor:
    """Type and shape of an input, output or constant of a kernel."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """Number of values. Of a dynamic size, the largest counts."""
        return math.prod(abs(size) for size in self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, which is one kernel."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]
    """Names of the ONNX nodes that it computes."""

    @property
    def widens_weights(self) -> bool:
        """Whether this layer only converts integer weights to floats, in memory, at every run."""
        integers = any(constant.dtype in ("Int8", "Int4") and constant.values >= _LARGE for constant in self.constants)
        return integers and not self.inputs and all(output.dtype not in ("Int8", "Int4") for output in self.outputs)


def parse_listing(text: str) -> list[Layer]:
    """Parse the layers from the log of the builder."""
    return [
        Layer(
            name=match["name"],
            kind=match["kind"],
            inputs=_tensors(match["inputs"]),
            constants=_tensors(match["constants"] or ""),
            outputs=_tensors(match["outputs"]),
            nodes=tuple(_NODE.findall(match["nodes"])),
        )
        for match in map(_LINE.match, text.splitlines())
        if match
    ]


def parse_inspector(text: str) -> list[Layer]:
    """Parse the layers from the JSON of `IEngineInspector.get_engine_information`. Its keys vary between versions.

    Raises ValueError, KeyError or TypeError if it has another structure.
    """
    layers: list[dict[str, Any] | str] = json.loads(text, strict=False)["Layers"]
    return [
        Layer(
            name=str(layer.get("Name", "")),
            kind=str(layer.get("LayerType", layer.get("ParameterType", ""))),
            inputs=tuple(map(_inspected, layer.get("Inputs", []))),
            constants=tuple(map(_inspected, layer.get("Constants", []))),
            outputs=tuple(map(_inspected, layer.get("Outputs", []))),
            nodes=tuple(_NODE.findall(str(layer.get("Metadata", "")))),
        )
        for layer in layers
        if not isinstance(layer, str)  # an engine that was built with layer names only
    ]


def count_kinds(layers: Sequence[Layer]) -> list[tuple[str, str, int]]:
    """(kind, types of the outputs, number of layers), most frequent first."""
    counts = Counter((layer.kind, "+".join(sorted({output.dtype for output in layer.outputs}))) for layer in layers)
    return [(kind, types, count) for (kind, types), count in counts.most_common()]


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(dtype, tuple(int(size) for size in sizes.split(",") if size)) for sizes, dtype in _TENSOR.findall(text))


def _inspected(tensor: dict[str, Any]) -> Tensor:
    kind = str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
    for name in ("Half", "FP16", "BFloat16", "BF16", "Int8", "Int4", "Int64", "Int32", "Float", "FP32", "Bool"):
        if name.lower() in kind.lower():
            kind = {"FP16": "Half", "FP32": "Float", "BF16": "BFloat16"}.get(name, name)
            break
    return Tensor(kind, tuple(int(size) for size in tensor.get("Dimensions", [])))
