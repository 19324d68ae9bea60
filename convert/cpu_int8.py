"""Which blocks of the encoder a CPU computes in INT8: products whose inputs are quantised per picture, as far as the features hold.

    watch     one pass in PyTorch, the one that probes activations: how coarse 8 bits are for the inputs of every block's products
    choose    all blocks, or as many of the least coarse ones as keep the features within BOUND of the graph without

Ranges are those of the picture at hand (ONNX DynamicQuantizeLinear), so nothing is clipped; what a range with outliers costs is resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fastvlm_edge.backends.verification import compare
from fastvlm_edge.convert.reference.fastvithd import AttentionBlock, FastViTHD, RepMixerBlock, Stage

BOUND = 0.001
"""1 - cosine of the image features against the same weights with float activations, worst picture: the bound of calibration as well."""
TRIES = 5

Float32 = npt.NDArray[np.float32]


@dataclass
class Noise:
    """What 8 bits would add to one block's branch, summed over pictures."""

    layers: tuple[str, ...]
    """The products, by their names among the encoder's weights."""
    rounding: float = 0.0
    """Squared rounding error of the inputs over their squared values, of all products of the block."""
    share: float = 0.0
    """Squared values of the branch over those of what it is added to."""

    @property
    def damage(self) -> float:
        """An estimate of the squared error that reaches the block's output, relative to it. For an order, not for a bound."""
        return self.rounding * self.share


@dataclass(frozen=True)
class IntegerInputs:
    """The result."""

    layers: frozenset[str]
    blocks: int
    """How many of `candidates` they are."""
    candidates: int
    loss: float
    """1 - cosine of the image features that they cost, worst picture."""
    tried: list[tuple[int, float]]
    """Blocks and loss of every try."""

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "layers": sorted(self.layers)}


@contextmanager
def watch_blocks(encoder: FastViTHD) -> Iterator[list[Noise]]:
    """Inside the block every forward pass of `encoder` (inference form) is watched; the list has one entry a branch."""
    found: list[Noise] = []
    handles: list[Any] = []

    def inputs_of(noise: Noise) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            step = float(x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
            noise.rounding += step**2 / 12 / max(float(x.square().mean()), 1e-30)

        return hook

    def output_of(noise: Noise, sizes: dict[str, float]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            sizes["branch"] = float(output.square().mean())

        return hook

    def stream_of(noises: list[tuple[Noise, dict[str, float]]]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            size = max(float(output.square().mean()), 1e-30)
            for noise, sizes in noises:
                noise.share += sizes["branch"] / size

        return hook

    for index, stage in enumerate(encoder.stages):
        assert isinstance(stage, Stage)
        for number, block in enumerate(stage.blocks):
            path = f"vision.stages.{index}.blocks.{number}"
            branches: list[tuple[nn.Module, nn.Module, str, tuple[str, ...]]] = []
            if isinstance(block, AttentionBlock):
                branches.append((block.token_mixer, block.layer_scale_1, f"{path}.token_mixer", ("qkv", "proj")))
                branches.append((block.mlp, block.layer_scale_2, f"{path}.mlp", ("fc1", "fc2")))
            elif isinstance(block, RepMixerBlock):
                branches.append((block.mlp, block.layer_scale, f"{path}.mlp", ("fc1", "fc2")))
            of_block: list[tuple[Noise, dict[str, float]]] = []
            for module, layer_scale, name, parts in branches:
                noise, sizes = Noise(tuple(f"{name}.{part}" for part in parts)), dict[str, float]()
                handles += [getattr(module, part).register_forward_pre_hook(inputs_of(noise)) for part in parts]
                handles.append(layer_scale.register_forward_hook(output_of(noise, sizes)))
                of_block.append((noise, sizes))
                found.append(noise)
            handles.append(block.register_forward_hook(stream_of(of_block)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def choose_blocks(noises: Sequence[Noise], run: Callable[[frozenset[str]], list[Float32]], bound: float = BOUND) -> IntegerInputs:
    """The most of the least noisy blocks that keep 1 - cosine of the features within `bound`, by at most TRIES runs.

    `run` takes the layers with INT8 inputs and gives the image features of every picture.
    """
    order = sorted(noises, key=lambda noise: noise.damage)
    without = run(frozenset())
    total = np.cumsum([noise.damage for noise in order])
    tried: list[tuple[int, float]] = []
    count = len(order)
    while count and len(tried) < TRIES:
        layers = frozenset(layer for noise in order[:count] for layer in noise.layers)
        pairs = zip(run(layers), without, strict=True)
        loss = max(1 - compare(found, expected).cosine for found, expected in pairs)
        tried.append((count, loss))
        if loss <= bound:
            return IntegerInputs(layers, count, len(order), loss, tried)
        allowed = total[count - 1] * bound / loss if np.isfinite(loss) else 0.0  # the loss grows about as the estimates add up
        count = min(count - 1, int(np.searchsorted(total, allowed, side="right")))
    return IntegerInputs(frozenset(), 0, len(order), 0.0, tried)
