"""The weights of encoder and projector, folded for inference and written in the types of a precision plan.

Folded are: all train-time branches (re-parameterisation), BatchNorm into the 7 x 7 convolution before it, layer scale into the product
before it, and 1 / sqrt(head_dim) into the rows of the queries. Names are the module's own paths: `vision.stages.0.blocks.0.mlp.fc1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastvlm_edge.convert.fastvithd import (
    HEAD_DIM,
    Attention,
    AttentionBlock,
    ConvFFN,
    FastViTHD,
    LayerScale,
    MobileOneConv,
    Reparameterizable,
    RepMixerBlock,
    Stage,
    fold_batch_norm,
)
from fastvlm_edge.convert.graphs.builder import WeightsFile, cast_weight
from fastvlm_edge.convert.precision import FLOAT_TYPES, VISION_STAGES, PrecisionPlan
from fastvlm_edge.convert.weights.round_to_nearest import quantize_channels

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedLayer:
    """The integers of one layer. `values` of a convolution are [outputs, inputs, 1, 1], of a linear layer [inputs, outputs]."""

    values: npt.NDArray[np.int8]
    scales: Float32
    """[outputs], exactly representable in the float type of the layer's stage"""
    bias: Float32 | None
    activation_scale: float | None
    """The scale of the layer's input; None where only the weights are INT8."""
    factor: Float32 | None = None
    """[inputs]: before it is quantised, the input is multiplied by `factor` and `offset` is added."""
    offset: Float32 | None = None
    plain_bias: Float32 | None = None
    """Only with a factor: the bias for a graph that leaves the input as it is and multiplies the weights by the factor instead."""


@dataclass(frozen=True)
class VisionIntegers:
    """What calibration chose for the encoder and projector: quantised layers, by the names of the weights file without `.weight`."""

    layers: dict[str, QuantizedLayer]
    floats: dict[str, Float32]
    """Tensors that stay floats but that calibration changed, by their names in the weights file."""

    @property
    def activation_scales(self) -> dict[str, float]:
        """Layer -> scale of its input, for `build_vision`: the layers whose inputs are INT8 as well."""
        return {name: layer.activation_scale for name, layer in self.layers.items() if layer.activation_scale is not None}


@torch.no_grad()
def write_vision_weights(
    encoder: FastViTHD,
    projector: nn.Sequential,
    plan: PrecisionPlan,
    weights: WeightsFile,
    advance: Callable[[], None],
    quantized: VisionIntegers | None = None,
) -> None:
    """Append the folded weights of `encoder` (in inference form) and `projector`; `advance` is called once for each stage.

    A convolution is [outputs, inputs / groups, k, k], a linear layer [inputs, outputs]. With `quantized`, which must be made for the same
    plan, exactly its layers are integers. Without it, the weights are rounded to nearest if the plan has integers.
    """
    store = _Store(weights, plan, quantized)
    for index, conv in enumerate(encoder.stem):
        assert isinstance(conv, MobileOneConv)
        store.reparameterized(f"vision.stem.{index}", conv, "stem")
    advance()
    for index, stage in enumerate(encoder.stages):
        assert isinstance(stage, Stage)
        name, key = f"vision.stages.{index}", VISION_STAGES[index + 1]
        for path, module in stage.named_modules():
            if isinstance(module, Reparameterizable):
                store.reparameterized(f"{name}.{path}", module, key)
        for number, block in enumerate(stage.blocks):
            path = f"{name}.blocks.{number}"
            if isinstance(block, AttentionBlock):
                store.floats(f"{path}.norm.weight", block.norm.weight, key)
                store.floats(f"{path}.norm.bias", block.norm.bias, key)
                store.attention(f"{path}.token_mixer", block.token_mixer, block.layer_scale_1, key)
                store.feed_forward(f"{path}.mlp", block.mlp, block.layer_scale_2, key)
            elif isinstance(block, RepMixerBlock):
                store.feed_forward(f"{path}.mlp", block.mlp, block.layer_scale, key)
        advance()
    store.reparameterized("vision.final_conv", encoder.final_conv, "final_conv")
    assert encoder.final_conv.se is not None
    for part in ("fc1", "fc2"):
        conv = getattr(encoder.final_conv.se, part)
        store.convolution(f"vision.final_conv.se.{part}", conv.weight, conv.bias, "final_conv")
    advance()
    for part, linear in (("linear_1", projector[0]), ("linear_2", projector[2])):
        assert isinstance(linear, nn.Linear)
        store.linear(f"projector.{part}", linear.weight, linear.bias, "projector")
    advance()


def fold_feed_forward(mlp: ConvFFN, gamma: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of `conv`, `fc1` and `fc2` with BatchNorm and layer scale folded in; `gamma` [dim, 1, 1]."""
    assert mlp.fc1.bias is not None and mlp.fc2.bias is not None
    gamma = gamma.flatten()
    return {
        "conv": fold_batch_norm(mlp.conv.conv.weight, mlp.conv.bn),
        "fc1": (mlp.fc1.weight, mlp.fc1.bias),
        "fc2": (mlp.fc2.weight * gamma.reshape(-1, 1, 1, 1), mlp.fc2.bias * gamma),
    }


def fold_attention(attention: Attention, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [3 dim, dim] with the scale of the queries, and weight and bias of the projection with the layer scale folded in."""
    qkv = attention.qkv.weight.clone()
    qkv[: qkv.shape[1]] *= HEAD_DIM**-0.5
    gamma = gamma.flatten()
    return qkv, attention.proj.weight * gamma[:, None], attention.proj.bias * gamma


class _Store:
    """Writes layers into the weights file, as integers or floats."""

    def __init__(self, weights: WeightsFile, plan: PrecisionPlan, quantized: VisionIntegers | None) -> None:
        self.weights = weights
        self.plan = plan
        self.quantized = quantized

    def floats(self, name: str, tensor: Tensor, stage: str) -> None:
        array = tensor.float().contiguous().numpy()
        if self.quantized is not None:
            array = self.quantized.floats.get(name, array)
        self.weights.add(name, cast_weight(name, array, FLOAT_TYPES[self.plan.vision[stage]]))

    def matrix(self, name: str, tensor: Tensor, bias: Tensor | None, stage: str, axis: int) -> None:
        """A weight whose outputs are along `axis`, and its bias; as integers if `quantized`, or without it the plan, says so."""
        dtype = FLOAT_TYPES[self.plan.vision[stage]]
        layer = None if self.quantized is None else self.quantized.layers.get(name)
        if layer is not None:
            self.weights.add(f"{name}.weight", layer.values)
            self.weights.add(f"{name}.weight.scale", layer.scales.astype(dtype))
            for part in ("bias", "plain_bias", "factor", "offset"):
                if (array := getattr(layer, part)) is not None:
                    shaped = array if part.endswith("bias") else array.reshape(-1, 1, 1)  # [channels, 1, 1]
                    self.weights.add(f"{name}.{part}", cast_weight(f"{name}.{part}", shaped, dtype))
            return
        if self.quantized is not None or not self.plan.vision_weights.bits:
            self.floats(f"{name}.weight", tensor, stage)
        else:
            array = np.ascontiguousarray(tensor.float().numpy())
            rounded = quantize_channels(array, axis, self.plan.vision_weights.bits, dtype)
            self.weights.add(f"{name}.weight", rounded.values)
            self.weights.add(f"{name}.weight.scale", rounded.scales.astype(dtype))
        if bias is not None:
            self.floats(f"{name}.bias", bias, stage)

    def convolution(self, name: str, weight: Tensor, bias: Tensor | None, stage: str) -> None:
        assert bias is not None
        self.matrix(name, weight, bias, stage, axis=0)

    def linear(self, name: str, weight: Tensor, bias: Tensor | None, stage: str) -> None:
        self.matrix(name, weight.T.contiguous(), bias, stage, axis=1)

    def reparameterized(self, name: str, module: Reparameterizable, stage: str) -> None:
        assert module.reparam_conv is not None
        self.convolution(name, module.reparam_conv.weight, module.reparam_conv.bias, stage)

    def feed_forward(self, name: str, mlp: ConvFFN, scale: LayerScale, stage: str) -> None:
        for part, (weight, bias) in fold_feed_forward(mlp, scale.gamma).items():
            self.convolution(f"{name}.{part}", weight, bias, stage)

    def attention(self, name: str, attention: Attention, scale: LayerScale, stage: str) -> None:
        qkv, weight, bias = fold_attention(attention, scale.gamma)
        self.linear(f"{name}.qkv", qkv, None, stage)
        self.linear(f"{name}.proj", weight, bias, stage)
