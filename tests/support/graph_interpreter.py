"""Runs an ONNX graph node by node and rounds every value to the type that the graph declares for it.

onnxruntime's CPU provider computes FP16 in FP32 and has no BF16, so it cannot show what a graph loses on a GPU. This interpreter can. It
does not know how TensorRT fuses nodes: a fused kernel may skip roundings that are made here, but it adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
STEP = 16
"""Products that a tensor core adds before it rounds the sum: the inner size of `mma.m16n8k16` (PTX ISA)."""


class Interpreter:
    """One graph with its weights.

    `exact` computes in float64 throughout and ignores every Cast between floats: the graph's own result without rounding.
    `narrow_sums` rounds a sum of products after every STEP products to the type of the inputs: `declared` where the inputs are declared
    FP16 or BF16, `all` also where an FP32 input is the Cast of a narrow value, as in a library that ignores such a Cast.
    `rounded` is a fault to inject: it gives the type that the output of a node is rounded to, by the name of the node, or None.
    """

    def __init__(
        self,
        path: Path,
        *,
        exact: bool = False,
        narrow_sums: str = "",
        rounded: Callable[[str], npt.DTypeLike | None] = lambda name: None,
    ) -> None:
        self.exact, self.narrow_sums, self.rounded = exact, narrow_sums, rounded
        graph = onnx.load(str(path)).graph
        self.nodes = list(graph.node)
        self.outputs = [output.name for output in graph.output]
        self.constants = {tensor.name: self._stored(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        self.narrow_source: dict[str, np.dtype[Any]] = {}
        """FP32 value -> the narrow type that it was cast from, in the last run."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of the graph by its name, inputs and outputs included."""
        values = {**self.constants, **{name: self._stored(array) for name, array in feeds.items()}}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                inputs = [values[name] if name else None for name in node.input]
                attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
                results = self._compute(node, inputs, attributes)
                fault = self.rounded(node.name)
                for name, result in zip(node.output, results, strict=True):
                    values[name] = result if fault is None else result.astype(fault).astype(result.dtype)
        return values

    # Types ----------------------------------------------------------------------------------------------------------------------

    def _stored(self, array: Array) -> Array:
        return array.astype(np.float64) if self.exact and _is_float(array.dtype) else array

    def _up(self, array: Array) -> Array:
        """Floats in the type that arithmetic is done in; integers and booleans as they are."""
        return array.astype(np.float32) if array.dtype in NARROW else array

    def _same(self, function: Callable[..., Array], *inputs: Array) -> list[Array]:
        """`function` of the inputs, rounded to the type of the first one."""
        return [function(*map(self._up, inputs)).astype(inputs[0].dtype)]

    # Operators ------------------------------------------------------------------------------------------------------------------

    def _compute(self, node: onnx.NodeProto, inputs: list[Any], attributes: dict[str, Any]) -> list[Array]:
        op = node.op_type
        if op in _ELEMENTWISE:
            return self._same(_ELEMENTWISE[op], *inputs)
        if op in _COMPARE:
            return [_COMPARE[op](*inputs)]
        operator: Callable[..., list[Array]] = getattr(self, f"_{op.lower()}")
        if op in ("MatMul", "Gemm", "Conv", "Cast"):
            return operator(node, *inputs, **attributes)
        return operator(*inputs, **attributes)

    def _cast(self, node: onnx.NodeProto, x: Array, *, to: int) -> list[Array]:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(to))
        if self.exact and _is_float(dtype):
            dtype = np.dtype(np.float64)
        if x.dtype in NARROW and dtype == np.float32:
            self.narrow_source[node.output[0]] = x.dtype
        return [x.astype(dtype)]

    def _matmul(self, node: onnx.NodeProto, a: Array, b: Array) -> list[Array]:
        return [self._product(node, a, b)]

    def _gemm(self, node: onnx.NodeProto, a: Array, b: Array, *, transB: int = 0) -> list[Array]:
        return [self._product(node, a, b.T if transB else b)]

    def _product(self, node: onnx.NodeProto, a: Array, b: Array) -> Array:
        """a [..., m, k] times b [..., k, n], with sums in the type that `narrow_sums` says."""
        sums = np.dtype(np.float32)
        if self.narrow_sums and a.dtype in NARROW:
            sums = a.dtype
        elif self.narrow_sums == "all" and all(name in self.narrow_source for name in node.input[:2]):
            sums = self.narrow_source[node.input[0]]
        wide_a, wide_b = self._up(a), self._up(b)
        if sums not in NARROW or self.exact:
            return np.asarray(wide_a @ wide_b).astype(a.dtype)
        total: Array = np.zeros((1,), sums)
        for start in range(0, a.shape[-1], STEP):
            part = wide_a[..., start : start + STEP] @ wide_b[..., start : start + STEP, :]
            total = (total.astype(np.float32) + part).astype(sums)
        return total.astype(a.dtype)

    def _conv(
        self,
        node: onnx.NodeProto,
        x: Array,
        weight: Array,
        bias: Array,
        *,
        group: int,
        kernel_shape: list[int],
        pads: list[int],
        strides: list[int],
    ) -> list[Array]:
        """A convolution as one product for each group: x [batch, channels, height, width], weight [outputs, channels / group, k, k]."""
        size, stride, pad = kernel_shape[0], strides[0], pads[0]
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
        batch, channels, height, width = windows.shape[:4]
        columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, group, channels // group * size * size, height * width)
        rows = weight.reshape(group, len(weight) // group, -1)
        product = self._product(node, rows, columns).reshape(batch, len(weight), height, width)
        return self._same(np.add, product, bias.reshape(-1, 1, 1))

    def _softmax(self, x: Array, *, axis: int) -> list[Array]:
        def softmax(scores: Array) -> Array:
            share = np.exp(scores - scores.max(axis=axis, keepdims=True))
            return np.asarray(share / share.sum(axis=axis, keepdims=True))

        return self._same(softmax, x)

    def _reducemean(self, x: Array, axes: Array, *, keepdims: int = 1) -> list[Array]:
        return self._same(lambda wide: wide.mean(axis=tuple(axes), keepdims=bool(keepdims)), x)

    def _reducesum(self, x: Array, axes: Array, *, keepdims: int = 1) -> list[Array]:
        return self._same(lambda wide: wide.sum(axis=tuple(axes), keepdims=bool(keepdims)), x)

    def _quantizelinear(self, x: Array, scale: Array, zero: Array) -> list[Array]:
        return [np.clip(np.rint(self._up(x) / self._up(scale)), -128, 127).astype(zero.dtype)]

    def _dequantizelinear(self, x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1, block_size: int = 0) -> list[Array]:
        values, scales = x.astype(np.float32), self._up(scale)
        if block_size:
            scales = np.repeat(scales, block_size, axis=axis)
        elif scale.ndim:
            shape = [1] * x.ndim
            shape[axis] = -1
            scales = scales.reshape(shape)
        return [(values * scales).astype(scale.dtype)]

    # Shapes and places ----------------------------------------------------------------------------------------------------------

    def _concat(self, *parts: Array, axis: int) -> list[Array]:
        return [np.concatenate(parts, axis)]

    def _expand(self, x: Array, shape: Array) -> list[Array]:
        return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))]

    def _gather(self, x: Array, indices: Array, *, axis: int = 0) -> list[Array]:
        return [np.take(x, indices, axis)]

    def _gathernd(self, x: Array, indices: Array, *, batch_dims: int) -> list[Array]:
        assert batch_dims == 1 and indices.shape[-1] == 1
        return [np.stack([row[places[:, 0]] for row, places in zip(x, indices, strict=True)])]

    def _gatherelements(self, x: Array, indices: Array, *, axis: int) -> list[Array]:
        return [np.take_along_axis(x, indices, axis)]

    def _pad(self, x: Array, pads: Array, value: Array) -> list[Array]:
        before, after = np.split(pads, 2)
        return [np.pad(x, list(zip(before, after, strict=True)), constant_values=value)]

    def _range(self, start: Array, stop: Array, step: Array) -> list[Array]:
        return [np.arange(start.item(), stop.item(), step.item(), dtype=start.dtype)]

    def _reshape(self, x: Array, shape: Array) -> list[Array]:
        return [x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])]

    def _shape(self, x: Array, *, start: int = 0, end: int | None = None) -> list[Array]:
        return [np.array(x.shape[start:end], np.int64)]

    def _slice(self, x: Array, starts: Array, ends: Array, axes: Array) -> list[Array]:
        cut = [slice(None)] * x.ndim
        for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
            cut[axis] = slice(start, end)
        return [x[tuple(cut)]]

    def _split(self, x: Array, sizes: Array, *, axis: int) -> list[Array]:
        return np.split(x, np.cumsum(sizes)[:-1], axis)

    def _squeeze(self, x: Array, axes: Array | None = None) -> list[Array]:
        return [np.squeeze(x, None if axes is None else tuple(axes))]

    def _topk(self, x: Array, count: Array, *, axis: int, largest: int, sorted: int) -> list[Array]:
        assert axis == -1 and largest == sorted == 1
        order = np.argsort(-x, axis=-1, kind="stable")[..., : int(count[0])]
        return [np.take_along_axis(x, order, -1), order]

    def _transpose(self, x: Array, *, perm: list[int]) -> list[Array]:
        return [x.transpose(perm)]

    def _unsqueeze(self, x: Array, axes: Array) -> list[Array]:
        return [np.expand_dims(x, tuple(axes.tolist()))]

    def _where(self, condition: Array, a: Array, b: Array) -> list[Array]:
        return [np.where(condition, a, b)]


def _is_float(dtype: npt.DTypeLike) -> bool:
    return np.dtype(dtype) in (*NARROW, np.dtype(np.float32), np.dtype(np.float64))


def _erf(x: Array) -> Array:
    import torch

    return np.asarray(torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy())


_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: a // b if a.dtype.kind == "i" else a / b,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Log": np.log,
    "Cos": np.cos,
    "Sin": np.sin,
    "Erf": _erf,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
_COMPARE: dict[str, Callable[..., Array]] = {"Less": np.less, "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal}
