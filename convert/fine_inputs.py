"""Chooses the products of the LLM that get 16-bit inputs on a CPU, where onnxruntime rounds the inputs of integer products to 8 bits.

    watch     during the reference pass in PyTorch, measure how much that rounding changes the results of each product
    choose    none, if no product is changed unusually or the logits of the written graph are within the bound; else as few products as
              possible, the noisiest first

8 bits for a block of 128 inputs are enough unless one of them is much larger than its neighbours. Outlier channels that can be moved are
moved before (rescaling.py), so this is for the others: massive activations at single positions (arXiv 2402.17762), large channels that
the weights need as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from fastvlm_edge.backends.ort_session import INT8_BLOCK
from fastvlm_edge.convert.precision import PrecisionPlan
from fastvlm_edge.convert.reference.decoder import Watch
from fastvlm_edge.convert.weights.round_to_nearest import LARGEST, stored_type

UNUSUAL = 1e-3
"""Squared relative error of a product from which it may get 16-bit inputs. Without outliers it is between 5e-6 and 2e-4: largest of a block
of normal inputs, about 3 deviations, in 127 steps (the demo, and random weights of the 0.5B's size)."""


@dataclass
class Noise:
    """Expected squared errors of the results of a product, and their squares: [positions] each."""

    inputs: Tensor
    """From rounding the inputs to 8 bits in blocks."""
    weights: Tensor
    """From rounding the weights to the plan's integers."""
    power: Tensor


class NoiseWatch(Watch):
    """Watches the reference pass with the integers of a plan that stores such."""

    def __init__(self, plan: PrecisionPlan) -> None:
        self.plan = plan
        self.products: dict[str, Noise] = {}

    def product(self, name: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        kind = stored_type(self.plan.head if name == "llm.head" else self.plan.body, x.shape[1])
        rounded = kind.block or INT8_BLOCK
        steps = _blocks(x, rounded).abs().amax(-1) / 127  # [positions, blocks]
        squares = _blocks(weight.square().sum(0)[None], rounded).sum(-1)[0]  # [blocks]
        block = kind.block or x.shape[1]
        scales = _blocks(weight, block).abs().amax(-1) / LARGEST[kind.bits]  # [outputs, blocks]
        rounding = _blocks(x, block).square().sum(-1) @ scales.square().sum(0)
        noise = Noise(steps.square() @ squares / 12, rounding / 12, out.square().sum(-1))
        if known := self.products.get(name):
            noise = Noise(known.inputs + noise.inputs, known.weights + noise.weights, known.power + noise.power)
        self.products[name] = noise

    def noisiest_inputs(self, above: float = 0.0) -> list[str]:
        """Products, from the one that 8-bit inputs change most to the one that they change least; only changes larger than `above`."""
        changes = {name: _relative(noise.inputs, noise.power) for name, noise in self.products.items()}
        return sorted((name for name, change in changes.items() if change > above), key=lambda name: -changes[name])

    def coarsest_weights(self) -> list[str]:
        """All products, from the one that integer weights change most to the one that they change least."""
        return sorted(self.products, key=lambda name: -_relative(self.products[name].weights, self.products[name].power))


def _blocks(rows: Tensor, block: int) -> Tensor:
    """[rows, inputs] -> [rows, blocks, block], filled up with zeros."""
    return pad(rows, (0, -rows.shape[1] % block)).view(len(rows), -1, block)


def _relative(noise: Tensor, power: Tensor) -> float:
    """Mean over positions of the squared relative error."""
    return float((noise / power.clamp(min=1e-30)).mean())


@dataclass(frozen=True)
class Trial:
    """What a graph with some fine products computes on this CPU."""

    error: float
    """KL divergence of the worst row of logits from the stored weights in FP32, in nats."""
    step_ms: float
    """Median time of a decode step."""


@dataclass(frozen=True)
class FineInputs:
    """The products with 16-bit inputs, and how they were found."""

    products: list[str]
    candidates: int
    before: Trial
    after: Trial

    @property
    def slower(self) -> float:
        """By how much a decode step is slower, 0.05 for 5 %."""
        return self.after.step_ms / self.before.step_ms - 1


def choose_fine_inputs(noisiest: list[str], run: Callable[[frozenset[str]], Trial], bound: float) -> FineInputs:
    """As few of the candidates `noisiest` as possible so that the error is within `bound`; all of them if even these are not enough.

    `run` writes and runs the graph whose products in the set are fine; the last graph that it writes is the chosen one.
    """
    before = run(frozenset())
    if before.error <= bound or not noisiest:
        return FineInputs([], len(noisiest), before, before)
    fewest, most = 0, len(noisiest)  # too few, and enough if anything is
    while most - fewest > 1:
        count = min(max(fewest * 2, 1), (fewest + most) // 2)
        if run(frozenset(noisiest[:count])).error <= bound:
            most = count
        else:
            fewest = count
    return FineInputs(sorted(noisiest[:most]), len(noisiest), before, run(frozenset(noisiest[:most])))
