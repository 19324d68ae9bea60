"""Rounding of the encoder to INT8, on bare tensors: scales of weights, integers, and activations as ONNX quantises them.

Symmetric throughout: no zero point, and one scale per output of the weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastvlm_edge.calib.encoder.histogram import LEVELS
from fastvlm_edge.calib.gptq import factorize, round_in_order

BLOCK = 64


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """QuantizeLinear to int8 with zero point 0, then DequantizeLinear: ties to even, -128 to 127."""
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def round_scale(scale: Tensor, dtype: npt.DTypeLike) -> Tensor:
    """Scales rounded to `dtype`; 1 in place of those that round to 0."""
    rounded = torch.from_numpy(scale.numpy().astype(dtype).astype(np.float32))
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def weight_scales(weight: Tensor, moment: Tensor) -> Tensor:
    """One scale per row of `weight` [outputs, inputs]: of ranges from the largest weight down to 60 % of it, the one with the least error.

    Errors are weighted by the inputs' second moments `moment` [inputs].
    """
    full = weight.abs().amax(1) / LEVELS
    best, chosen = torch.full_like(full, torch.inf), full
    for ratio in np.linspace(1.0, 0.6, 17).tolist():
        scale = (full * ratio).clamp_min(1e-30)
        rounded = (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).mul_(scale[:, None])
        error = (rounded - weight).square_() @ moment
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def shrink(moment: Tensor, count: int) -> Tensor:
    """Second moments [inputs, inputs] of `count` samples, with the correlations reduced towards 0: the fewer samples, the more.

    Oracle approximating shrinkage (Chen et al., arXiv 0907.4698, equation 23). Without it, rounding would fit the noise of small samples.
    """
    size = len(moment)
    deviation = moment.diagonal().clamp_min(1e-30).sqrt()
    squares = float((moment / deviation / deviation[:, None]).square().sum())
    share = ((1 - 2 / size) * squares + size**2) / max((count + 1 - 2 / size) * (squares - size), 1e-30)
    out = moment * (1 - min(share, 1.0))
    out.diagonal().copy_(moment.diagonal())
    return out


def round_to_data(weight: Tensor, scales: Tensor, moments: Tensor) -> Tensor:
    """Integers [outputs, inputs] in -127..127 of `weight`, chosen by GPTQ for inputs of second moments `moments` [inputs, inputs]."""
    factor = factorize(moments)
    rounded = round_in_order(factor, weight[:, factor.order].T.contiguous(), scales[None], -LEVELS, LEVELS, block=BLOCK)
    out = torch.empty_like(rounded.values)
    out[factor.order] = rounded.values
    return out.T
