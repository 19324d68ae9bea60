"""Symmetric round-to-nearest quantisation of weights; `DequantizeLinear` (ONNX opset 21) computes q * scale from the result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.precision import WeightType

LARGEST = {8: 127, 4: 7}
SMALLEST_BLOCK = 32
"""The smallest block that TensorRT's kernels and onnxruntime's MatMulNBits both accept."""
SMALLEST = {8: -127, 4: -8}
"""INT8 does not use -128, as in TensorRT. INT4 uses -8: without it, a sixteenth of its few levels would be lost."""


@dataclass(frozen=True)
class Quantized:
    """Integers of the shape of the weight, int8 or ml_dtypes.int4, with float32 scales.

    Per-channel scales are [outputs]. Per-block scales of a matrix [inputs, outputs] are [inputs / block, outputs].
    """

    values: npt.NDArray[np.generic]
    scales: npt.NDArray[np.float32]


def quantize_channels(weight: npt.NDArray[np.float32], axis: int, bits: int = 8, scale_type: npt.DTypeLike = np.float32) -> Quantized:
    """One scale for every index of `axis`: the smallest one that clips no value, rounded to `scale_type`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = _scale(weight, others, bits, scale_type)
    return Quantized(_round(weight, scales, bits), scales.reshape(-1))


def quantize_blocks(weight: npt.NDArray[np.float32], block: int, bits: int, scale_type: npt.DTypeLike = np.float32) -> Quantized:
    """A matrix [inputs, outputs] with one scale for every `block` consecutive inputs of an output.

    Raises ValueError if the inputs are not a multiple of `block`.
    """
    inputs, outputs = weight.shape
    if inputs % block:
        raise ValueError(f"{inputs} inputs are not a multiple of the block size {block}")
    blocks = weight.reshape(inputs // block, block, outputs)
    scales = _scale(blocks, (1,), bits, scale_type)
    return Quantized(_round(blocks, scales, bits).reshape(inputs, outputs), scales[:, 0])


def stored_type(kind: WeightType, inputs: int) -> WeightType:
    """`kind` for a matrix with `inputs` inputs: the block is halved until it divides them; below 32 it becomes per-channel INT8."""
    block = kind.block
    while block >= SMALLEST_BLOCK:
        if inputs % block == 0:
            return replace(kind, block=block)
        block //= 2
    return replace(kind, bits=8, block=0) if kind.block else kind


def quantize_matrix(weight: npt.NDArray[np.float32], kind: WeightType, scale_type: npt.DTypeLike = np.float32) -> Quantized:
    """A matrix [inputs, outputs] quantised as `stored_type(kind, inputs)`."""
    kind = stored_type(kind, weight.shape[0])
    if kind.block:
        return quantize_blocks(weight, kind.block, kind.bits, scale_type)
    return quantize_channels(weight, 1, kind.bits, scale_type)


def dequantize(quantized: Quantized, axis: int = 1) -> npt.NDArray[np.float32]:
    """The float weight that the graph computes with, in the shape of `quantized.values`; per-channel scales belong to `axis`."""
    values, scales = quantized.values.astype(np.float32), quantized.scales
    if scales.ndim == 1:
        shape = [1] * values.ndim
        shape[axis] = -1
        return values * scales.reshape(shape)
    return values * np.repeat(scales, values.shape[0] // scales.shape[0], axis=0)


def _scale(weight: npt.NDArray[np.float32], axes: tuple[int, ...], bits: int, scale_type: npt.DTypeLike) -> npt.NDArray[np.float32]:
    """Scales that broadcast over `weight`; a scale is 1 where all values are zero, to avoid a division by zero.

    They are rounded to `scale_type` before the values are divided by them, so that storing them adds no error.
    """
    above = weight.max(axis=axes, keepdims=True) / LARGEST[bits]
    below = weight.min(axis=axes, keepdims=True) / SMALLEST[bits]
    scale = np.maximum(above, below)
    scale = scale.astype(scale_type).astype(np.float32)
    scales: npt.NDArray[np.float32] = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return scales


def _round(weight: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.generic]:
    rounded = np.rint(weight / scale)
    np.clip(rounded, SMALLEST[bits], LARGEST[bits], out=rounded)
    values: npt.NDArray[np.generic] = rounded.astype(np.int8)
    return values if bits == 8 else values.astype(ml_dtypes.int4)
