"""Predicts the type in which TensorRT computes each product of a graph, and says why products are not INT8.

TensorRT's rules for Q/DQ networks (developer guide, "Working with quantized types"): a layer runs in INT8 if every input comes through
QuantizeLinear and DequantizeLinear, with scales per output channel for weights and per tensor for activations, all symmetric. Q/DQ pairs
belong in front of a layer's inputs, never between a convolution and the activation that fuses with it. An Add fuses in INT8 with the
convolution before it if its other branch is quantised too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

PRODUCTS = ("Conv", "MatMul", "Gemm")
_INTEGERS: dict[int, str] = {TensorProto.INT8: "INT8", TensorProto.INT4: "INT4"}
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16"}
_GROUP = 4
"""The channels of a group must be a multiple of this for INT8 (`IConvolutionLayer::setNbGroups`, NvInfer.h)."""


@dataclass(frozen=True)
class Fallback:
    """A product that does not compute in INT8, or a Q/DQ node that TensorRT cannot use, and why."""

    node: str
    op: str
    reason: str
    macs: int = 0

    def __str__(self) -> str:
        return f"{self.node} ({self.op}): {self.reason}"


@dataclass
class Placement:
    """The products of a graph by the type that they compute in, and the reasons for those that are not INT8."""

    macs: dict[str, int] = field(default_factory=dict)
    """Computing type -> multiply-accumulates of one picture or one decoded token. `INT8 weights -> FP16` is a product in FP16."""
    fallbacks: list[Fallback] = field(default_factory=list)

    def share(self, kind: str = "INT8") -> float:
        """Share of all multiply-accumulates that compute in `kind`, 0 to 1."""
        total = sum(self.macs.values())
        return self.macs.get(kind, 0) / total if total else 0.0


def check_placement(path: Path, sizes: Mapping[str, int] | None = None) -> Placement:
    """Analyse the graph at `path`. Dynamic sizes without a value in `sizes` count as 1: one picture, one token, an empty cache."""
    model = onnx.load(str(path), load_external_data=False)
    for dim in (dim for value in model.graph.input for dim in value.type.tensor_type.shape.dim):
        if sizes and dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
    return _Walk(model).run()


class _Walk:
    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        self.nodes = list(inferred.node)
        self.made_by = {output: node for node in self.nodes for output in node.output}
        self.used_by: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.used_by.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in inferred.initializer}
        self.shapes: dict[str, list[int]] = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
        self.types: dict[str, int] = {tensor.name: tensor.data_type for tensor in inferred.initializer}
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            self.shapes[value.name] = [dim.dim_value or 1 for dim in tensor.shape.dim]

    def run(self) -> Placement:
        placement = Placement()
        for node in self.nodes:
            if node.op_type in PRODUCTS:
                kind, reason = self._product(node)
                macs = self._macs(node)
                placement.macs[kind] = placement.macs.get(kind, 0) + macs
                if reason:
                    placement.fallbacks.append(Fallback(node.name, node.op_type, reason, macs))
            else:
                placement.fallbacks += [Fallback(node.name, node.op_type, reason) for reason in self._others(node)]
        return placement

    # Products -------------------------------------------------------------------------------------------------------------------

    def _product(self, node: onnx.NodeProto) -> tuple[str, str]:
        """The computing type of a product, and why it is not INT8; the reason is empty if it is INT8."""
        data, weight = self._before_cast(node.input[0]), self._before_cast(node.input[1])
        floats = _FLOATS.get(self.types.get(data, 0), "FP32")
        weights, inputs = self._dequantized(weight), self._dequantized(data)
        if not weights:
            if inputs:
                return floats, "missing pair: its input is quantised and its weights are not"
            return floats, "no weights: a product of two activations, in float" if not self._is_weight(weight) else "not quantised"
        if weights == "INT4":
            return f"INT4 weights -> {floats}", "INT4 is for weights only"
        groups = self._attribute(node, "group", 1)
        if groups > 1:
            per_group = self.shapes[weight][0] // groups, self.shapes[weight][1]
            if any(channels % _GROUP for channels in per_group):
                what = "depthwise" if self.shapes[weight][1] == 1 else "grouped"
                return f"INT8 weights -> {floats}", f"{what} convolution: INT8 needs a multiple of {_GROUP} channels in each group"
        if not inputs:
            return f"INT8 weights -> {floats}", "missing pair: its weights are quantised and its input is not"
        return "INT8", ""

    def _before_cast(self, name: str) -> str:
        """What is cast to FP32 to make `name`, or `name`. Casts around a product ask for sums in FP32; its operands keep their types."""
        node = self.made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "Cast" and self.types.get(name) == TensorProto.FLOAT else name

    def _is_weight(self, name: str) -> bool:
        while name in self.made_by and self.made_by[name].op_type in ("Cast", "Transpose", "Reshape", "DequantizeLinear"):
            name = self.made_by[name].input[0]
        return name in self.constants

    def _dequantized(self, name: str) -> str:
        """`INT8` or `INT4` if `name` is the output of a DequantizeLinear, otherwise an empty string."""
        node = self.made_by.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return ""
        return _INTEGERS.get(self.types.get(node.input[0], TensorProto.INT8), "INT8")

    def _macs(self, node: onnx.NodeProto) -> int:
        out, weight = self.shapes.get(node.output[0], []), self.shapes.get(node.input[1], [])
        if node.op_type == "Conv":
            return int(np.prod(out, dtype=np.int64) * np.prod(weight[1:], dtype=np.int64))
        inner = self.shapes.get(node.input[0], [1])[-1] if node.op_type == "MatMul" else weight[self._attribute(node, "transB", 0)]
        return int(np.prod(out, dtype=np.int64) * inner)

    # Others ---------------------------------------------------------------------------------------------------------------------

    def _others(self, node: onnx.NodeProto) -> Iterator[str]:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._pair(node)
        elif node.op_type == "Add" and len(node.input) == 2:
            quantized = [bool(self._dequantized(name)) for name in node.input]
            convolved = [self._through_int8(name) for name in node.input]
            if any(convolved) and not all(q or c for q, c in zip(quantized, convolved, strict=True)) and not self._has_constant(node):
                yield "residual add: one branch is an INT8 product and the other is not quantised, so it runs in float"
        elif node.op_type == "Erf" and self._through_int8(node.input[0]):
            yield "GELU: computed in float between INT8 products, fused with the one before it"
        elif node.op_type == "Sigmoid" and self._feeds(node.output[0], "Mul") and self._comes_from(node.input[0], "ReduceMean"):
            yield "squeeze-excite: computed in float"

    def _pair(self, node: onnx.NodeProto) -> Iterator[str]:
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero in self.constants and self.constants[zero].data_location != TensorProto.EXTERNAL:
            if np.any(numpy_helper.to_array(self.constants[zero])):
                yield "asymmetric zero point: TensorRT supports only 0"
            if self.constants[zero].data_type == TensorProto.UINT8:
                yield "UINT8: TensorRT supports only INT8"
        if node.op_type == "QuantizeLinear":
            if np.prod(self.shapes.get(node.input[1], [])) > 1:
                yield "per-channel scales on an activation: TensorRT needs one scale for the whole tensor"
            if any(user.op_type != "DequantizeLinear" for user in self.used_by.get(node.output[0], [])):
                yield "missing pair: QuantizeLinear is not followed by DequantizeLinear"
            source = self.made_by.get(node.input[0])
            if source is not None and source.op_type == "Conv" and self._feeds(node.input[0], "Relu"):
                yield "between a convolution and its activation: the two cannot fuse"

    def _through_int8(self, name: str) -> bool:
        """Whether `name` is an INT8 product, possibly followed by scaling, a bias or a cast."""
        node = self.made_by.get(name)
        while node is not None and node.op_type in ("Add", "Mul", "Div", "Cast") and self._has_constant(node):
            node = next((self.made_by.get(each) for each in node.input if each not in self.constants), None)
        return node is not None and node.op_type in PRODUCTS and self._product(node)[0] == "INT8"

    def _has_constant(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Cast" or any(name in self.constants for name in node.input)

    def _feeds(self, name: str, op: str) -> bool:
        return any(user.op_type == op for user in self.used_by.get(name, []))

    def _comes_from(self, name: str, op: str, depth: int = 8) -> bool:
        node = self.made_by.get(name)
        return node is not None and depth > 0 and (node.op_type == op or self._comes_from(node.input[0], op, depth - 1))

    @staticmethod
    def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
        return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)
