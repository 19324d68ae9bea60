"""A checkpoint whose matrices are integers with scales, as the graphs compute them, for `reference.py` in place of a `Checkpoint`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, TextConfig
from fastvlm_edge.convert.graphs.builder import WeightsFile
from fastvlm_edge.convert.weights.decoder import QuantizedMatrices, attention_parts
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, dequantize, quantize_channels

Float32 = npt.NDArray[np.float32]


class QuantizedDecoder:
    """A checkpoint whose matrices are those of a quantisation. Stands in for a `Checkpoint`."""

    head_name = "lm_head.weight"

    def __init__(self, source: Checkpoint, quantized: QuantizedMatrices, *, embedding: bool) -> None:
        """`embedding` says that its table is rounded to INT8 a row."""
        self.source, self.quantized, self.embedding = source, quantized, embedding
        self.text: TextConfig = source.text
        self._last: tuple[str, Quantized] | None = None

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor [outputs, inputs] as `Checkpoint.tensor` gives it."""
        module, _, kind = name.rpartition(".")
        layer, _, part = module.rpartition(".self_attn." if ".self_attn." in module else ".mlp.")
        if not layer or kind != "weight":
            return self.source.tensor(name)
        if part in ("o_proj", "down_proj"):
            return self._outputs(f"{layer}.{'down' if part == 'down_proj' else part}")
        if part in ("gate_proj", "up_proj"):
            fused, parts = f"{layer}.gate_up", [(f"{layer}.mlp.{half}_proj", 1.0) for half in ("gate", "up")]
        else:
            fused, parts = f"{layer}.qkv", attention_parts(layer, self.text)
        start = 0
        for path, factor in parts:
            stop = start + self.source.shape(f"{path}.weight")[0]
            if path == module:
                outputs: Float32 = self._outputs(fused, start, stop) / np.float32(factor)
                return outputs
            start = stop
        raise KeyError(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of the head or the embedding."""
        if name == self.head_name:
            return self._outputs("llm.head", start, stop)
        rows = self.source.tensor_rows(name, start, stop)
        if not self.embedding:
            return rows
        return dequantize(quantize_channels(rows.astype(np.float32), 0, scale_type=self.quantized.scale_type), axis=0)

    def _outputs(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Outputs `start` to `stop` of a matrix [inputs, outputs], as [outputs, inputs].

        The last matrix is kept, since its parts are asked for one after another.
        """
        if self._last is None or self._last[0] != name:
            self._last = (name, self.quantized.matrix(name))
        whole = self._last[1]
        columns: Float32 = dequantize(Quantized(whole.values[:, start:stop], whole.scales[..., start:stop])).T
        return columns


class StoredMatrices:
    """The integers and scales that were written to `decoder.weights`, read back by ONNX's own reader."""

    def __init__(self, weights: WeightsFile) -> None:
        """`weights` is closed, and its file still there."""
        self.weights = weights

    @property
    def scale_type(self) -> np.dtype[Any]:
        """The type that the scales are stored in."""
        return self.weights.entries["llm.head.scale"].dtype

    def matrix(self, name: str) -> Quantized:
        """Integers [inputs, outputs] and scales of a matrix by its name in the file."""
        return Quantized(self._read(name), self._read(f"{name}.scale").astype(np.float32))

    def _read(self, name: str) -> npt.NDArray[Any]:
        tensor = self.weights.proto(name)
        load_external_data_for_tensor(tensor, str(self.weights.path.parent))
        return numpy_helper.to_array(tensor)
