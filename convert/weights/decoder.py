"""The decoder's weights in the types of a precision plan, written tensor by tensor: a 7B model needs far less memory than its size.

Names: `llm.layers.N.{qkv,qkv.bias,o_proj,gate_up,down,input_norm,post_norm}`, `llm.embedding`, `llm.norm`, `llm.head`,
`llm.rotary.{cos,sin}`. A matrix is
[inputs, outputs]. A matrix stored as integers has its scales in a second tensor, `NAME.scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, TextConfig
from fastvlm_edge.convert.graphs.builder import WeightsFile, cast_weight
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan, WeightType
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, quantize_channels, quantize_matrix

ROWS = 8192
"""How many rows of the embedding or head are read at a time."""

Float32 = npt.NDArray[np.float32]


class QuantizedMatrices(Protocol):
    """Matrices that are quantised already: by calibration (`calib.decoder.DecoderQuantization`), or stored (`StoredMatrices`)."""

    @property
    def scale_type(self) -> np.dtype[Any]:
        """The float type that holds the scales exactly."""

    def matrix(self, name: str) -> Quantized:
        """Integers [inputs, outputs] and scales of the matrix `name`, as in `layer_matrices` or `llm.head`."""


def write_decoder_weights(
    source: Checkpoint,
    plan: PrecisionPlan,
    weights: WeightsFile,
    advance: Callable[[], None],
    quantized: QuantizedMatrices | None = None,
    *,
    context: int,
) -> None:
    """Append every weight of the decoder to `weights` in the types of the plan, and the rotary tables for `context` positions.

    Matrices that the plan stores as integers come from `quantized` if it is given; otherwise they are rounded to nearest. `advance` is
    called once for the embedding, once for each layer and once for the head. Memory: one layer's largest matrix in float32, or the head in
    its stored type. Raises ValueError if the scales of `quantized` do not have the plan's float type.
    """
    if quantized is not None and quantized.scale_type != FLOAT_TYPES[plan.decoder]:
        raise ValueError(f"the scales are {quantized.scale_type}, but the plan's decoder is {plan.decoder}: calibrate with the same plan")
    text = source.text
    store = _Store(weights, FLOAT_TYPES[plan.decoder], quantized)
    store.embedding(source, plan)
    advance()
    for layer in range(text.layers):
        name = f"llm.layers.{layer}"
        store.vector(f"{name}.input_norm", source.tensor(f"{name}.input_layernorm.weight"))
        store.vector(f"{name}.post_norm", source.tensor(f"{name}.post_attention_layernorm.weight"))
        for matrix, parts in layer_matrices(name, text, plan.up_shift(layer)).items():
            store.matrix(matrix, _matrices(source, parts), plan.body)
            if matrix.endswith(".qkv"):
                biases = [_float32(source.tensor(f"{part}.bias")) * np.float32(factor) for part, factor in parts]
                store.vector(f"{matrix}.bias", np.concatenate(biases))
        advance()
    store.vector("llm.norm", source.tensor("llm.norm.weight"))
    store.head(source, plan)
    for table, values in rotary_tables(text, context).items():
        weights.add(f"llm.rotary.{table}", values)
    advance()


def rotary_tables(text: TextConfig, context: int) -> dict[str, Float32]:
    """`cos` and `sin` of position * theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864), [context, head_dim / 2] each.

    They are stored, because the fast sine of a GPU is off by 1e-3 at the angles of long contexts.
    """
    half = text.head_dim // 2
    angles = np.arange(context)[:, None] * text.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def layer_matrices(layer: str, text: TextConfig, up_shift: int = 0) -> dict[str, list[tuple[str, float]]]:
    """The matrices of a layer such as `llm.layers.0`: name -> modules of the checkpoint whose outputs it joins, in order.

    Matrices with the same inputs are one, so that one product computes them all. Each module comes with the factor on its weight and bias:
    1 / sqrt(head_dim) for the queries, which may be applied before the rotary embedding because the rotation is linear, and 2^-up_shift for
    up_proj (`PrecisionPlan.up_shifts`).
    """
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return {
        f"{layer}.qkv": [(f"{attention}.q_proj", text.head_dim**-0.5), (f"{attention}.k_proj", 1.0), (f"{attention}.v_proj", 1.0)],
        f"{layer}.o_proj": [(f"{attention}.o_proj", 1.0)],
        f"{layer}.gate_up": [(f"{mlp}.gate_proj", 1.0), (f"{mlp}.up_proj", 2.0**-up_shift)],
        f"{layer}.down": [(f"{mlp}.down_proj", 1.0)],
    }


def _float32(array: npt.NDArray[Any]) -> Float32:
    return array.astype(np.float32)


def _matrices(source: Checkpoint, parts: list[tuple[str, float]]) -> Iterator[Float32]:
    """Each part as [inputs, outputs], times its factor."""
    for part, factor in parts:
        weight = np.ascontiguousarray(_float32(source.tensor(f"{part}.weight")).T)
        yield weight if factor == 1.0 else weight * np.float32(factor)


class _Store:
    """Writes weights into the file in the types that they are stored in."""

    def __init__(self, weights: WeightsFile, dtype: npt.DTypeLike, calibrated: QuantizedMatrices | None) -> None:
        self.weights = weights
        self.dtype = dtype
        self.calibrated = calibrated

    def vector(self, name: str, array: npt.NDArray[Any]) -> None:
        self.weights.add(name, cast_weight(name, array, self.dtype))

    def matrix(self, name: str, parts: Iterator[Float32], kind: WeightType) -> None:
        """Join `parts`, each [inputs, outputs], along the outputs, and write them as `kind`."""
        if not kind.bits:
            self.weights.add(name, np.concatenate([cast_weight(name, part, self.dtype) for part in parts], axis=1))
            return
        if self.calibrated is not None:
            known = self.calibrated.matrix(name)
            self.quantized(name, known.values, known.scales)
            return
        quantized = [quantize_matrix(part, kind, self.dtype) for part in parts]
        self.quantized(name, np.concatenate([q.values for q in quantized], axis=1), np.concatenate([q.scales for q in quantized], axis=-1))

    def quantized(self, name: str, values: npt.NDArray[Any], scales: Float32) -> None:
        self.weights.add(name, values)
        self.weights.add(f"{name}.scale", scales.astype(self.dtype))

    def embedding(self, source: Checkpoint, plan: PrecisionPlan) -> None:
        """[vocab, hidden], as floats or as int8 with one scale for each row."""
        text = source.text
        name = "llm.embed_tokens.weight"
        if plan.embedding.bits:
            values = np.empty((text.vocab, text.hidden), np.int8)
            scales = np.empty(text.vocab, np.float32)
            for start, chunk in self._rows(source, name):
                quantized = quantize_channels(chunk, 0, scale_type=self.dtype)
                values[start : start + len(chunk)], scales[start : start + len(chunk)] = quantized.values, quantized.scales
            self.quantized("llm.embedding", values, scales)
            return
        self.weights.add("llm.embedding", self._table(source, name))

    def head(self, source: Checkpoint, plan: PrecisionPlan) -> None:
        """[hidden, vocab] as integers, [vocab, hidden] as floats. A tied head in floats is the embedding and is not written again."""
        text = source.text
        if not plan.head.bits and text.tied:
            return
        name = "llm.embed_tokens.weight" if text.tied else "lm_head.weight"
        if not plan.head.bits:
            self.weights.add("llm.head", self._table(source, name))
            return
        if self.calibrated is not None:
            known = self.calibrated.matrix("llm.head")
            self.quantized("llm.head", known.values, known.scales)
            return
        values: npt.NDArray[Any] | None = None
        scales = []
        for start, chunk in self._rows(source, name):
            quantized = quantize_matrix(np.ascontiguousarray(chunk.T), plan.head, self.dtype)
            if values is None:
                values = np.empty((text.hidden, text.vocab), quantized.values.dtype)
            values[:, start : start + len(chunk)] = quantized.values
            scales.append(quantized.scales)
        assert values is not None
        self.quantized("llm.head", values, np.concatenate(scales, axis=-1))

    def _table(self, source: Checkpoint, name: str) -> npt.NDArray[Any]:
        """The tensor `name` [vocab, hidden] in the plan's float type."""
        table = np.empty((source.text.vocab, source.text.hidden), self.dtype)
        for start, chunk in self._rows(source, name):
            table[start : start + len(chunk)] = cast_weight(name, chunk, self.dtype)
        return table

    @staticmethod
    def _rows(source: Checkpoint, name: str) -> Iterator[tuple[int, Float32]]:
        for start in range(0, source.text.vocab, ROWS):
            yield start, _float32(source.tensor_rows(name, start, min(start + ROWS, source.text.vocab)))
