"""The layers of an engine: its kernels with their types, and the nodes of the ONNX graph that each of them fuses.

There are two sources. The verbose log of a build has the list as text, with profiling verbosity DETAILED. The engine inspector has it as
JSON, but has to load the engine onto the GPU. TensorRT for RTX lists the constants of a kernel apart from its inputs. TensorRT 10 lists
them among the inputs: there, an input is a constant if no kernel writes it and it is not an input of the engine.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_LINE = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>(?: \{.*?\})?)\], "
    r"(?:Constants: \[(?P<constants>(?: \{.*?\})?)\], )?Outputs: \[(?P<outputs>(?: \{.*?\})?)\], (?P<rest>.*?)Metadata: (?P<nodes>.*)"
)
_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([-\d,]*)\].*?Datatype: ([^,}]*)")
_WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)", "Count": (\d+)')
_PROFILE = re.compile(r" \[profile \d+\]$")
_TYPES = {"Half": "Half", "FP16": "Half", "BFloat16": "BFloat16", "BF16": "BFloat16", "FP32": "Float"} | {
    name: name for name in ("Int8", "Int4", "Int64", "Int32", "Float", "Bool")
}
"""What names a type in a description such as "Row major linear FP16 format" -> the type. The first that fits counts."""
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


@dataclass(frozen=True)
class _Listed:
    """A layer as it is listed, with the names of its tensors."""

    layer: Layer
    """Its constants are only those that are listed apart."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    apart: bool
    """Whether it lists its constants apart from its inputs."""


def parse_listing(text: str, engine_inputs: Collection[str] = ()) -> list[Layer]:
    """Parse the layers from the log of a build. `engine_inputs`: names of the engine's own inputs, which lists of TensorRT 10 need."""
    return _separate(map(_from_line, filter(None, map(_LINE.match, text.splitlines()))), engine_inputs)


def parse_inspector(text: str, engine_inputs: Collection[str] = ()) -> list[Layer]:
    """Parse the layers from the JSON of `IEngineInspector.get_engine_information`. Its keys vary between versions.

    Raises ValueError, KeyError or TypeError if it has another structure.
    """
    layers: list[dict[str, Any] | str] = json.loads(text, strict=False)["Layers"]
    # An engine that was built with layer names only has strings.
    return _separate((_from_json(layer) for layer in layers if not isinstance(layer, str)), engine_inputs)


def _separate(listed: Iterable[_Listed], engine_inputs: Collection[str]) -> list[Layer]:
    """Move constants that are listed as inputs to the constants."""
    listed = list(listed)
    varying = {name for each in listed for name in each.outputs}

    def varies(name: str) -> bool:
        return name in varying or _PROFILE.sub("", name) in engine_inputs

    layers = []
    for each in listed:
        layer = each.layer
        if not each.apart:
            inputs = list[Tensor]()
            constants = list(layer.constants)
            for name, tensor in zip(each.inputs, layer.inputs, strict=True):
                (inputs if varies(name) else constants).append(tensor)
            layer = replace(layer, inputs=tuple(inputs), constants=tuple(constants))
        layers.append(layer)
    return layers


def count_kinds(layers: Sequence[Layer]) -> list[tuple[str, str, int]]:
    """(kind, types of the outputs, number of layers), most frequent first."""
    counts = Counter((layer.kind, "+".join(sorted({output.dtype for output in layer.outputs}))) for layer in layers)
    return [(kind, types, count) for (kind, types), count in counts.most_common()]


def _from_line(match: re.Match[str]) -> _Listed:
    inputs, outputs = _TENSOR.findall(match["inputs"]), _TENSOR.findall(match["outputs"])
    layer = Layer(
        name=match["name"],
        kind=match["kind"],
        inputs=_tensors(inputs),
        constants=_tensors(_TENSOR.findall(match["constants"] or "")) + _weights(_WEIGHTS.findall(match["rest"])),
        outputs=_tensors(outputs),
        nodes=tuple(_NODE.findall(match["nodes"])),
    )
    return _Listed(layer, tuple(name for name, *_ in inputs), tuple(name for name, *_ in outputs), match["constants"] is not None)


def _tensors(listed: Iterable[tuple[str, str, str]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(_type(kind), tuple(int(size) for size in sizes.split(",") if size)) for _, sizes, kind in listed)


def _weights(listed: Iterable[tuple[str, Any]]) -> tuple[Tensor, ...]:
    """Weights of a convolution of TensorRT 10, which is listed with their number only."""
    return tuple(Tensor(_type(kind), (int(count),)) for kind, count in listed)


def _from_json(document: dict[str, Any]) -> _Listed:
    inputs, outputs = document.get("Inputs", []), document.get("Outputs", [])
    weights = document.get("Weights", {})
    layer = Layer(
        name=str(document.get("Name", "")),
        kind=str(document.get("LayerType", document.get("ParameterType", ""))),
        inputs=tuple(map(_inspected, inputs)),
        constants=(
            *map(_inspected, document.get("Constants", [])),
            *_weights([(weights["Type"], weights["Count"])] if "Count" in weights else []),
        ),
        outputs=tuple(map(_inspected, outputs)),
        nodes=tuple(_NODE.findall(str(document.get("Metadata", "")))),
    )
    return _Listed(layer, _names(inputs), _names(outputs), "Constants" in document)


def _names(tensors: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(str(tensor.get("Name", "")) for tensor in tensors)


def _inspected(tensor: dict[str, Any]) -> Tensor:
    kind = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype", "")
    return Tensor(_type(str(kind)), tuple(int(size) for size in tensor.get("Dimensions", [])))


def _type(description: str) -> str:
    words = description.strip()
    return next((name for part, name in _TYPES.items() if part.lower() in words.lower()), words)
