"""The demo's FastVLM: a small FastViTHD, the projector and a small Qwen2, with the auxiliary heads that training uses.

Vision runs in the inference form of `fastvlm_edge.convert.fastvithd`, with a convolution and a BatchNorm in place of each merged
convolution; `fold` merges them again. One branch instead of three trains twice as fast on a CPU and ends in the same network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from examples.demo_training.drawing.picture import COLOURS, DIGITS, LETTERS, SHAPES
from examples.demo_training.training_kernels import DepthwiseConv, gelu
from fastvlm_edge.convert.fastvithd import (
    BATCH_NORM_EPS,
    ConvFFN,
    FastViTHD,
    FastViTHDConfig,
    LargeKernelConv,
    LayerScale,
    MobileOneConv,
    PositionalConv,
    Reparameterizable,
    RepMixer,
    fold_batch_norm,
    identity_kernel,
    image_tokens,
)
from fastvlm_edge.model_dir.manifest import STRIDE

GLYPHS = ("", *DIGITS, *LETTERS, *SHAPES)
"""Classes of the dense head: nothing, a character or a shape."""
TINTS = ("", *COLOURS)
CHARACTERS = ("", *DIGITS, *LETTERS)
SLOTS = 6
"""Characters of a text that the summary head spells."""
MOST = 7
"""Classes of a count: 0 to 6."""
COUNTED = len(SHAPES) + len(COLOURS) + 1
"""Counts that the summary head gives: objects of each shape, of each colour, and of all."""
RELATIONS = 3 * len(SHAPES) + len(COLOURS)
"""Facts about single objects that it gives: colour, side and level of each shape, and the shape of each colour."""
RELATED = max(len(SHAPES), len(COLOURS))
SUMMARY_PARTS = (SLOTS * len(CHARACTERS), COUNTED * MOST, RELATIONS * RELATED)
PLACE_PARTS = (len(SHAPES) + 1, len(TINTS))
DENSE_STRIDE = 16
LAYER_SCALE = 0.5
"""Initial layer scale. With the 1e-5 of deep networks, a shallow one would learn nothing for thousands of steps."""


@dataclass(frozen=True)
class DemoConfig:
    """Shape of the demo model: 192 px, nine visual tokens, about 4M parameters."""

    image_size: int = 192
    depths: tuple[int, ...] = (1, 2, 4, 2, 1)
    dims: tuple[int, ...] = (24, 48, 96, 192, 384)
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vocab: int = 384
    rope_theta: float = 10_000.0
    max_positions: int = 2048

    @property
    def visual_tokens(self) -> int:
        return (self.image_size // STRIDE) ** 2

    def vision(self) -> FastViTHDConfig:
        """Sizes of the encoder."""
        out = 2 * self.dims[4]
        return FastViTHDConfig(depths=self.depths, dims=self.dims, out_dim=out, se_dim=out // 16)

    def language(self) -> Qwen2Config:
        """Sizes of the LLM."""
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            use_sliding_window=False,
            attention_dropout=0.0,
        )


def like(conv: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    """A new convolution of the same shape. All in FastViTHD have square kernels and are padded by half of them."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, groups=conv.groups, bias=bias)


class NormedConv(nn.Module):
    """Replaces one merged convolution in training: convolution without bias and BatchNorm; `skip` adds the input."""

    def __init__(self, shape: nn.Conv2d, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.conv = like(shape, bias=False)
        self.bn = nn.BatchNorm2d(shape.out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return x + out if self.skip else out

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The one convolution with bias that computes the same in eval mode, on the same kernels of training."""
        conv = self.conv
        weight, bias = fold_batch_norm(conv.weight, self.bn)
        if self.skip:
            weight = weight + identity_kernel(conv.out_channels, conv.groups, conv.kernel_size[0]).to(weight)
        merged = like(conv, bias=True)
        merged.__class__ = type(conv)
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)  # type: ignore[union-attr]
        return merged


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution as a matrix product over [positions, channels]: oneDNN's backward of the convolution is several times slower."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class TrainingMobileOneConv(MobileOneConv):
    def forward(self, x: Tensor) -> Tensor:
        assert self.reparam_conv is not None
        out = self.reparam_conv(x)
        if self.se is not None:
            out = self.se(out)
        return gelu(out) if self.activation else out


class TrainingLargeKernelConv(LargeKernelConv):
    def forward(self, x: Tensor) -> Tensor:
        assert self.reparam_conv is not None
        return gelu(self.reparam_conv(x))


class TrainingConvFFN(ConvFFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.conv(x))))


TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    MobileOneConv: TrainingMobileOneConv,
    LargeKernelConv: TrainingLargeKernelConv,
    ConvFFN: TrainingConvFFN,
}
"""Module -> the same module on the kernels of training."""


def make_trainable(vision: FastViTHD) -> FastViTHD:
    """Put a `NormedConv` in place of every merged convolution. Returns `vision`."""
    for module in vision.modules():
        if isinstance(module, Reparameterizable) and isinstance(module.reparam_conv, nn.Conv2d):
            skip = isinstance(module, RepMixer | PositionalConv)
            module.reparam_conv = NormedConv(module.reparam_conv, skip=skip)  # type: ignore[assignment]
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, LAYER_SCALE)
    for module in vision.modules():
        module.__class__ = TRAINING_CLASSES.get(type(module), type(module))
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1):
            module.__class__ = PointwiseConv
        elif type(module) is nn.Conv2d and module.groups == module.in_channels:
            module.__class__ = DepthwiseConv
    return vision


def fold(vision: FastViTHD) -> FastViTHD:
    """Undo `make_trainable`: merge every BatchNorm that it added. Returns `vision`."""
    for module in vision.modules():
        if isinstance(module, Reparameterizable) and isinstance(module.reparam_conv, NormedConv):
            module.reparam_conv = module.reparam_conv.folded()
    return vision


class Projector(nn.Module):
    """linear, GELU, linear: vision channels to LLM width."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


@dataclass
class Seen:
    """The result of a vision pass: `features` [batch, tokens, hidden], and the auxiliary logits."""

    features: Tensor
    glyphs: Tensor
    """[batch, len(GLYPHS), H/16, W/16]"""
    tints: Tensor
    """[batch, len(TINTS), H/16, W/16]"""
    slots: Tensor
    """[batch, SLOTS, len(CHARACTERS)]"""
    counts: Tensor
    """[batch, COUNTED, MOST]"""
    relations: Tensor
    """[batch, RELATIONS, RELATED]"""
    place_shapes: Tensor
    """[batch, len(SHAPES) + 1, H/64, W/64]"""
    place_tints: Tensor
    """[batch, len(TINTS), H/64, W/64]"""


class DemoVision(nn.Module):
    """FastViTHD and projector, with the auxiliary heads beside them.

    The dense head on the stage-3 map names the character or shape and the colour in every cell of 16 px; the summary head on the mean
    visual token spells the text, counts the objects and says how shape, colour and place belong together; the place head names the object
    in the square of every visual token, so that the LLM can find it by attention. All are dropped at export.
    """

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.vision_tower = make_trainable(FastViTHD(config.vision()))
        self.multi_modal_projector = Projector(2 * config.dims[4], config.hidden)
        self.dense_head = nn.Conv2d(config.dims[2], len(GLYPHS) + len(TINTS), 1)
        self.summary_head = nn.Linear(config.hidden, sum(SUMMARY_PARTS))
        self.place_head = nn.Linear(config.hidden, sum(PLACE_PARTS))

    def forward(self, pixel_values: Tensor) -> Seen:
        tower = self.vision_tower
        middle = tower.stages[:3](tower.stem(pixel_values))
        dense = self.dense_head(middle)
        last = tower.final_conv(tower.stages[3:](middle))
        features = self.multi_modal_projector(image_tokens(last))
        slots, counts, relations = self.summary_head(features.mean(1)).split(SUMMARY_PARTS, dim=1)
        place_shapes, place_tints = self.place_head(features).transpose(1, 2).unflatten(2, last.shape[2:]).split(PLACE_PARTS, dim=1)
        return Seen(
            features,
            dense[:, : len(GLYPHS)],
            dense[:, len(GLYPHS) :],
            slots.unflatten(1, (SLOTS, len(CHARACTERS))),
            counts.unflatten(1, (COUNTED, MOST)),
            relations.unflatten(1, (RELATIONS, RELATED)),
            place_shapes,
            place_tints,
        )


@dataclass
class Packed:
    """Token rows of a batch, several questions in one row. Shapes [pictures, length]."""

    input_ids: Tensor
    """Text ids, and -1 - k where visual token k of the row's picture belongs."""
    position_ids: Tensor
    question: Tensor
    """Which question a token belongs to: 0 for the shared beginning, 1.. for the questions, -1 for padding."""
    labels: Tensor
    """The id to predict at this place; -100 if there is nothing to learn."""


class DemoModel(nn.Module):
    """The whole model. Parameter names are those of the native `fast_vlm` layout below `model.`, except for the auxiliary heads."""

    def __init__(self, config: DemoConfig = DemoConfig()) -> None:
        super().__init__()
        self.config = config
        self.vision = DemoVision(config)
        self.language_model = Qwen2Model(config.language())

    def embed(self, packed_ids: Tensor, features: Tensor) -> Tensor:
        """Token and visual embeddings [rows, length, hidden]; ids below zero name visual tokens."""
        text = self.language_model.embed_tokens(packed_ids.clamp_min(0))
        visual = (-1 - packed_ids).clamp_min(0).unsqueeze(-1).expand(-1, -1, features.shape[-1])
        return torch.where((packed_ids < 0).unsqueeze(-1), features.gather(1, visual).to(text.dtype), text)

    def logits(self, packed: Packed, features: Tensor) -> Tensor:
        """Logits [n, vocab] of the n places that have a label, in row-major order. `features` [rows, tokens, hidden]."""
        length = packed.input_ids.shape[1]
        own = packed.question.unsqueeze(2) == packed.question.unsqueeze(1)
        shared = (packed.question == 0).unsqueeze(1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = ((own | shared) & causal).unsqueeze(1)
        embeds = self.embed(packed.input_ids, features)
        hidden = self.language_model(
            inputs_embeds=embeds, position_ids=packed.position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return F.linear(hidden[packed.labels >= 0], self.language_model.embed_tokens.weight)


def count_parameters(config: DemoConfig = DemoConfig()) -> int:
    """Parameters of the exported model: without auxiliary heads, BatchNorms folded."""
    model = DemoModel(config)
    fold(model.vision.vision_tower)
    heads = (model.vision.dense_head, model.vision.summary_head, model.vision.place_head)
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for head in heads for p in head.parameters())
