"""The graph builder: weights on disk at page borders, shared names, values that onnxruntime reads back."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fastvlm_edge.convert.graphs.builder import ALIGNMENT, GraphBuilder, WeightsFile, cast_weight, to_bytes
from fastvlm_edge.convert.weights.round_to_nearest import dequantize, quantize_blocks, quantize_channels
from fastvlm_edge.errors import FastVLMError


def run(graph: GraphBuilder, path: Path, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    graph.weights.close()
    graph.save(path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("kind", ["float", "channel", "block"])
def test_weights_come_back_as_they_were_written(tmp_path: Path, kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    weights = WeightsFile(tmp_path / "w.weights")
    weights.add("other", np.ones(3, np.float32))
    expected = weight
    if kind == "float":
        weights.add("w", weight)
    else:
        quantized = quantize_channels(weight, 1) if kind == "channel" else quantize_blocks(weight, 16, 4)
        weights.add("w", quantized.values)
        weights.add("w.scale", quantized.scales)
        expected = dequantize(quantized)
    assert weights.entries["w"].offset % ALIGNMENT == 0
    graph = GraphBuilder("test", weights)
    x = graph.input("x", np.float32, ["n", 64])
    value = graph.dequantized("w", "/w", np.float32) if graph.is_quantized("w") else graph.weight("w")
    graph.output("y", graph.node("MatMul", [x, value], "/product"), np.float32, ["n", 6])
    (found,) = run(graph, tmp_path / "g.onnx", {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(found, expected, atol=2e-3 if kind == "block" else 1e-6)


@pytest.mark.parametrize("inputs", [256, 100])
def test_an_int8_matrix_is_packed_as_onnxruntime_wants_it(tmp_path: Path, inputs: int) -> None:
    """Outputs first, 128 for zero, a scale for each block; what fills up the last block is zero."""
    quantized = quantize_channels(np.random.default_rng(0).standard_normal((inputs, 6)).astype(np.float32), 1)
    weights = WeightsFile(tmp_path / "w.weights")
    weights.add("w", quantized.values)
    weights.add("w.scale", quantized.scales.astype(np.float16))
    graph = GraphBuilder("test", weights)
    matrix, scales = graph.packed("w", "/w", 64)
    blocks = -(-inputs // 64)
    graph.output("matrix", matrix, np.uint8, [6, blocks, 64])
    graph.output("scales", scales, np.float32, [6 * blocks])
    found, found_scales = run(graph, tmp_path / "g.onnx", {})
    integers = found.astype(np.int64).reshape(6, -1).T - 128
    np.testing.assert_array_equal(integers[:inputs], quantized.values)
    assert not integers[inputs:].any() and found.shape == (6, blocks, 64)
    np.testing.assert_array_equal(found_scales.reshape(6, blocks), np.repeat(quantized.scales.astype(np.float16)[:, None], blocks, axis=1))


def test_four_bit_values_share_bytes_low_half_first() -> None:
    assert bytes(to_bytes(np.array([1, -2, 7], dtype=ml_dtypes.int4))) == bytes([0xE1, 0x07])


def test_two_nodes_of_one_name_are_refused(tmp_path: Path) -> None:
    graph = GraphBuilder("test", WeightsFile(tmp_path / "w"))
    graph.node("Relu", ["x"], "/a")
    with pytest.raises(ValueError, match="/a/Relu"):
        graph.node("Relu", ["x"], "/a")


def test_equal_constants_are_shared(tmp_path: Path) -> None:
    graph = GraphBuilder("test", WeightsFile(tmp_path / "w"))
    assert graph.ints(1, 2) == graph.ints(1, 2) != graph.ints(2, 1)


def test_a_value_that_fp16_cannot_hold_is_named() -> None:
    with pytest.raises(FastVLMError, match=r"llm\.norm contains 70000.*bf16"):
        cast_weight("llm.norm", np.array([1, 70000], np.float32), np.float16)
    assert cast_weight("w", np.array([70000], np.float32), ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
