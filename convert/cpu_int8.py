"""Chooses the blocks of the encoder that a CPU computes in INT8, without calibration data.

    watch     during the probe in PyTorch, measure how coarse 8 bits are for the inputs of every block's products
    choose    take all blocks, or as many of the least coarse ones as keep the image features within BOUND

The graph takes the range of each picture at run time (ONNX DynamicQuantizeLinear), so nothing is clipped; outliers cost resolution.
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
"""Largest accepted 1 - cosine of the image features, compared with float activations and the same weights, of the worst picture."""
TRIES = 5
"""Largest number of choices of blocks that are tried."""

Float32 = npt.NDArray[np.float32]


@dataclass
class Noise:
    """The noise that 8-bit inputs would add to one branch of a block, summed over pictures."""

    layers: tuple[str, ...]
    """Names of the branch's products among the encoder's weights."""
    rounding: float = 0.0
    """Squared rounding error of the inputs relative to their squared values, summed over the products of the branch."""
    share: float = 0.0
    """Squared values of the branch relative to those of the sum that it is part of."""

    @property
    def damage(self) -> float:
        """Estimated squared error of the block's output, relative to it. Good enough to order blocks, not to bound an error."""
        return self.rounding * self.share


@dataclass(frozen=True)
class IntegerInputs:
    """The layers that get INT8 inputs on a CPU, and how they were found."""

    layers: frozenset[str]
    blocks: int
    """Number of blocks, of `candidates`, that they belong to."""
    candidates: int
    loss: float
    """1 - cosine of the image features with them, of the worst picture."""
    tried: list[tuple[int, float]]
    """Number of blocks and loss of every choice that was tried."""

    def describe(self) -> dict[str, Any]:
        """As an object for the manifest."""
        return {**asdict(self), "layers": sorted(self.layers)}


@contextmanager
def watch_blocks(encoder: FastViTHD) -> Iterator[list[Noise]]:
    """Watch every forward pass of `encoder` (inference form) inside the `with` block: the list has one entry for each branch.

    A branch is an attention or a ConvFFN that is added to the stream.
    """
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
    """As many of the least noisy blocks as keep 1 - cosine of the image features within `bound`, found with at most TRIES + 1 runs.

    `run` takes the names of the layers with INT8 inputs and returns the image features of every picture.
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
