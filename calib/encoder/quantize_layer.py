"""One layer of the encoder: its channels are equalised, then it gets integers, scales and a corrected bias.

`equalize_layer` reads the ranges of the layer's inputs, `quantize_layer` their histogram and samples (search.py observes both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.chain import Layer, Ranges
from fastvlm_edge.calib.encoder.histogram import LEVELS, clip_value
from fastvlm_edge.calib.encoder.rounding import fake_quantize, round_scale, round_to_data, shrink, weight_scales
from fastvlm_edge.convert.weights.vision import QuantizedLayer

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the difference between channels moves from activations to weights: alpha of SmoothQuant (arXiv 2211.10438, equation 4)."""


def equalize_layer(layer: Layer) -> None:
    """Choose a factor for each input channel, and fold the factors into the layer's weights and into the module before it.

    s_j = reach_j^alpha / |W_j|^(1-alpha), with the alpha that has the least predicted error. The prediction is the noise of rounding:
    step^2 / 12 of the activations through the weights, and of the weights through the activations.

    No module before a GELU can absorb factors. A convolution after a GELU gets a scale and a shift per channel instead, where that predicts
    a smaller error: a GELU ends at -0.17, so without the shift half of the integers are unused. TensorRT for RTX fuses the Mul and the Add
    with GELU and Q (benchmarks/results/vision_quantization.json).
    """
    assert layer.ranges is not None
    behind_gelu = layer.source is None
    if behind_gelu and not layer.is_conv:
        return
    ranges, weight = layer.ranges, layer.matrix
    # A channel with small values in these pictures may have larger ones in others, so each gets at least the range of the median channel.
    largest = torch.maximum(ranges.largest, -ranges.least)
    largest = torch.maximum(largest, largest.median()).clamp_min(1e-12)
    middle = (largest + ranges.least) / 2 if behind_gelu else torch.zeros_like(largest)
    reach = largest - middle
    mean = (ranges.total / ranges.count).float()
    square = (ranges.square / ranges.count).float() - 2 * middle * mean + middle**2
    column = weight.abs().amax(0).clamp_min(1e-12)
    columns_squared = (weight**2).sum(0)

    def error(s: Tensor, reach: Tensor) -> float:
        noise = (float((reach / s).max()) / LEVELS) ** 2 * float((s**2 * columns_squared).sum())
        steps = ((weight.abs() * s).amax(1) / LEVELS) ** 2
        return noise + float(steps.sum()) * float((square / s**2).sum())

    choices = []
    for strength in STRENGTHS:
        s = reach**strength / column ** (1 - strength)
        s = torch.ones_like(s) if strength == 0 else (s / s.log().mean().exp()).clamp(1 / 64, 64)
        choices.append((error(s, reach), strength, s))
    best, layer.strength, s = min(choices, key=lambda choice: choice[0])
    if behind_gelu:
        square = (ranges.square / ranges.count).float()
        if error(torch.ones_like(s), largest) < best:
            layer.strength = 0.0
            return
        layer.factor, layer.offset = 1 / s, -ranges.least / s  # starts at zero; centred when the clip value is known
    elif layer.strength:
        assert layer.source is not None
        _divide(layer, s)
        layer.ranges = Ranges(ranges.least / s, ranges.largest / s, ranges.total / s, ranges.square / s**2, ranges.count)


def _divide(layer: Layer, s: Tensor) -> None:
    """Divide the input channels of a layer by `s` in the module before it, and multiply its weights by `s`."""
    source = layer.source
    if isinstance(source, nn.Linear):  # the values of an attention: the last third of the outputs of qkv
        weight = source.weight.data.clone()
        weight[-s.numel() :] /= s[:, None]
        source.weight.data = weight
    else:
        assert source is not None
        for part in (source.weight, source.bias):
            assert isinstance(part, Tensor)
            part.data = part.data / s.reshape(-1, *[1] * (part.ndim - 1))
    layer.module.weight.data = layer.module.weight.data * s.reshape(1, -1, *[1] * (layer.module.weight.ndim - 2))
    layer.keep_full()


@dataclass(frozen=True)
class _Inputs:
    """Statistics of a layer's inputs that rounding needs."""

    samples: Tensor
    """[positions, inputs]"""
    mean: Tensor
    covariance: Tensor

    def moved(self, factor: Tensor, offset: Tensor) -> _Inputs:
        """The statistics after `factor` [inputs] multiplies the inputs and `offset` [inputs] is added."""
        return _Inputs(self.samples * factor + offset, self.mean * factor + offset, self.covariance * factor * factor[:, None])


def quantize_layer(layer: Layer, scale_type: npt.DTypeLike) -> None:
    """Make both options of a layer from its histogram and samples, which are dropped afterwards."""
    assert layer.histogram is not None
    samples = torch.cat(layer.samples)
    layer.samples = []
    if layer.offset is None:
        layer.clip = clip_value(layer.histogram)
    else:  # -127 stands for the smallest value, 127 for the clip value
        layer.clip = clip_value(layer.histogram, 2 * LEVELS) / 2
        layer.offset = layer.offset - layer.clip
    activation = float(round_scale(torch.tensor([layer.clip / LEVELS]), scale_type))
    mean = samples.mean(0)
    centred = samples - mean
    inputs = _Inputs(samples, mean, shrink(centred.T @ centred / len(samples), len(samples)))
    weights = _integers(layer, layer.matrix, layer.full_bias, inputs, scale_type)
    layer.options["weights"] = _corrected(layer, weights, layer.matrix, layer.full_bias, inputs, None)
    if layer.factor is None or layer.offset is None:
        layer.options["w8a8"] = _corrected(layer, weights, layer.matrix, layer.full_bias, inputs, activation)
        return
    # x = (y - offset) / factor: the weights are divided by the factor, and the bias loses the contribution of the offset.
    assert layer.full_bias is not None
    weight, inputs = layer.matrix / layer.factor, inputs.moved(layer.factor, layer.offset)
    bias = layer.full_bias - weight @ layer.offset
    integers = _integers(layer, weight, bias, inputs, scale_type)
    option = _corrected(layer, integers, weight, bias, inputs, activation)
    rounded = torch.from_numpy(integers.values).reshape(weight.shape).float() * torch.from_numpy(integers.scales)[:, None]
    plain = _corrected(layer, integers, weight, bias, inputs, None).bias + (rounded @ layer.offset).numpy()
    layer.options["w8a8"] = replace(option, factor=layer.factor.numpy(), offset=layer.offset.numpy(), plain_bias=plain)


def _integers(layer: Layer, weight: Tensor, bias: Tensor | None, inputs: _Inputs, scale_type: npt.DTypeLike) -> QuantizedLayer:
    """Round one weight matrix [outputs, inputs] for its inputs."""
    moments = inputs.covariance
    if bias is None:  # a bias would correct the mean error
        moments = moments + inputs.mean[:, None] * inputs.mean
    scales = round_scale(weight_scales(weight, moments.diagonal()), scale_type)
    values = round_to_data(weight, scales, moments).to(torch.int8)
    stored = values.reshape(layer.full_weight.shape) if layer.is_conv else values.T
    return QuantizedLayer(stored.contiguous().numpy(), scales.numpy(), None if bias is None else bias.numpy(), None)


def _corrected(
    layer: Layer,
    integers: QuantizedLayer,
    weight: Tensor,
    bias: Tensor | None,
    inputs: _Inputs,
    activation: float | None,
) -> QuantizedLayer:
    """The layer with a bias that keeps the mean of its outputs. `activation` is the scale of INT8 inputs; None means float inputs."""
    if bias is not None:
        rounded = torch.from_numpy(integers.values if layer.is_conv else integers.values.T).reshape(weight.shape).float()
        seen = inputs.mean if activation is None else fake_quantize(inputs.samples, activation).mean(0)
        bias = bias + weight @ inputs.mean - (rounded @ seen) * torch.from_numpy(integers.scales)
    return replace(integers, bias=None if bias is None else bias.numpy(), activation_scale=activation)
