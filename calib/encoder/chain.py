"""The encoder and projector as a chain of units for calibration: folded copies of the modules, as the graph computes them.

A unit is a ConvFFN, an attention or a downsampling: a group that is quantised, or left in floats ("wide"), as a whole. Candidates are dense
1 x 1 convolutions and linear layers; TensorRT pads the groups of other convolutions (docs/tensorrt-types.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.histogram import Histogram
from fastvlm_edge.calib.encoder.rounding import fake_quantize
from fastvlm_edge.convert.fastvithd import (
    HEAD_DIM,
    AttentionBlock,
    ConvFFN,
    Downsample,
    FastViTHD,
    RepMixerBlock,
    Stage,
    image_tokens,
)
from fastvlm_edge.convert.precision import FLOAT_TYPES, VISION_STAGES, PrecisionPlan
from fastvlm_edge.convert.weights.vision import QuantizedLayer, fold_attention, fold_feed_forward

Float32 = npt.NDArray[np.float32]
Decision = Literal["w8a8", "weights", "wide"]
"""INT8 weights and inputs; INT8 weights that are dequantised before use; floats."""

TIME = {"fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
"""Time of a multiply-accumulate, relative to INT8: Ampere's tensor cores do INT8, FP16 and TF32 at 4 : 2 : 1 (GA102 white paper)."""


@dataclass
class Ranges:
    """Statistics of each input channel [channels]: smallest and largest value, sum, sum of squares; `count` values per channel."""

    least: Tensor
    largest: Tensor
    total: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int) -> Ranges:
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf), zeros, zeros.clone())

    def add(self, rows: Tensor) -> None:
        """Add rows [positions, channels]."""
        self.least = torch.minimum(self.least, rows.amin(0))
        self.largest = torch.maximum(self.largest, rows.amax(0))
        self.total += rows.sum(0)
        self.square += (rows * rows).sum(0)
        self.count += rows.shape[0]


@dataclass
class Layer:
    """A layer that may be quantised, with everything that calibration has found out about it."""

    name: str
    stage: str
    module: nn.Conv2d | nn.Linear
    source: nn.Module | None
    """The module before, if it can absorb a factor per channel: a depthwise convolution, a norm, qkv. None after a GELU."""
    full_weight: Tensor = field(init=False)
    full_bias: Tensor | None = field(init=False)
    ranges: Ranges | None = None
    histogram: Histogram | None = None
    samples: list[Tensor] = field(default_factory=list)
    factor: Tensor | None = None
    offset: Tensor | None = None
    strength: float = 0.0
    clip: float = 0.0
    positions: int = 0
    options: dict[Decision, QuantizedLayer] = field(default_factory=dict)
    active: QuantizedLayer | None = None
    _tensors: tuple[Tensor | None, Tensor | None] = (None, None)

    def __post_init__(self) -> None:
        self.keep_full()
        self.module.register_forward_pre_hook(self._before)

    @property
    def is_conv(self) -> bool:
        return isinstance(self.module, nn.Conv2d)

    @property
    def matrix(self) -> Tensor:
        """The float weight [outputs, inputs]."""
        return self.full_weight.reshape(self.full_weight.shape[0], -1)

    @property
    def macs(self) -> int:
        return self.matrix.numel() * self.positions

    def keep_full(self) -> None:
        """Keep the module's present weights as the float weights."""
        self.full_weight = self.module.weight.data
        self.full_bias = None if self.module.bias is None else self.module.bias.data

    def use(self, option: QuantizedLayer | None) -> None:
        """Compute with an option, or in float."""
        self.active = option
        if option is None:
            self.module.weight.data = self.full_weight
            if self.full_bias is not None and self.module.bias is not None:
                self.module.bias.data = self.full_bias
            self._tensors = (None, None)
            return
        values = torch.from_numpy(option.values if self.is_conv else option.values.T.copy()).float()
        self.module.weight.data = values * torch.from_numpy(option.scales).reshape(-1, *[1] * (values.ndim - 1))
        if option.bias is not None and self.module.bias is not None:
            self.module.bias.data = torch.from_numpy(option.bias)
        self._tensors = (None, None)
        if option.factor is not None and option.offset is not None:
            self._tensors = (torch.from_numpy(option.factor).reshape(-1, 1, 1), torch.from_numpy(option.offset).reshape(-1, 1, 1))

    def _before(self, _module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        if self.active is None:
            return None
        x = inputs[0]
        factor, offset = self._tensors
        if factor is not None and offset is not None:
            x = x * factor + offset
        scale = self.active.activation_scale
        return x if scale is None else fake_quantize(x, scale)


@dataclass
class Unit:
    """A part of the chain; later units see only its output. Its layers, if any, are one group of the plan."""

    name: str
    stage: str
    forward: Callable[[Tensor], Tensor]
    layers: list[Layer]
    floats: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that absorb factors, by their names in the weights file."""
    loss: dict[Decision, float] = field(default_factory=lambda: {"wide": 0.0})
    squared: dict[Decision, float] = field(default_factory=lambda: {"wide": 0.0})
    decision: Decision = "wide"
    best: Decision = "w8a8"
    """The cheapest possible decision."""
    cheapest: Decision = "w8a8"
    """The cheapest decision that the present search considers."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of its layers, per picture."""
        return sum(layer.macs for layer in self.layers)

    def use(self, decision: Decision) -> None:
        for layer in self.layers:
            layer.use(layer.options.get(decision))

    def cost(self, decision: Decision, plan: PrecisionPlan) -> tuple[float, float]:
        """Predicted time (relative) and bytes of its layers."""
        kind = plan.vision[self.stage]
        width = 1 if decision != "wide" else np.dtype(FLOAT_TYPES[kind]).itemsize
        weights = sum(layer.matrix.numel() for layer in self.layers)
        return self.macs * (1.0 if decision == "w8a8" else TIME[kind]), float(weights * width)


@torch.no_grad()
def build_chain(encoder: FastViTHD, projector: nn.Sequential) -> list[Unit]:
    """Copies of all layers with everything folded, as the graph computes them."""
    units = []
    stem: list[Any] = [_copy(conv.reparam_conv) for conv in encoder.stem]
    units.append(
        Unit(
            "vision.stem",
            "stem",
            lambda x: F.gelu(stem[2](F.gelu(stem[1](F.gelu(stem[0](x)))))),
            [Layer("vision.stem.2", "stem", stem[2], None)],
        )
    )
    for index, stage in enumerate(encoder.stages):
        assert isinstance(stage, Stage)
        name, key = f"vision.stages.{index}", VISION_STAGES[index + 1]
        if stage.downsample is not None:
            units.append(_downsample(f"{name}.downsample", key, stage.downsample))
        if stage.pos_emb is not None:
            units.append(Unit(f"{name}.pos_emb", key, _copy(stage.pos_emb.reparam_conv), []))
        for number, block in enumerate(stage.blocks):
            path = f"{name}.blocks.{number}"
            if isinstance(block, AttentionBlock):
                units.append(_attention(path, key, block))
                units.append(_feed_forward(f"{path}.mlp", key, block.mlp, block.layer_scale_2.gamma, nn.Identity()))
            elif isinstance(block, RepMixerBlock):
                mixer = _copy(block.token_mixer.reparam_conv)
                units.append(_feed_forward(f"{path}.mlp", key, block.mlp, block.layer_scale.gamma, mixer))
    units.append(Unit("vision.final_conv", "final_conv", encoder.final_conv, []))
    linear = [_copy(projector[0]), _copy(projector[2])]
    layers = [Layer(f"projector.linear_{i + 1}", "projector", linear[i], None) for i in range(2)]
    # No later layer averages out the noise of these two, and they are 1 % of the work. MatMul can read INT8 weights directly.
    units.append(Unit("projector", "projector", lambda x: linear[1](F.gelu(linear[0](image_tokens(x)))), layers, best="weights"))
    return units


def _copy(module: Any) -> Any:
    """A copy whose parameters can be replaced without changing the original. Their memory is shared until then."""
    new = copy.copy(module)
    new._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.data, requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    new._forward_hooks, new._forward_pre_hooks = type(module._forward_hooks)(), type(module._forward_pre_hooks)()
    return new


def _downsample(name: str, stage: str, module: Downsample) -> Unit:
    large, small = _copy(module.proj[0].reparam_conv), _copy(module.proj[1].reparam_conv)
    return Unit(name, stage, lambda x: F.gelu(small(F.gelu(large(x)))), [Layer(f"{name}.proj.1", stage, small, None)])


def _feed_forward(name: str, stage: str, mlp: ConvFFN, gamma: Tensor, mixer: nn.Module) -> Unit:
    folded = fold_feed_forward(mlp, gamma)
    dim = gamma.numel()
    conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim).requires_grad_(False)
    fc1, fc2 = _copy(mlp.fc1), _copy(mlp.fc2)
    module: Any
    for part, module in (("conv", conv), ("fc1", fc1), ("fc2", fc2)):
        module.weight.data, module.bias.data = (tensor.detach().float().contiguous() for tensor in folded[part])

    def forward(x: Tensor) -> Tensor:
        x = mixer(x)
        mixed: Tensor = x + fc2(F.gelu(fc1(conv(x))))
        return mixed

    layers = [Layer(f"{name}.fc1", stage, fc1, conv), Layer(f"{name}.fc2", stage, fc2, None)]
    return Unit(name, stage, forward, layers, {f"{name}.conv": conv})


def _attention(path: str, stage: str, block: AttentionBlock) -> Unit:
    name = f"{path}.token_mixer"
    folded = fold_attention(block.token_mixer, block.layer_scale_1.gamma)
    dim = block.norm.weight.numel()
    qkv, proj = nn.Linear(dim, 3 * dim, bias=False).requires_grad_(False), nn.Linear(dim, dim).requires_grad_(False)
    qkv.weight.data, proj.weight.data, proj.bias.data = (tensor.detach().float().contiguous() for tensor in folded)
    norm = type(block.norm)(dim).requires_grad_(False)
    norm.weight.data, norm.bias.data = block.norm.weight.data.clone(), block.norm.bias.data.clone()

    def forward(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        parts = qkv(norm(x).flatten(2).transpose(1, 2)).unflatten(2, (3, dim // HEAD_DIM, HEAD_DIM))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # the scale of the query is folded into its weights
        out = proj(out.transpose(1, 2).flatten(2))
        mixed: Tensor = x + out.transpose(1, 2).unflatten(2, (height, width))
        return mixed

    layers = [Layer(f"{name}.qkv", stage, qkv, norm), Layer(f"{name}.proj", stage, proj, qkv)]
    return Unit(name, stage, forward, layers, {f"{path}.norm": norm})
