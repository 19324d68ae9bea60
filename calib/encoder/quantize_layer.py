"""The techniques of W8A8, and what they make of one layer of the encoder: ranges equalised, then integers, scales and a bias.

`equalize_layer` reads a layer's ranges, `quantize_layer` its histogram and samples (observation.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.chain import Layer, Ranges
from fastvlm_edge.calib.encoder.histogram import LEVELS, OBSERVERS, Observer
from fastvlm_edge.calib.encoder.rounding import fake_quantize, round_scale, round_to_data, round_to_nearest, shrink, weight_scales
from fastvlm_edge.convert.weights.vision import QuantizedLayer

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the difference between channels moves from activations to weights: alpha of SmoothQuant (arXiv 2211.10438, equation 4)."""


@dataclass(frozen=True)
class Recipe:
    """The techniques, each of which can be switched off for comparison."""

    observer: Observer = OBSERVERS["mse"]
    equalize: bool = True
    """Move ranges of channels from a layer's input into its weights where the layer before can absorb the factor exactly."""
    affine_gain: float = 1.0
    """Scale and shift what a GELU gives a convolution, a channel at a time, where the predicted squared error falls by more than this
    factor; `inf` never does. A GELU ends at -0.17, so without the shift half of the integers stand for nothing. The Mul and the Add join
    the kernel of GELU and Q in TensorRT for RTX (benchmarks/results/vision_quantization.json)."""
    rounding: Literal["nearest", "gptq"] = "gptq"
    clip_weights: bool = True
    correct_bias: bool = True


def equalize_layer(layer: Layer, recipe: Recipe) -> None:
    """Choose the layer's factors and fold them into its weights and into what makes its input.

    s_j = reach_j^alpha / |W_j|^(1-alpha), the alpha for which the predicted error is least. What is predicted is the noise of rounding:
    step^2 / 12 of the activations through the weights, and of the weights through the activations.
    """
    assert layer.ranges is not None
    behind_gelu = layer.source is None
    if not (layer.is_conv and np.isfinite(recipe.affine_gain) if behind_gelu else recipe.equalize):
        return
    ranges, weight = layer.ranges, layer.matrix
    # A channel that was quiet in these pictures may speak up in others, so each gets the room of the median one at least.
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
        if error(torch.ones_like(s), largest) < recipe.affine_gain * best:
            layer.strength = 0.0
            return
        layer.factor, layer.offset = 1 / s, -ranges.least / s  # from zero up; centred when the clip value is known
    elif layer.strength:
        assert layer.source is not None
        _divide(layer, s)
        layer.ranges = Ranges(ranges.least / s, ranges.largest / s, ranges.total / s, ranges.square / s**2, ranges.count)


def _divide(layer: Layer, s: Tensor) -> None:
    """Divide the input channels of a layer by `s`, in the module before, and multiply them again in its own weights."""
    source = layer.source
    if isinstance(source, nn.Linear):  # values: the last third of the outputs of qkv
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
    """What rounding needs to know of a layer's inputs."""

    samples: Tensor
    """[positions, inputs]"""
    mean: Tensor
    covariance: Tensor

    def moved(self, factor: Tensor, offset: Tensor) -> _Inputs:
        """Of the inputs multiplied by a factor a channel and shifted."""
        return _Inputs(self.samples * factor + offset, self.mean * factor + offset, self.covariance * factor * factor[:, None])


def quantize_layer(layer: Layer, recipe: Recipe, scale_type: npt.DTypeLike) -> None:
    """Both options of a layer from its histogram and samples, which are dropped afterwards."""
    assert layer.histogram is not None
    samples = torch.cat(layer.samples)
    layer.samples = []
    if layer.offset is None:
        layer.clip = recipe.observer.clip(layer.histogram)
    else:  # -127 is where the values begin, and 127 the clip value
        layer.clip = recipe.observer.clip(layer.histogram, 2 * LEVELS) / 2
        layer.offset = layer.offset - layer.clip
    activation = float(round_scale(torch.tensor([layer.clip / LEVELS]), scale_type))
    mean = samples.mean(0)
    centred = samples - mean
    inputs = _Inputs(samples, mean, shrink(centred.T @ centred / len(samples), len(samples)))
    weights = _integers(layer, layer.matrix, layer.full_bias, inputs, recipe, scale_type)
    layer.options["weights"] = _corrected(layer, weights, layer.matrix, layer.full_bias, inputs, recipe, None)
    if layer.factor is None or layer.offset is None:
        layer.options["w8a8"] = _corrected(layer, weights, layer.matrix, layer.full_bias, inputs, recipe, activation)
        return
    # x = (y - offset) / factor: the weights are divided by the factor, and what the offset adds leaves the bias.
    assert layer.full_bias is not None
    weight, inputs = layer.matrix / layer.factor, inputs.moved(layer.factor, layer.offset)
    bias = layer.full_bias - weight @ layer.offset
    integers = _integers(layer, weight, bias, inputs, recipe, scale_type)
    option = _corrected(layer, integers, weight, bias, inputs, recipe, activation)
    rounded = torch.from_numpy(integers.values).reshape(weight.shape).float() * torch.from_numpy(integers.scales)[:, None]
    plain = _corrected(layer, integers, weight, bias, inputs, recipe, None).bias + (rounded @ layer.offset).numpy()
    layer.options["w8a8"] = replace(option, factor=layer.factor.numpy(), offset=layer.offset.numpy(), plain_bias=plain)


def _integers(
    layer: Layer, weight: Tensor, bias: Tensor | None, inputs: _Inputs, recipe: Recipe, scale_type: npt.DTypeLike
) -> QuantizedLayer:
    """Round one weight matrix [outputs, inputs] for its inputs."""
    moment = inputs.covariance
    if bias is None or not recipe.correct_bias:  # else a mean error is left to the bias
        moment = moment + inputs.mean[:, None] * inputs.mean
    scales = round_scale(weight_scales(weight, moment.diagonal(), clip=recipe.clip_weights), scale_type)
    rounded = round_to_data(weight, scales, moment) if recipe.rounding == "gptq" else round_to_nearest(weight, scales)
    values = rounded.to(torch.int8)
    stored = values.reshape(layer.full_weight.shape) if layer.is_conv else values.T
    return QuantizedLayer(stored.contiguous().numpy(), scales.numpy(), None if bias is None else bias.numpy(), None)


def _corrected(
    layer: Layer,
    integers: QuantizedLayer,
    weight: Tensor,
    bias: Tensor | None,
    inputs: _Inputs,
    recipe: Recipe,
    activation: float | None,
) -> QuantizedLayer:
    """The layer with its inputs quantised too, or not, and a bias that makes the mean of its outputs what it was."""
    if bias is not None and recipe.correct_bias:
        rounded = torch.from_numpy(integers.values if layer.is_conv else integers.values.T).reshape(weight.shape).float()
        seen = inputs.mean if activation is None else fake_quantize(inputs.samples, activation).mean(0)
        bias = bias + weight @ inputs.mean - (rounded @ seen) * torch.from_numpy(integers.scales)
    return replace(integers, bias=None if bias is None else bias.numpy(), activation_scale=activation)
