"""A table of what the ONNX parser of TensorRT 10.3 (JetPack 6.1 and 6.2) accepts, and a check that names each node it would refuse.

Development uses a much newer parser; this table makes tests fail when a graph no longer works with JetPack 6. It is based on onnx-tensorrt
at commit 62bdde2a, branch 10.3-GA, which TensorRT's tag v10.3.0 uses, and on include/NvInfer.h of that tag. Below, "importer" means
onnxOpImporters.cpp there, and "NvInfer.h" that header. According to these sources, a graph without findings can be parsed; they do not say
whether the builder has a kernel for every node. docs/tensorrt-10.3.md explains what remains uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx  # not installed on every Jetson, so it is imported where it is used

OPSETS = range(9, 22)
"""docs/operators.md declares 9 to 20. Our graphs use 21, for `block_size`: ModelImporter.cpp (importModel) checks no upper limit, the
parser is built against ONNX 1.16, which has opset 21, and the importers of our operators read nothing that changed. Later opsets are not
covered."""
MAX_RANK = 8
"""Dims::MAX_DIMS in NvInferRuntimeBase.h."""
MAX_TOPK = 3840
"""ITopKLayer::setK in NvInfer.h: "only values up to 3840 are supported"."""

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_HALVES = frozenset({"FLOAT", "FLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
_BOOL = frozenset({"BOOL"})
_QUANTIZED = frozenset({"INT8", "INT4", "FLOAT8E4M3FN"})
_BINDINGS = _ANY | {"UINT8"}
"""Types of inputs and outputs (importInput in ModelImporter.cpp, notes in docs/operators.md); INT64 ones stay INT64."""
_CONSTANTS = _BINDINGS | _QUANTIZED | {"DOUBLE"}
"""convertDtype in importerUtils.cpp. NvInfer.h says that IConstantLayer "does not support boolean types", docs/operators.md lists BOOL
for Constant. It is not known which is right; our graphs have no boolean constant."""
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
"""convertOnnxWeights in WeightsContext.cpp refuses any other key."""


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _types(types: frozenset[str], names: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(names.split(), types)


OPERATORS: dict[str, frozenset[str]] = {
    **_types(
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Einsum Elu Erf"
        " Exp Floor Gelu Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf"
        " LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul MaxPool PRelu Pow QuantizeLinear Reciprocal Round Selu Sigmoid"
        " Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu",
    ),
    **_types(_HALVES, "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    **_types(
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad ReduceL1"
        " ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements"
        " ScatterND Sign SpaceToDepth Sub Sum TopK",
    ),
    **_types(
        _ANY,
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot Reshape ReverseSequence"
        " Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    **_types(_BOOL, "And Not Or Xor"),
    **_types(_BINDINGS, "Cast CastLike"),
    # docs/operators.md lists FP16 and BF16 as well; the importer refuses them.
    "Range": frozenset({"FLOAT", "INT32", "INT64"}),
    "DequantizeLinear": _QUANTIZED,
}
"""Operator -> element types of its data (docs/operators.md, checked against notInvalidType and the type checks of importerUtils.cpp)."""

_UNREAD = _names(
    "Dropout GRU GlobalLpPool If LRN LSTM Loop LpPool MeanVarianceNormalization RNN RandomNormal RandomNormalLike RandomUniform"
    " RandomUniformLike Resize Scan Scatter Shrink Upsample"
)
"""Operators with conditions that this table does not contain, because our graphs do not use them."""

_ALL_INPUTS = _names("Add And Concat Div Equal Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min Mod Mul Or Pow Sub Sum Xor")
"""Operators whose inputs are all data. For other operators, only the first input is."""

_WRONG_FROM = {"GroupNormalization": 21, "ScatterND": 18}
"""Opsets in which an operator has a meaning that the parser supports only since 10.9 (docs/Changelog.md)."""


@dataclass(frozen=True)
class Finding:
    """A node that TensorRT 10.3 would refuse, and why. `op` is "graph" if the problem concerns no single node."""

    node: str
    op: str
    problem: str

    def __str__(self) -> str:
        return f"{self.node} ({self.op}): {self.problem}"


def check_graph(graph: Path | onnx.ModelProto) -> list[Finding]:
    """List every reason for which the parser of TensorRT 10.3 would refuse `graph` in a strongly typed network, in the order of the nodes.

    Weights in external files are not read, so problems with their values, such as a scale of zero, are not found.
    Raises ImportError without the package `onnx`.
    """
    return list(_walk(_read(graph)))


def list_doubts(graph: Path | onnx.ModelProto) -> list[Finding]:
    """Nodes for which the sources do not say whether 10.3 accepts them, or contradict each other (docs/tensorrt-10.3.md)."""
    return list(_doubts(_read(graph)))


@dataclass
class _Graph:
    """A model with the types and shapes of its tensors. None stands for an unknown shape or length."""

    model: onnx.ModelProto
    opset: int
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def values(self, name: str) -> list[Any] | None:
        """The flattened values of a constant that is stored in the graph itself."""
        from onnx import TensorProto, numpy_helper

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return list(numpy_helper.to_array(tensor).astype("float64").reshape(-1).tolist())


def _read(source: Path | onnx.ModelProto) -> _Graph:
    import onnx
    from onnx import TensorProto

    model = onnx.load(source, load_external_data=False) if isinstance(source, Path) else source
    model = onnx.shape_inference.infer_shapes(model)
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    graph = _Graph(model, opsets[0] if opsets else 0)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        graph.types[value.name] = TensorProto.DataType.Name(kind.elem_type)
        if kind.HasField("shape"):
            graph.shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    for node in model.graph.node:
        for name in node.input:
            graph.readers.setdefault(name, []).append(node)
        for name in node.output:
            graph.producers[name] = node
        if node.op_type == "Constant" and "value" in (attributes := _attributes(node)):
            graph.constants[node.output[0]] = attributes["value"]
    graph.constants.update({tensor.name: tensor for tensor in model.graph.initializer})
    for name, tensor in graph.constants.items():
        graph.types[name] = TensorProto.DataType.Name(tensor.data_type)
        graph.shapes[name] = list(tensor.dims)
    return graph


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


# The whole graph ----------------------------------------------------------------------------------------------------------------


def _walk(graph: _Graph) -> Iterator[Finding]:
    if graph.opset not in OPSETS:
        yield Finding("", "graph", f"opset {graph.opset}; 10.3 is known to read {OPSETS.start} to {OPSETS.stop - 1}")
    yield from _tensors(graph)
    functions = {function.name for function in graph.model.functions}
    for node in graph.model.graph.node:
        for problem in _node_problems(graph, node, functions):
            yield Finding(node.name or node.output[0], node.op_type, problem)


def _tensors(graph: _Graph) -> Iterator[Finding]:
    """Check the inputs, outputs and constants of the graph."""
    weights = {tensor.name for tensor in graph.model.graph.initializer}
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        if value.name not in weights and graph.types[value.name] not in _BINDINGS:
            yield Finding(value.name, "graph", f"an input or output of {graph.types[value.name]}")
    for name, tensor in graph.constants.items():
        if graph.types[name] not in _CONSTANTS:
            yield Finding(name, "graph", f"a constant of {graph.types[name]}")
        if extra := {entry.key for entry in tensor.external_data} - _EXTERNAL_KEYS:
            yield Finding(name, "graph", f"external data with {', '.join(sorted(extra))}")
        if any(entry.key == "location" and "../" in entry.value for entry in tensor.external_data):
            yield Finding(name, "graph", "external data above the folder of the graph")
    for name, shape in graph.shapes.items():
        if len(shape) > MAX_RANK:
            yield Finding(name, "graph", f"rank {len(shape)}; at most {MAX_RANK}")


def _node_problems(graph: _Graph, node: onnx.NodeProto, functions: set[str]) -> Iterator[str]:
    op = node.op_type
    if node.domain not in ("", "ai.onnx"):
        yield f"an operator of {node.domain}: 10.3 would look for a plugin of that name"
        return
    if op in functions or op in _UNREAD:
        yield "10.3 imports it, but this table does not know its conditions; read docs/operators.md of onnx-tensorrt 10.3-GA"
        return
    if op not in OPERATORS:
        yield "10.3 has no importer for it"
        return
    if op in _WRONG_FROM and graph.opset >= _WRONG_FROM[op]:
        yield f"opset {graph.opset}, which the parser reads rightly from TensorRT 10.9 on"
    yield from _type_problems(graph, node)
    if op in _RULES:
        yield from _RULES[op](graph, node, _attributes(node))
    elif op.startswith("Reduce"):
        yield from _constant_axes(graph, node, _attributes(node))


def _type_problems(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    op, outputs = node.op_type, {value.name for value in graph.model.graph.output}
    accepted = OPERATORS[op]
    data = node.input if op in _ALL_INPUTS else node.input[1:] if op == "Where" else node.input[:1]
    if op not in ("Constant", "ConstantOfShape"):
        for kind in sorted({graph.types[name] for name in data if name in graph.types} - accepted):
            yield f"an input of {kind}; 10.3 takes {', '.join(sorted(accepted))}"
    for name in node.output:
        kind = graph.types.get(name, "")
        if kind == "UINT8" and name not in outputs:
            yield "a UINT8 output; 10.3 has UINT8 as an input or output of the whole graph only"  # parseNode in ModelImporter.cpp
        elif op != "Constant" and kind in _QUANTIZED and op != "QuantizeLinear":
            yield f"an output of {kind}; 10.3 has quantised values only behind QuantizeLinear and before DequantizeLinear"


# One operator -------------------------------------------------------------------------------------------------------------------

_Rule = Callable[[_Graph, "onnx.NodeProto", dict[str, Any]], Iterator[str]]


def _quantize(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """QuantDequantLinearHelper of the importer; IQuantizeLayer and IDequantizeLayer in NvInfer.h."""
    x, scale = node.input[0], node.input[1]
    if graph.types.get(scale) not in _FLOATS:
        yield f"scales of {graph.types.get(scale)}; 10.3 takes {', '.join(sorted(_FLOATS))}"
    if not _is_constant_or_cast(graph, scale):
        yield "scales that are computed; they must be a constant, or a Cast of one"
    values = graph.values(scale)
    if values is not None and min(values, default=1.0) <= 0:
        yield "a scale that is not positive"
    target = graph.types.get(x if node.op_type == "DequantizeLinear" else node.output[0])
    if len(node.input) > 2 and node.input[2]:
        yield from _zero_point(graph, node.input[2], scale)
    if node.op_type == "QuantizeLinear" and target not in _QUANTIZED:
        yield f"quantisation to {target}; 10.3 has {', '.join(sorted(_QUANTIZED))}"
    shape, scales = graph.shapes.get(x), graph.shapes.get(scale)
    if shape is None or scales is None or None in scales:
        yield "a shape that is not known"
        return
    known = [length for length in scales if length is not None]
    if target == "INT4" and shape and shape[-1] is not None and shape[-1] % 2:
        yield f"INT4 with {shape[-1]} values in the last axis; it must be even"
    if math.prod(known) == 1:
        if target == "INT4":
            yield _INT4_UNBLOCKED
        return
    if not graph.is_constant(x):
        yield "more than one scale for a value that is no constant"
    if len(known) == 1:
        yield from _per_channel(shape, known[0], target, attributes)
    elif len(known) == len(shape):
        yield from _blocked(shape, known, target, attributes)
    else:
        yield f"scales of rank {len(known)} for a value of rank {len(shape)}"


_INT4_UNBLOCKED = "INT4 without blocks: the parser lets it pass, but no source shows that 10.3 builds it"


def _zero_point(graph: _Graph, zero: str, scale: str) -> Iterator[str]:
    if graph.types.get(zero) not in _QUANTIZED:
        yield f"a zero point of {graph.types.get(zero)}; 10.3 would take it for INT8"
    values = graph.values(zero)
    if values is None:
        yield "a zero point whose value is not in the graph; 10.3 takes zeros only"
    elif any(values):
        yield "a zero point that is not zero; 10.3 has symmetric quantisation only"
    lengths = [graph.shapes.get(name) for name in (zero, scale)]
    if all(shape is not None and None not in shape for shape in lengths):
        sizes = [math.prod(length or 0 for length in shape or []) for shape in lengths]
        if sizes[0] != sizes[1]:
            yield f"{sizes[0]} zero points for {sizes[1]} scales"


def _per_channel(shape: list[int | None], count: int, target: str | None, attributes: dict[str, Any]) -> Iterator[str]:
    if target == "INT4":
        yield _INT4_UNBLOCKED
    if "axis" not in attributes:
        yield "no axis for its scales: 10.3 would take 0, where ONNX says 1"
        return
    axis = attributes["axis"]
    if not -len(shape) <= axis < len(shape):
        yield f"axis {axis} of a value of rank {len(shape)}"
    elif shape[axis] != count:
        yield f"{count} scales for {shape[axis]} channels"


def _blocked(shape: list[int | None], scales: list[int], target: str | None, attributes: dict[str, Any]) -> Iterator[str]:
    """10.3 reads neither `block_size` nor, with blocks, `axis`: it divides the shapes, rounding down."""
    if target != "INT4":
        yield f"blocks of {target}; 10.3 has blocks of INT4 only"
    if len(shape) != 2:
        yield f"blocks of a value of rank {len(shape)}; 10.3 takes matrices"
        return
    lengths = [length or 0 for length in shape]
    blocked = [axis for axis, (length, count) in enumerate(zip(lengths, scales, strict=True)) if not count or length // count != 1]
    if len(blocked) != 1:
        yield f"scales {scales} for a value {lengths}; exactly one axis may be blocked"
        return
    axis = blocked[0]
    block, rest = divmod(lengths[axis], scales[axis])
    if rest:
        yield f"{scales[axis]} blocks of {lengths[axis]} values are no whole number each"
    elif block != attributes.get("block_size", 0):
        yield f"block_size {attributes.get('block_size', 0)}, which 10.3 does not read: it would take {block} from the shapes"
    if axis != 0:
        # The parser takes either axis; the only form that NvInfer.h describes is scales (R // B, S) for a matrix (R, S).
        yield f"blocks along axis {axis}; 10.3 documents blocks along axis 0"


def _conv(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """convMultiInput in importerUtils.cpp; docs/Changelog.md, 10.4: "Fixed kernel shape inference in multi-input convolutions"."""
    if not graph.is_constant(node.input[1]) and "kernel_shape" not in attributes:
        yield "a computed kernel without kernel_shape, which 10.3 does not infer"
    rank = len(graph.shapes.get(node.input[0], [None] * 4))
    if rank not in (3, 4, 5):
        yield f"an input of rank {rank}"


def _gemm(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """The importer multiplies by an FP32 constant where alpha or beta is not 1, which strong typing refuses for other types."""
    for name in node.input[:2]:
        if len(graph.shapes.get(name, [1, 1])) != 2:
            yield f"an input of rank {len(graph.shapes[name])}; it must be a matrix"
    used = {"alpha"} | ({"beta"} if len(node.input) > 2 else set())
    if graph.types.get(node.input[0]) != "FLOAT":
        for name in sorted(used):
            if attributes.get(name, 1.0) != 1.0:
                yield f"{name} {attributes[name]:g} in a type other than FLOAT: 10.3 multiplies by an FP32 constant"


def _layer_norm(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """docs/operators.md: "only the first output"; strong typing wants one type for the value, scale and bias."""
    if len([name for name in node.output if name]) > 1:
        yield "more than the first output"
    yield from _same_types(graph, node, attributes)


def _same_types(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    kinds = sorted({graph.types[name] for name in node.input if name in graph.types})
    if len(kinds) > 1:
        yield f"inputs of {' and '.join(kinds)} in one operator; a strongly typed network takes one type"


def _cast(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    from onnx import TensorProto

    if "to" in attributes and (to := TensorProto.DataType.Name(attributes["to"])) not in _BINDINGS | _QUANTIZED:
        yield f"a cast to {to}"  # a cast to a quantised type is named by its output


def _constant_axes(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """ReduceMean and its like, Squeeze, Unsqueeze: axes as an attribute in every opset, or as an input that is a constant."""
    if len(node.input) > 1 and node.input[1] and not graph.is_constant(node.input[1]):
        yield "axes that are computed; they must be a constant"


def _squeeze(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    yield from _constant_axes(graph, node, attributes)
    if len(node.input) < 2 and None in graph.shapes.get(node.input[0], [None]):
        yield "no axes for a value of unknown shape"


def _split(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """Sizes as INT64 input, or `num_outputs` (opset 18) that agrees with the outputs; not both."""
    if len(node.input) > 1:
        if "num_outputs" in attributes:
            yield "sizes and num_outputs"
        if graph.types.get(node.input[1]) != "INT64":
            yield f"sizes of {graph.types.get(node.input[1])}; the importer reads INT64"
    elif attributes.get("num_outputs", len(node.output)) != len(node.output):
        yield f"num_outputs {attributes['num_outputs']} with {len(node.output)} outputs"


def _slice(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """Starts, ends and, from 10.3 on, axes may be computed; starts, ends and axes need equal, known lengths."""
    lengths = [graph.shapes.get(name) for name in node.input[1:4] if name]
    if any(shape is None or None in shape for shape in lengths):
        yield "starts, ends or axes of unknown length"
    elif len({tuple(shape or []) for shape in lengths}) > 1:
        yield "starts, ends and axes of different lengths"


def _topk(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """docs/operators.md: sorted 1, K below 3840. Indices become INT64 by a cast of the importer's own."""
    if attributes.get("sorted", 1) != 1:
        yield "sorted 0; it must be 1"
    values = graph.values(node.input[1]) if len(node.input) > 1 else None
    if values and values[0] >= MAX_TOPK:
        yield f"K {values[0]:g}; it must be below {MAX_TOPK}"


def _gather_nd(graph: _Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Iterator[str]:
    """IGatherLayer in NvInfer.h, GatherMode::kND: 0 <= batch_dims < rank - 1, and the last length of the indices is a constant."""
    batch_dims, data, index = attributes.get("batch_dims", 0), graph.shapes.get(node.input[0]), graph.shapes.get(node.input[1])
    if data is not None and batch_dims and not batch_dims < len(data) - 1:
        yield f"batch_dims {batch_dims} with a value of rank {len(data)}; it must be below rank - 1"
    if index is None or not index or index[-1] is None:
        yield "indices whose last length is not known"


_RULES: dict[str, _Rule] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "Pow": _same_types,
    "Range": _same_types,
    "Cast": _cast,
    "Squeeze": _squeeze,
    "Unsqueeze": _constant_axes,
    "Split": _split,
    "Slice": _slice,
    "TopK": _topk,
    "GatherND": _gather_nd,
}
"""Shape with start and end, Where, Expand, Concat, Less and LessOrEqual on INT64, Reshape and GreaterOrEqual have no condition beyond
their types: the importer reads start and end in any opset, and keeps INT64 as it is."""


def _is_constant_or_cast(graph: _Graph, name: str) -> bool:
    """NvInfer.h, IDequantizeLayer: a constant, or a Cast of one, may be the scale."""
    producer = graph.producers.get(name)
    if producer is not None and producer.op_type == "Cast":
        name = producer.input[0]
    return graph.is_constant(name)


# Doubts -------------------------------------------------------------------------------------------------------------------------


def _doubts(graph: _Graph) -> Iterator[Finding]:
    if graph.opset > 20:
        yield Finding("", "graph", f"opset {graph.opset}: 10.3 declares 20, but compares no upper limit")
    if "BFLOAT16" in graph.types.values():
        yield Finding("", "graph", "BF16: the parser takes it, but nothing was found that says which of its kernels 10.3 has for Orin")
    for node in graph.model.graph.node:
        if node.op_type == "LayerNormalization":
            # The importer calls setComputePrecision in any network; NvInfer.h: "Strongly typed network rejects calls to this method";
            # parseNode fails a node for any error that the network reports. The parser of 10.8 calls it in weakly typed networks only.
            yield Finding(node.name, node.op_type, "the importer of 10.3 sets its precision, which a strongly typed network rejects")
        elif node.op_type == "DequantizeLinear" and graph.types.get(node.input[0]) == "INT8" and graph.is_constant(node.input[0]):
            # NVIDIA documents weight-only quantisation for INT4 (developer guide, quantized types); INT8 beside quantised activations.
            readers = {reader.op_type for reader in graph.readers.get(node.output[0], [])}
            yield Finding(node.name, node.op_type, f"INT8 weights of {', '.join(sorted(readers))} with activations that are not quantised")
