"""What only the studies vary: rules for the clip value, and each technique of `calib/encoder` on or off.

The product has one of each (`calib/encoder/histogram.py`, `calib/encoder/quantize_layer.py`). These are the ones it was chosen from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvlm_edge.calib.decoder import COLUMNS, RATIOS, Solver
from fastvlm_edge.calib.encoder import quantize_layer as product
from fastvlm_edge.calib.encoder.chain import Layer, Unit
from fastvlm_edge.calib.encoder.histogram import BINS, LEVELS, Histogram, clip_value
from fastvlm_edge.calib.encoder.rounding import fake_quantize, round_scale, round_to_data, shrink, weight_scales
from fastvlm_edge.calib.encoder.search import VisionSearch
from fastvlm_edge.calib.gptq import factorize
from fastvlm_edge.convert.precision import FLOAT_TYPES, WeightType
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, stored_type
from fastvlm_edge.convert.weights.vision import QuantizedLayer

_ENTROPY_BINS, _ENTROPY_LEVELS, _ENTROPY_STRIDE = 2048, 128, 8


class Observer(Protocol):
    """A rule that reads the clip value off a histogram."""

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The magnitude that the last of `levels` steps from zero stands for; 0 where nothing but zeros was seen."""


@dataclass(frozen=True)
class MaxObserver:
    """Clip nothing that was seen (TensorRT's `MinMaxCalibrator`)."""

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The largest magnitude."""
        return histogram.largest


@dataclass(frozen=True)
class PercentileObserver:
    """Clip all but `percent` of the values (Wu et al., "Integer quantization for deep learning", arXiv 2004.09602, section 3.3)."""

    percent: float = 99.99

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The upper border of the bin in which the percentile lies, never beyond the largest value."""
        total = int(histogram.counts.sum())
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(histogram.counts), total * self.percent / 100))
        return min(histogram.largest, (index + 1) * histogram.limit / BINS)


@dataclass(frozen=True)
class EntropyObserver:
    """Least KL divergence between the values clipped and the values clipped and quantised, TensorRT's `EntropyCalibrator`.

    Migacz, "8-bit inference with TensorRT", GTC 2017 S7310: 2048 bins, 128 levels, outliers counted in the last bin kept, empty bins left
    empty. Every eighth of its candidates is tried.
    """

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The upper border of the candidate range that diverges least; always for the 128 levels of the source."""
        counts = histogram.counts.reshape(_ENTROPY_BINS, -1).sum(1).astype(np.float64)
        if not histogram.largest:
            return 0.0
        width = histogram.limit / _ENTROPY_BINS
        last = min(_ENTROPY_BINS, math.ceil(histogram.largest / width))
        tail = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
        best, chosen = math.inf, last
        for stop in (*range(_ENTROPY_LEVELS, last, _ENTROPY_STRIDE), last):
            divergence = _divergence(counts[:stop], tail[stop])
            if divergence < best:
                best, chosen = divergence, stop
        return min(histogram.largest, chosen * width)


def _divergence(kept: NDArray[np.float64], outliers: float) -> float:
    """KL(P || Q) of a range: P is `kept` with the outliers in its last bin, Q is `kept` merged to 128 levels and spread out again."""
    reference = kept.copy()
    reference[-1] += outliers
    level = np.arange(kept.size) * min(_ENTROPY_LEVELS, kept.size) // kept.size
    filled = reference > 0
    mass = np.bincount(level, weights=kept)
    spread = np.bincount(level, weights=filled)
    quantized = np.where(filled, (mass / np.maximum(spread, 1))[level], 0.0)
    if not quantized.sum():
        return math.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    with np.errstate(divide="ignore"):
        terms = p[filled] * np.log(p[filled] / q[filled])
    return float(terms.sum())


@dataclass(frozen=True)
class MSEObserver:
    """The product's rule: least mean squared error."""

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """As `clip_value`."""
        return clip_value(histogram, levels)


OBSERVERS: dict[str, Observer] = {
    "max": MaxObserver(),
    "percentile": PercentileObserver(),
    "entropy": EntropyObserver(),
    "mse": MSEObserver(),
}


@dataclass(frozen=True)
class Recipe:
    """The techniques, each of which can be switched off for comparison."""

    observer: Observer = OBSERVERS["mse"]
    equalize: bool = True
    """Move ranges of channels from a layer's input into its weights where the module before it can absorb the factors exactly."""
    shift_behind_gelu: bool = True
    """Scale and shift the outputs of a GELU before a convolution, per channel."""
    rounding: Literal["nearest", "gptq"] = "gptq"
    clip_weights: bool = True
    correct_bias: bool = True


class RecipeSearch(VisionSearch):
    """The product's search with another recipe."""

    def __init__(self, encoder: Any, projector: Any, plan: Any, recipe: Recipe, **options: Any) -> None:
        super().__init__(encoder, projector, plan, **options)
        self.recipe = recipe

    def _equalize(self, unit: Unit) -> None:
        measured = [layer.ranges for layer in unit.layers]
        for layer in reversed(unit.layers):
            behind_gelu = layer.source is None
            if self.recipe.shift_behind_gelu if behind_gelu else self.recipe.equalize:
                product.equalize_layer(layer)
        for layer, ranges in zip(unit.layers, measured, strict=True):
            layer.keep_full()
            layer.ranges = ranges

    def _quantize(self, unit: Unit) -> None:
        for layer in unit.layers:
            quantize_layer(layer, self.recipe, FLOAT_TYPES[self.plan.vision[unit.stage]])


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
    inputs = product._Inputs(samples, mean, shrink(centred.T @ centred / len(samples), len(samples)))
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
    layer: Layer, weight: Tensor, bias: Tensor | None, inputs: product._Inputs, recipe: Recipe, scale_type: npt.DTypeLike
) -> QuantizedLayer:
    """Round one weight matrix [outputs, inputs] for its inputs."""
    moment = inputs.covariance
    if bias is None or not recipe.correct_bias:  # else a mean error is left to the bias
        moment = moment + inputs.mean[:, None] * inputs.mean
    chosen = weight_scales(weight, moment.diagonal()) if recipe.clip_weights else weight.abs().amax(1) / LEVELS
    scales = round_scale(chosen, scale_type)
    rounded = round_to_data(weight, scales, moment) if recipe.rounding == "gptq" else round_to_nearest(weight, scales)
    values = rounded.to(torch.int8)
    stored = values.reshape(layer.full_weight.shape) if layer.is_conv else values.T
    return QuantizedLayer(stored.contiguous().numpy(), scales.numpy(), None if bias is None else bias.numpy(), None)


def _corrected(
    layer: Layer,
    integers: QuantizedLayer,
    weight: Tensor,
    bias: Tensor | None,
    inputs: product._Inputs,
    recipe: Recipe,
    activation: float | None,
) -> QuantizedLayer:
    """The layer with its inputs quantised too, or not, and a bias that makes the mean of its outputs what it was."""
    if bias is not None and recipe.correct_bias:
        rounded = torch.from_numpy(integers.values if layer.is_conv else integers.values.T).reshape(weight.shape).float()
        seen = inputs.mean if activation is None else fake_quantize(inputs.samples, activation).mean(0)
        bias = bias + weight @ inputs.mean - (rounded @ seen) * torch.from_numpy(integers.scales)
    return replace(integers, bias=None if bias is None else bias.numpy(), activation_scale=activation)


def round_to_nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """Integers [outputs, inputs] in -127..127 of a weight with one scale an output."""
    return (weight / scales[:, None]).round_().clamp_(-LEVELS, LEVELS)


def quantize_gptq(
    weight: NDArray[np.float32],
    moments: NDArray[np.float32],
    kind: WeightType,
    scale_type: npt.DTypeLike = np.float32,
    ratios: Sequence[float] = RATIOS,
) -> Quantized:
    """A matrix [inputs, outputs] as the decoder's GPTQ quantises it for inputs of second moments `moments` [inputs, inputs]."""
    solver = Solver(stored_type(kind, len(weight)), np.dtype(scale_type), factorize(torch.from_numpy(moments).clone()), ratios)
    parts = [solver.quantize(columns) for columns in torch.split(torch.from_numpy(weight), COLUMNS, dim=1)]
    values = torch.cat([part.values for part in parts], dim=1).numpy()
    scales = torch.cat([part.scales for part in parts], dim=-1).numpy()
    return Quantized(values.astype(ml_dtypes.int4) if solver.kind.bits == 4 else values, scales)
