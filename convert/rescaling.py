"""Moves outlier channels of the LLM and the encoder out of the inputs of products, exactly, before anything is rounded.

A factor can move along a channel between what computes it and what reads it, if only linear steps are in between:

    norm          -> q, k and v; gate and up; the head
    values        -> o_proj (attention is linear in the values)
    up            -> down (silu(gate) * up is linear in up)
    queries       -> keys, in the two channels that the rotary embedding mixes
    convolution   -> fc1, in the encoder; there also norm -> q, k and v, and values -> projection

Factors are powers of two, so that nothing is rounded. Only channels that are far from the others on both sides are moved: their inputs are
large and their weights small, or the other way round. This is how checkpoints look in which a norm has grown large channels
(arXiv 2211.10438); 8 bits for such an input leave nothing for its neighbours. Where nothing is moved, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastvlm_edge.convert.checkpoint.checkpoint import Factors, TextConfig
from fastvlm_edge.convert.fastvithd import AttentionBlock, ConvFFN, FastViTHD
from fastvlm_edge.convert.precision import FP16_SAFE, PrecisionPlan
from fastvlm_edge.convert.reference.decoder import Watch

SMALLEST_MOVE, LARGEST_MOVE = 3, 13
"""Channels move by at least and at most this power of two: norm weights of about 1 stay in FP16's normal range, which ends at 2^-14."""
LARGE_HEADS = FP16_SAFE / 16
"""Queries and keys are balanced if one of them exceeds this."""

Float32 = npt.NDArray[np.float32]
Exponents = npt.NDArray[np.int64]


@dataclass
class Channels:
    """The input channels of a product."""

    largest: Tensor
    """[inputs]: largest magnitude that was seen."""
    squares: Tensor
    """[inputs]: sum of the squared weights that read the channel."""


@dataclass
class ChannelWatch(Watch):
    """Watches the probe of the LLM."""

    products: dict[str, Channels] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> largest magnitude of each channel of the rotated queries, [heads, head_dim]."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[kv_heads, head_dim]"""

    def product(self, name: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        squares = weight.square().sum(0)
        if name in self.products:
            self.products[name].squares += squares
        else:
            self.products[name] = Channels(x.abs().amax(0), squares)

    def heads(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        self.queries[layer], self.keys[layer] = queries.abs().amax(1), keys.abs().amax(1)


@dataclass(frozen=True)
class Moves:
    """What is moved in a model."""

    factors: dict[str, Factors]
    """Tensor of the checkpoint -> its factors."""
    channels: dict[str, list[int]]
    """What reads the channels, as in `layer_matrices` -> the channels that are moved."""


def find_moves(seen: ChannelWatch, text: TextConfig, plan: PrecisionPlan) -> Moves:
    """The outlier channels of the LLM that a probe has seen. Without integer weights, only FP16 needs any, and the head stays as it is."""
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    channels: dict[str, list[int]] = {}

    def divide_rows(exponents: Exponents, tensors: list[str]) -> None:
        rows.update(dict.fromkeys(tensors, _powers(-exponents.ravel())))

    def move(name: str, exponents: Exponents, writers: list[str], readers: list[str], *, at: Exponents | None = None) -> None:
        """`at` are the exponents of the readers' columns if these are others."""
        if exponents.any():
            divide_rows(exponents, writers)
            columns.update(dict.fromkeys(readers, _powers(exponents if at is None else at)))
            channels[name] = np.flatnonzero(exponents).tolist()

    if plan.decoder != "fp16":
        return Moves({}, {})
    group = text.heads // text.kv_heads
    for layer in range(text.layers):
        path = f"llm.layers.{layer}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        parts = [f"{attention}.{part}_proj.weight" for part in "qkv"]
        move(f"{path}.qkv", exponents_of(seen.products[f"{path}.qkv"]), [f"{path}.input_layernorm.weight"], parts)
        parts = [f"{mlp}.{part}_proj.weight" for part in ("gate", "up")]
        move(f"{path}.gate_up", exponents_of(seen.products[f"{path}.gate_up"]), [f"{path}.post_attention_layernorm.weight"], parts)
        exponents = exponents_of(seen.products[f"{path}.down"], bounded=False)
        move(f"{path}.down", exponents, [f"{mlp}.up_proj.weight"], [f"{mlp}.down_proj.weight"])
        values = exponents_of(_by_kv_head(seen.products[f"{path}.o_proj"], text), bounded=False)  # [kv_heads * head_dim]
        repeated = np.repeat(values.reshape(text.kv_heads, text.head_dim), group, axis=0).ravel()
        writers = [f"{attention}.v_proj.{kind}" for kind in ("weight", "bias")]
        move(f"{path}.o_proj", values, writers, [f"{attention}.o_proj.weight"], at=repeated)
        balance = _balance(seen.queries[layer], seen.keys[layer])  # [kv_heads, head_dim]
        if balance.any():
            for part, exponents in (("q", np.repeat(balance, group, axis=0)), ("k", -balance)):
                divide_rows(exponents, [f"{attention}.{part}_proj.{kind}" for kind in ("weight", "bias")])
            channels[f"{path}.keys"] = np.flatnonzero(balance.any(axis=0)).tolist()
    if plan.head.bits:
        move("llm.head", exponents_of(seen.products["llm.head"]), ["llm.norm.weight"], ["lm_head.weight"])
    return Moves({name: Factors(rows.get(name), columns.get(name)) for name in {*rows, *columns}}, channels)


def _powers(exponents: Exponents) -> Float32:
    factors: Float32 = np.exp2(exponents).astype(np.float32)
    return factors


def exponents_of(channels: Channels, *, bounded: bool = True) -> Exponents:
    """The power of two that each input channel is divided by and its weights are multiplied by, 0 for most: [inputs].

    Channels that are not `bounded`, as those behind a norm are, never become larger: one may be silent in a probe and large elsewhere.
    """
    inputs, weights = channels.largest.double().numpy(), channels.squares.double().sqrt().numpy()
    used = (inputs > 0) & (weights > 0)
    exponents = np.zeros(len(inputs), np.int64)
    if used.any():
        inputs, weights = np.log2(inputs[used]), np.log2(weights[used])
        above, below = inputs - np.median(inputs), np.median(weights) - weights
        both = np.where(above * below > 0, np.sign(above) * np.minimum(np.abs(above), np.abs(below)), 0.0)
        whole = np.rint(both).astype(np.int64)
        exponents[used] = np.where(np.abs(whole) >= SMALLEST_MOVE, whole.clip(-LARGEST_MOVE if bounded else 0, LARGEST_MOVE), 0)
    return exponents


def _by_kv_head(channels: Channels, text: TextConfig) -> Channels:
    """Channels of the sums of values [heads * head_dim] as those of the values [kv_heads * head_dim]: heads share them in groups."""
    shape = (text.kv_heads, -1, text.head_dim)
    return Channels(channels.largest.view(shape).amax(1).flatten(), channels.squares.view(shape).sum(1).flatten())


def _balance(queries: Tensor, keys: Tensor) -> Exponents:
    """The power of two that queries are divided by and keys multiplied by: [kv_heads, head_dim], equal in both channels of a pair."""
    kv_heads, dim = keys.shape
    q = queries.view(kv_heads, -1, 2, dim // 2).amax((1, 2)).double().numpy()
    k = keys.view(kv_heads, 2, dim // 2).amax(1).double().numpy()
    large = (np.maximum(q, k) > LARGE_HEADS) & (np.minimum(q, k) > 0)
    ratio = np.log2(np.where(large, q, 1.0) / np.where(large, k, 1.0)) / 2
    return np.tile(np.rint(ratio).astype(np.int64), (1, 2))


@contextmanager
def watch_encoder(encoder: FastViTHD) -> Iterator[dict[str, Channels]]:
    """Watch every forward pass of `encoder` (inference form) inside the `with` block: product -> its input channels."""
    seen: dict[str, Channels] = {}
    handles: list[RemovableHandle] = []

    def hook(name: str, module: nn.Conv2d | nn.Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            largest = x.abs().amax((0, 2, 3)) if isinstance(module, nn.Conv2d) else x.abs().flatten(0, -2).amax(0)
            if name in seen:
                seen[name].largest = torch.maximum(seen[name].largest, largest)
            else:
                seen[name] = Channels(largest, module.weight.flatten(1).square().sum(0))

        return see

    for name, module, _, _ in _pairs(encoder):
        handles.append(module.register_forward_pre_hook(hook(name, module)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def move_in_encoder(encoder: FastViTHD, seen: dict[str, Channels]) -> dict[str, list[int]]:
    """Give the encoder weights with its outlier channels moved: product -> the channels. It computes the same as before."""
    moved: dict[str, list[int]] = {}
    for name, reader, writers, behind_norm in _pairs(encoder):
        exponents = exponents_of(seen[name], bounded=behind_norm)
        if not exponents.any():
            continue
        factor = torch.from_numpy(np.exp2(exponents)).float()
        moved[name] = np.flatnonzero(exponents).tolist()
        reader.weight.data = reader.weight.data * factor.view(1, -1, *[1] * (reader.weight.ndim - 2))
        for parameter, first in writers:
            rows = torch.ones(len(parameter))
            rows[first:] = factor
            parameter.data = parameter.data / rows.view(-1, *[1] * (parameter.ndim - 1))
    return moved


def _pairs(encoder: FastViTHD) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, list[tuple[Tensor, int]], bool]]:
    """Products whose input channels can be moved.

    Name, product, the weights and biases that compute the channels from a row on, and whether these are those of a norm.
    """
    for name, module in encoder.named_modules():
        path = f"vision.{name}"
        if isinstance(module, ConvFFN):
            yield f"{path}.fc1", module.fc1, [(module.conv.bn.weight, 0), (module.conv.bn.bias, 0)], False
        elif isinstance(module, AttentionBlock):
            attention, dim = module.token_mixer, module.norm.weight.numel()
            yield f"{path}.token_mixer.qkv", attention.qkv, [(module.norm.weight, 0), (module.norm.bias, 0)], True
            yield f"{path}.token_mixer.proj", attention.proj, [(attention.qkv.weight, 2 * dim)], False
