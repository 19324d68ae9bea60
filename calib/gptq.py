"""GPTQ (arXiv 2210.17323): round a matrix so that the outputs change least for inputs of known second moments.

With the moments H = R R^T, R upper triangular in the order of rounding, a change E of the weights changes the squared outputs by |R^T E|^2.
Row i of R^T E contains E_i and the changes before it, so each E_i is chosen to make its own row smallest: the weight that is rounded is
w_i + sum_j<i R_ji E_j / R_ii. That is GPTQ's update with the Cholesky factor of H itself in place of that of its inverse; inverting H would
take longer than everything else here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean moment that is added to each input's own (section 3.3); ten times more if the factorisation still fails."""
ATTEMPTS = 4


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of the inputs' second moments."""

    order: Tensor
    """Inputs from the largest moment to the smallest: later inputs make up for the errors of earlier ones."""
    unit: Tensor
    """R^T in this order with every row divided by its R_ii: lower triangular, [inputs, inputs]."""
    diagonal: Tensor
    """R_ii, [inputs], in this order."""


def factorize(moments: Tensor) -> Factor:
    """Factor the moments [inputs, inputs]. Raises ValueError if they are not finite."""
    diagonal = moments.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the second moments are not finite")
    damping = DAMPING * float(diagonal.mean()) or 1.0
    order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    # The factor of a matrix in reversed order is upper triangular. One name for both: the argument may be gigabytes, and is freed here.
    moments = moments[backwards[:, None], backwards]
    del diagonal
    for _ in range(ATTEMPTS):
        moments.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            break
        damping *= 10
    del moments
    unit = factor.T.flip(0, 1)
    root = unit.diagonal().clone()
    return Factor(order, unit.div_(root[:, None]), root)


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix [inputs, outputs], inputs in the order of the factor."""

    values: Tensor
    """Whole numbers, as floats."""
    lost: float
    """Sum of the squared changes of every `sample`-th output, for the damped moments."""


def round_in_order(factor: Factor, weight: Tensor, steps: Tensor, smallest: int, largest: int, *, block: int, sample: int = 0) -> Rounded:
    """Round `weight` [inputs, outputs], whose rows are in the order of the factor already.

    `steps` are the scales, [inputs, outputs] or [1, outputs]; integers are within `smallest`..`largest`. The errors of a block of inputs
    reach the inputs after it as one matrix product. `sample` 0 does not measure the loss.
    """
    inputs = len(weight)
    steps = steps.expand(inputs, -1)
    values, error = torch.empty_like(weight), torch.empty_like(weight)
    lost = 0.0
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        wanted = torch.addmm(weight[start:stop], factor.unit[start:stop, :start], error[:start])
        for i in range(start, stop):
            row = wanted[i - start].addmv_(error[start:i].T, factor.unit[i, start:i])
            torch.div(row, steps[i], out=values[i]).round_().clamp_(smallest, largest)
            torch.addcmul(weight[i], values[i], steps[i], value=-1, out=error[i])
        if sample:
            wanted.addcmul_(values[start:stop], steps[start:stop], value=-1).mul_(factor.diagonal[start:stop, None])
            lost += float(wanted[:, ::sample].square().sum())
    return Rounded(values, lost)
