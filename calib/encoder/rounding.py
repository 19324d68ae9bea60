"""Rounding to INT8, on bare tensors: scales of weights, integers to nearest or to data, and activations as ONNX quantises them.

Symmetric throughout: no zero point, and one scale an output of the weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastvlm_edge.calib.encoder.histogram import LEVELS

DAMPING = 0.01
"""Share of the mean second moment that is added to each (Frantar et al., GPTQ, arXiv 2210.17323, section 3.3)."""
BLOCK = 64


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """What QuantizeLinear to int8 with zero point 0 and DequantizeLinear make of `x`: ties to even, -128 to 127."""
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def round_scale(scale: Tensor, dtype: npt.DTypeLike) -> Tensor:
    """Scales as `dtype` holds them; 1 where nothing is left."""
    rounded = torch.from_numpy(scale.numpy().astype(dtype).astype(np.float32))
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def weight_scales(weight: Tensor, moment: Tensor, *, clip: bool) -> Tensor:
    """One a row: the largest weight, or the range up to 40 % less whose error, weighted by the inputs' second moments, is least."""
    full = weight.abs().amax(1) / LEVELS
    if not clip:
        return full
    best, chosen = torch.full_like(full, torch.inf), full
    for ratio in np.linspace(1.0, 0.6, 17).tolist():
        scale = (full * ratio).clamp_min(1e-30)
        rounded = (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).mul_(scale[:, None])
        error = (rounded - weight).square_() @ moment
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def shrink(moment: Tensor, count: int) -> Tensor:
    """Second moments of `count` samples, with those of two different inputs reduced by as much as so few samples misjudge them.

    Oracle approximating shrinkage (Chen et al., arXiv 0907.4698, equation 23) of the correlations: without it, rounding would follow the
    chance of small samples.
    """
    size = len(moment)
    deviation = moment.diagonal().clamp_min(1e-30).sqrt()
    squares = float((moment / deviation / deviation[:, None]).square().sum())
    share = ((1 - 2 / size) * squares + size**2) / max((count + 1 - 2 / size) * (squares - size), 1e-30)
    out = moment * (1 - min(share, 1.0))
    out.diagonal().copy_(moment.diagonal())
    return out


def round_to_nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """Integers [outputs, inputs] in -127..127 of a weight with one scale an output."""
    return (weight / scales[:, None]).round_().clamp_(-LEVELS, LEVELS)


def round_to_data(weight: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """Like `round_to_nearest`, but the error of each input column is made good in those not rounded yet: GPTQ (arXiv 2210.17323).

    weight [outputs, inputs], moment [inputs, inputs] of the inputs' second moments. Columns come in the order of their moments. As in
    `llm.Solver`, which says why, the factor is that of the moments themselves: inverting them took longer than all else here.
    """
    diagonal = moment.diagonal()
    order = torch.argsort(diagonal, descending=True)
    backwards = order.flip(0)
    damping = DAMPING * float(diagonal.mean()) or 1.0
    while True:
        damped = moment[backwards[:, None], backwards]
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        damping *= 10
    unit = factor.T.flip(0, 1)  # lower triangular
    unit.div_(unit.diagonal().clone()[:, None])
    columns = weight[:, order].T.contiguous()  # [inputs, outputs]
    rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        wanted = torch.addmm(columns[start:stop], unit[start:stop, :start], errors[:start])
        for i in range(start, stop):
            row = wanted[i - start].addmv_(errors[start:i].T, unit[i, start:i])
            torch.div(row, scales, out=rounded[i]).round_().clamp_(-LEVELS, LEVELS)
            torch.addcmul(columns[i], rounded[i], scales, value=-1, out=errors[i])
    out = torch.empty_like(rounded)
    out[order] = rounded
    return out.T
