"""Round-to-nearest quantisation: errors within half a step, shapes and limits as ONNX and TensorRT take them."""

import ml_dtypes
import numpy as np
import pytest

from fastvlm_edge.convert.precision import INT4_BLOCK, INT8_CHANNEL
from fastvlm_edge.convert.weights.round_to_nearest import dequantize, quantize_blocks, quantize_channels, quantize_matrix

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -127, 127), (4, -8, 7)])
def test_a_channel_is_rounded_to_the_nearest_step(bits: int, low: int, high: int) -> None:
    weight = RNG.standard_normal((48, 20)).astype(np.float32)
    quantized = quantize_channels(weight, 1, bits)
    values = quantized.values.astype(np.int32)
    assert quantized.scales.shape == (20,)
    assert values.min() >= low
    assert values.max() <= high
    assert np.all(np.abs(dequantize(quantized) - weight) <= quantized.scales / 2 * 1.0001)


def test_a_block_has_a_scale_of_its_own() -> None:
    weight = RNG.standard_normal((64, 5)).astype(np.float32)
    weight[32:] *= 1000
    quantized = quantize_blocks(weight, 32, 4)
    assert quantized.values.dtype == ml_dtypes.int4
    assert quantized.scales.shape == (2, 5)
    error = np.abs(dequantize(quantized) - weight)
    assert np.all(error[:32] <= quantized.scales[0] / 2 * 1.0001)
    assert error[:32].max() < 0.3  # the large half does not spoil the small one


def test_convolution_weights_keep_their_shape() -> None:
    weight = RNG.standard_normal((6, 3, 7, 7)).astype(np.float32)
    quantized = quantize_channels(weight, 0)
    assert quantized.values.shape == weight.shape
    assert quantized.scales.shape == (6,)
    assert np.abs(dequantize(quantized, axis=0) - weight).max() <= quantized.scales.max() / 2 * 1.0001


def test_zeros_stay_zero() -> None:
    quantized = quantize_blocks(np.zeros((32, 3), np.float32), 32, 4)
    assert np.all(dequantize(quantized) == 0)
    assert np.all(quantized.scales == 1)


@pytest.mark.parametrize(("inputs", "block"), [(256, 128), (192, 64), (96, 32)])
def test_the_block_is_the_largest_that_divides_the_inputs(inputs: int, block: int) -> None:
    quantized = quantize_matrix(RNG.standard_normal((inputs, 8)).astype(np.float32), INT4_BLOCK)
    assert quantized.values.dtype == ml_dtypes.int4
    assert quantized.scales.shape == (inputs // block, 8)


def test_inputs_that_no_block_divides_get_int8_channels() -> None:
    quantized = quantize_matrix(RNG.standard_normal((40, 8)).astype(np.float32), INT4_BLOCK)
    assert quantized.values.dtype == np.int8
    assert quantized.scales.shape == (8,)


def test_int8_is_closer_than_int4() -> None:
    weight = RNG.standard_normal((256, 64)).astype(np.float32)
    errors = [np.linalg.norm(dequantize(quantize_matrix(weight, kind)) - weight) for kind in (INT8_CHANNEL, INT4_BLOCK)]
    assert errors[0] * 5 < errors[1]
