"""The decoder with quantised matrices, dequantised as the graphs do it: takes the place of a `Checkpoint` in reference/decoder.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, TextConfig
from fastvlm_edge.convert.graphs.builder import WeightsFile
from fastvlm_edge.convert.precision import PrecisionPlan
from fastvlm_edge.convert.weights.decoder import QuantizedMatrices, layer_matrices
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, dequantize, quantize_channels

Float32 = npt.NDArray[np.float32]


class QuantizedDecoder:
    """A `Checkpoint` whose matrices are replaced by quantised ones, for `reference_logits` and `reference_choices`."""

    head_name = "lm_head.weight"

    def __init__(self, source: Checkpoint, quantized: QuantizedMatrices, plan: PrecisionPlan) -> None:
        """`plan` is the one that the matrices were quantised with."""
        self.source, self.quantized, self.embedding = source, quantized, bool(plan.embedding.bits)
        self.text: TextConfig = source.text
        layers = [layer_matrices(f"llm.layers.{index}", source.text, plan.up_shift(index)) for index in range(source.text.layers)]
        self._matrix_of = {module: (name, parts) for layer in layers for name, parts in layer.items() for module, _ in parts}
        self._last: tuple[str, Quantized] | None = None

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """The tensor `name` as `Checkpoint.tensor` returns it: a matrix is [outputs, inputs]."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self._matrix_of:
            return self.source.tensor(name)
        matrix, parts = self._matrix_of[module]
        start = 0
        for part, factor in parts:
            stop = start + self.source.shape(f"{part}.weight")[0]
            if part == module:
                outputs: Float32 = self._outputs(matrix, start, stop) / np.float32(factor)
                return outputs
            start = stop
        raise KeyError(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of the head or the embedding, [stop - start, hidden]."""
        if name == self.head_name:
            return self._outputs("llm.head", start, stop)
        rows = self.source.tensor_rows(name, start, stop)
        if not self.embedding:
            return rows
        return dequantize(quantize_channels(rows.astype(np.float32), 0, scale_type=self.quantized.scale_type), axis=0)

    def _outputs(self, name: str, start: int, stop: int) -> Float32:
        """Outputs [start, stop) of a matrix, transposed to [outputs, inputs].

        The last matrix stays in memory, because its parts are read one after another.
        """
        if self._last is None or self._last[0] != name:
            self._last = (name, self.quantized.matrix(name))
        whole = self._last[1]
        columns: Float32 = dequantize(Quantized(whole.values[:, start:stop], whole.scales[..., start:stop])).T
        return columns


class StoredMatrices:
    """The integers and scales of a written `decoder.weights`, read back with ONNX's own reader."""

    def __init__(self, weights: WeightsFile) -> None:
        """`weights` must be closed, and its file must still exist."""
        self.weights = weights

    @property
    def scale_type(self) -> np.dtype[Any]:
        """The float type that the scales are stored in."""
        return self.weights.entries["llm.head.scale"].dtype

    def matrix(self, name: str) -> Quantized:
        """Integers [inputs, outputs] and scales of the matrix `name`."""
        return Quantized(self._read(name), self._read(f"{name}.scale").astype(np.float32))

    def _read(self, name: str) -> npt.NDArray[Any]:
        tensor = self.weights.proto(name)
        load_external_data_for_tensor(tensor, str(self.weights.path.parent))
        return numpy_helper.to_array(tensor)
