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
from torch.utils.hooks import RemovableHandle

from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.convert.fastvithd import AttentionBlock, ConvFFN, FastViTHD, LayerScale, RepMixerBlock, Stage

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

    A branch is an attention or a ConvFFN whose output is added to the stream.
    """
    blocks = [(block, _branches(block, path)) for path, block in _blocks(encoder)]
    handles: list[RemovableHandle] = []
    try:
        for block, branches in blocks:
            for branch in branches:
                handles += [product.register_forward_pre_hook(branch.see_input) for product in branch.products]
                handles.append(branch.layer_scale.register_forward_hook(branch.see_output))
                handles.append(block.register_forward_hook(branch.see_sum))
        yield [branch.noise for _, branches in blocks for branch in branches]
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Branch:
    """The modules of one branch, with hooks that add to its noise."""

    noise: Noise
    products: list[nn.Module]
    layer_scale: LayerScale
    size: float = 0.0
    """Mean square of the branch in the present forward pass."""

    def see_input(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        step = float(x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
        self.noise.rounding += step**2 / 12 / max(float(x.square().mean()), 1e-30)

    def see_output(self, _module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.size = float(output.square().mean())

    def see_sum(self, _block: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.noise.share += self.size / max(float(output.square().mean()), 1e-30)


def _blocks(encoder: FastViTHD) -> Iterator[tuple[str, nn.Module]]:
    """Every block with its name among the weights, in the order of the data."""
    for index, stage in enumerate(encoder.stages):
        assert isinstance(stage, Stage)
        for number, block in enumerate(stage.blocks):
            yield f"vision.stages.{index}.blocks.{number}", block


def _branches(block: nn.Module, path: str) -> list[_Branch]:
    if isinstance(block, AttentionBlock):
        attention, layer_scale = block.token_mixer, block.layer_scale_1
        mixer = Noise((f"{path}.token_mixer.qkv", f"{path}.token_mixer.proj"))
        return [_Branch(mixer, [attention.qkv, attention.proj], layer_scale), _feed_forward(block.mlp, block.layer_scale_2, path)]
    assert isinstance(block, RepMixerBlock)
    return [_feed_forward(block.mlp, block.layer_scale, path)]


def _feed_forward(mlp: ConvFFN, layer_scale: LayerScale, path: str) -> _Branch:
    return _Branch(Noise((f"{path}.mlp.fc1", f"{path}.mlp.fc2")), [mlp.fc1, mlp.fc2], layer_scale)


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
