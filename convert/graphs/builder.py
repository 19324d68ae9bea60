"""A small builder for ONNX graphs. Weights are written to a separate file, tensor by tensor, and are never all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from fastvlm_edge.convert.precision import PrecisionRefused
from fastvlm_edge.version import __version__

OPSET = 21
IR_VERSION = 10
ORT_DOMAIN = "com.microsoft"
"""The domain of onnxruntime's own operators, for graphs that only its CPU provider runs."""
ALIGNMENT = 4096
"""Tensors in the weights file begin at multiples of a page, so that each can be mapped into memory."""

_ELEMENT_TYPES: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(ml_dtypes.int4): TensorProto.INT4,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.bool_): TensorProto.BOOL,
}
Array = npt.NDArray[Any]


def element_type(dtype: npt.DTypeLike) -> int:
    """The ONNX element type of a numpy (or ml_dtypes) type."""
    return _ELEMENT_TYPES[np.dtype(dtype)]


def to_bytes(array: Array) -> bytes | memoryview:
    """Little-endian bytes as ONNX stores them; two 4-bit values share a byte, the first in the low half."""
    if array.dtype == ml_dtypes.int4:
        flat = array.reshape(-1).astype(np.int8)
        if flat.size % 2:
            flat = np.append(flat, np.int8(0))
        return ((flat[0::2] & 15) | (flat[1::2] << 4)).astype(np.uint8).tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class WeightEntry:
    """Place, type and shape of a tensor in the weights file."""

    offset: int
    bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class WeightsFile:
    """The `.weights` file of one or more graphs: tensors one after another, aligned to pages, with unique names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self.entries: dict[str, WeightEntry] = {}

    def add(self, name: str, array: Array) -> None:
        """Append a tensor. Raises ValueError if the name exists already."""
        if name in self.entries:
            raise ValueError(f"{name} is already in {self.path.name}")
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        data = to_bytes(array)
        self._file.write(data)
        self.entries[name] = WeightEntry(offset, len(data), array.dtype, array.shape)

    def proto(self, name: str) -> TensorProto:
        """The ONNX initializer that refers to a tensor of this file."""
        entry = self.entries[name]
        return self._refer(name, name, entry.dtype, entry.shape)

    def bytes_proto(self, name: str, shape: tuple[int, ...]) -> TensorProto:
        """The initializer `NAME.bytes`: the bytes of a tensor of this file as uint8 of `shape`."""
        return self._refer(name, f"{name}.bytes", np.uint8, shape)

    def _refer(self, name: str, called: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> TensorProto:
        entry = self.entries[name]
        tensor = TensorProto(name=called, data_type=element_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.path.name), ("offset", str(entry.offset)), ("length", str(entry.bytes))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    def read(self, name: str) -> Array:
        """A tensor of the finished file, except INT4, whose values share bytes."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return np.frombuffer(file.read(entry.bytes), entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Finish the file; `entries`, `proto` and `read` still work."""
        self._file.close()


class GraphBuilder:
    """One graph, node by node in the order of the data. Names are paths such as `/layers.0/attn/qkv/MatMul`."""

    def __init__(self, name: str, weights: WeightsFile) -> None:
        self.name = name
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._names: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, dtype: npt.DTypeLike, shape: list[int | str]) -> str:
        """Add a graph input; a string in `shape` is a dynamic dimension. Returns `name`."""
        self.inputs.append(helper.make_tensor_value_info(name, element_type(dtype), shape))
        return name

    def output(self, name: str, value: str, dtype: npt.DTypeLike, shape: list[int | str]) -> None:
        """Make `value` the graph output `name` by renaming it, because an Identity node would copy it."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, other in enumerate(names):
                    if other == value:
                        names[index] = name
        self.outputs.append(helper.make_tensor_value_info(name, element_type(dtype), shape))

    def node(self, op: str, inputs: list[str], path: str, **attributes: Any) -> str:
        """Add a node named `path`/`op` and return its output. Raises ValueError if the name exists already."""
        return self.split(op, inputs, path, 1, **attributes)[0]

    def split(self, op: str, inputs: list[str], path: str, count: int, **attributes: Any) -> list[str]:
        """Add a node with `count` outputs, named like in `node`, and return them."""
        name = f"{path}/{op}"
        if name in self._names:
            raise ValueError(f"two nodes are named {name}")
        self._names.add(name)
        outputs = [f"{name}_output_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: npt.DTypeLike) -> str:
        """A small constant that is stored inside the graph; equal constants are shared."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"/constants/{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = _inline(name, array)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant: axes, shapes, split sizes."""
        return self.constant(values, np.int64)

    def weight(self, name: str) -> str:
        """Use a tensor of the weights file as an initializer. Returns `name`."""
        if name not in self._initializers:
            self._initializers[name] = self.weights.proto(name)
        return name

    def dtype(self, name: str) -> np.dtype[Any]:
        """The stored type of a tensor in the weights file."""
        return self.weights.entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the weights file."""
        return self.weights.entries[name].shape

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as integers with scales."""
        return f"{name}.scale" in self.weights.entries

    def dequantized(self, name: str, path: str, dtype: npt.DTypeLike, axis: int = 1) -> str:
        """Add the `DequantizeLinear` to `dtype` of a tensor stored as integers. Its scales are [outputs] along `axis`, or per block.

        Scales that are stored in another type are cast; onnxruntime does that once, at load. TensorRT needs scales without a cast.
        """
        values, scales = self.weights.entries[name], self.weights.entries[f"{name}.scale"]
        blocked = len(scales.shape) > 1
        attributes = {"axis": 0, "block_size": values.shape[0] // scales.shape[0]} if blocked else {"axis": axis}
        scale = self.weight(f"{name}.scale")
        if scales.dtype != np.dtype(dtype):
            scale = self.node("Cast", [scale], f"{path}/scale", to=element_type(dtype))
        return self.node("DequantizeLinear", [self.weight(name), scale], path, **attributes)

    def packed(self, name: str, path: str, block: int) -> tuple[str, str]:
        """An INT8 matrix [inputs, outputs] with per-channel scales, as 8-bit MatMulNBits wants it, in blocks of `block` inputs.

        Returns the integers plus 128 as uint8 [outputs, blocks, block], and a scale for each block, float32 [outputs * blocks]. onnxruntime
        computes both at load from the tensors of the weights file.
        """
        inputs, outputs = self.shape(name)
        blocks = -(-inputs // block)
        whole = inputs == blocks * block
        shape = (blocks, block, outputs) if whole else (inputs, outputs)
        self._initializers[f"{name}.bytes"] = self.weights.bytes_proto(name, shape)
        matrix = f"{name}.bytes"
        if not whole:
            padding = self.ints(0, 0, blocks * block - inputs, 0)
            matrix = self.node("Pad", [matrix, padding, self.constant(0, np.uint8)], f"{path}/matrix")
            matrix = self.node("Reshape", [matrix, self.ints(blocks, block, outputs)], f"{path}/matrix")
        matrix = self.node("Transpose", [matrix], f"{path}/matrix", perm=[2, 0, 1])
        matrix = self.node("BitwiseXor", [matrix, self.constant(128, np.uint8)], f"{path}/matrix")  # the sign bit: adds 128
        scale = self.node("Cast", [self.weight(f"{name}.scale")], f"{path}/scale", to=element_type(np.float32))
        scale = self.node("Expand", [self.node("Unsqueeze", [scale, self.ints(1)], f"{path}/scale"), self.ints(1, blocks)], f"{path}/scale")
        return matrix, self.node("Reshape", [scale, self.ints(-1)], f"{path}/scale")

    def model(self) -> onnx.ModelProto:
        """The finished model; its weights stay in their file."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self._initializers.values()))
        domains = {node.domain for node in self.nodes if node.domain}
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))],
            ir_version=IR_VERSION,
            producer_name="fastvlm-edge",
            producer_version=__version__,
        )

    def save(self, path: Path) -> None:
        """Write the graph; `path` must be in the directory of the weights file."""
        path.write_bytes(self.model().SerializeToString())


def _inline(name: str, array: Array) -> TensorProto:
    return TensorProto(name=name, data_type=element_type(array.dtype), dims=array.shape, raw_data=bytes(to_bytes(array)))


def cast_weight(name: str, array: Array, dtype: npt.DTypeLike) -> Array:
    """`array` in the float type `dtype`. Raises PrecisionRefused if a value does not fit (FP16 ends at 65504)."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if np.dtype(dtype) == np.float16 and not np.isfinite(cast).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise PrecisionRefused(f"{name} contains {largest:g}, but FP16 ends at 65504", "convert with --precision bf16 or fp32")
    return cast
