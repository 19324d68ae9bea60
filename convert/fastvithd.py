"""FastViTHD, the vision encoder of FastVLM, as a PyTorch module (arXiv 2412.13303; blocks from FastViT, arXiv 2303.14189).

The module exists in two forms: the train-time one, whose convolutions are sums of several branches, and the inference one, in which
`reparameterize` has merged every sum into a single convolution. Submodule names are those of the native `fast_vlm` checkpoints.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-5
HEAD_DIM = 32


@dataclass(frozen=True)
class FastViTHDConfig:
    """Shape of one encoder. The defaults are the released FastViTHD (125M parameters)."""

    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratio: int = 4
    out_dim: int = 3072
    se_dim: int = 192

    def __post_init__(self) -> None:
        if len(self.depths) != 5 or len(self.dims) != 5:
            raise ValueError(f"FastViTHD has five stages, got depths {self.depths} and dims {self.dims}")
        widths = (*self.dims, self.out_dim)
        if any(wide % narrow for narrow, wide in itertools.pairwise(widths)):
            raise ValueError(f"each width must be a multiple of the one before it (grouped convolutions), got {widths}")
        if any(dim % HEAD_DIM for dim in self.dims[3:]):
            raise ValueError(f"the widths of stages 4 and 5 must be multiples of {HEAD_DIM}, got {self.dims[3:]}")


class ConvBN(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that computes the same in inference."""
        return fold_batch_norm(self.conv.weight, self.bn)


def fold_batch_norm(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold `bn` into the bias-free convolution `weight` [out, in/groups, k, k] that feeds it."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return weight * scale.reshape(-1, 1, 1, 1), bn.bias - bn.running_mean * scale


def identity_kernel(channels: int, groups: int, kernel: int) -> Tensor:
    """The convolution weight that copies its input: [channels, channels/groups, kernel, kernel]."""
    weight = torch.zeros(channels, channels // groups, kernel, kernel)
    out = torch.arange(channels)
    weight[out, out % (channels // groups), kernel // 2, kernel // 2] = 1.0
    return weight


def pad_kernel(weight: Tensor, kernel: int) -> Tensor:
    """Embed a small odd kernel in the middle of a larger one."""
    border = (kernel - weight.shape[-1]) // 2
    return F.pad(weight, [border] * 4)


class Reparameterizable(nn.Module):
    """A sum of linear branches that can be replaced by one convolution with bias, `reparam_conv`."""

    reparam_conv: nn.Conv2d | None

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that equals the sum of the branches."""
        raise NotImplementedError

    def _install(self, shape: nn.Conv2d, branches: tuple[str, ...], *, train_form: bool) -> None:
        """Keep either the train-time branches or, in the inference form, `reparam_conv` shaped like `shape`."""
        self._branches = branches
        self.reparam_conv = None if train_form else shape
        self._shape = (shape.in_channels, shape.out_channels, shape.kernel_size[0], shape.stride[0], shape.groups)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches into `reparam_conv`; a second call does nothing."""
        if self.reparam_conv is not None:
            return
        weight, bias = self.fused()
        c_in, c_out, kernel, stride, groups = self._shape
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups).to(weight.device, weight.dtype)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)  # type: ignore[union-attr]
        for name in self._branches:
            delattr(self, name)
        self.reparam_conv = conv


class MobileOneConv(Reparameterizable):
    """k x k convolution, 1 x 1 convolution and identity, each with BatchNorm, summed; then squeeze-excite and GELU, both optional."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        se_dim: int = 0,
        activation: bool = True,
        conv_branch: bool = True,
        train_form: bool = False,
    ) -> None:
        super().__init__()
        self.se = SqueezeExcite(c_out, se_dim) if se_dim else None
        self.activation = activation
        self.identity: nn.BatchNorm2d | None = None
        self.conv_kxk: nn.ModuleList | None = None
        self.conv_scale: ConvBN | None = None
        if train_form:
            if c_in == c_out and stride == 1:
                self.identity = nn.BatchNorm2d(c_in, eps=BATCH_NORM_EPS)
            if conv_branch:
                self.conv_kxk = nn.ModuleList([ConvBN(c_in, c_out, kernel, stride, groups)])
                if kernel > 1:
                    self.conv_scale = ConvBN(c_in, c_out, 1, stride, groups)
        self._install(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups),
            ("conv_kxk", "conv_scale", "identity"),
            train_form=train_form,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            out = self.reparam_conv(x)
        else:
            parts = [self.identity, self.conv_scale, *(self.conv_kxk or ())]
            out = torch.stack([part(x) for part in parts if part is not None]).sum(0)
        if self.se is not None:
            out = self.se(out)
        return F.gelu(out) if self.activation else out

    def fused(self) -> tuple[Tensor, Tensor]:
        _, c_out, kernel, _, groups = self._shape
        pairs = [conv.fused() for conv in self.conv_kxk or () if isinstance(conv, ConvBN)]
        if self.conv_scale is not None:
            weight, bias = self.conv_scale.fused()
            pairs.append((pad_kernel(weight, kernel), bias))
        if self.identity is not None:
            pairs.append(fold_batch_norm(identity_kernel(c_out, groups, kernel).to(self.identity.weight), self.identity))
        return torch.stack([weight for weight, _ in pairs]).sum(0), torch.stack([bias for _, bias in pairs]).sum(0)


class RepMixer(Reparameterizable):
    """Token mixing by depthwise convolution: x + gamma * (mixer(x) - norm(x)) (FastViT, section 3.1)."""

    def __init__(self, dim: int, *, train_form: bool = False) -> None:
        super().__init__()
        self.norm: MobileOneConv | None = None
        self.mixer: MobileOneConv | None = None
        self.layer_scale: LayerScale | None = None
        if train_form:
            self.norm = MobileOneConv(dim, dim, 3, groups=dim, activation=False, conv_branch=False, train_form=True)
            self.mixer = MobileOneConv(dim, dim, 3, groups=dim, activation=False, train_form=True)
            self.layer_scale = LayerScale(dim)
        self._install(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), ("norm", "mixer", "layer_scale"), train_form=train_form)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        assert self.norm is not None and self.mixer is not None and self.layer_scale is not None
        return x + self.layer_scale(self.mixer(x) - self.norm(x))

    def fused(self) -> tuple[Tensor, Tensor]:
        assert self.norm is not None and self.mixer is not None and self.layer_scale is not None
        mixer_weight, mixer_bias = self.mixer.fused()
        norm_weight, norm_bias = self.norm.fused()
        gamma = self.layer_scale.gamma
        dim = gamma.shape[0]
        weight = identity_kernel(dim, dim, 3).to(gamma) + gamma.reshape(-1, 1, 1, 1) * (mixer_weight - norm_weight)
        return weight, gamma.flatten() * (mixer_bias - norm_bias)


class LargeKernelConv(Reparameterizable):
    """The sum of a 7 x 7 and a 3 x 3 stride-2 grouped convolution, then GELU."""

    def __init__(self, c_in: int, c_out: int, *, train_form: bool = False) -> None:
        super().__init__()
        self.large_conv = ConvBN(c_in, c_out, 7, 2, groups=c_in) if train_form else None
        self.small_conv = ConvBN(c_in, c_out, 3, 2, groups=c_in) if train_form else None
        self._install(nn.Conv2d(c_in, c_out, 7, 2, 3, groups=c_in), ("large_conv", "small_conv"), train_form=train_form)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return F.gelu(self.reparam_conv(x))
        assert self.large_conv is not None and self.small_conv is not None
        return F.gelu(self.large_conv(x) + self.small_conv(x))

    def fused(self) -> tuple[Tensor, Tensor]:
        assert self.large_conv is not None and self.small_conv is not None
        weight, bias = self.large_conv.fused()
        small_weight, small_bias = self.small_conv.fused()
        return weight + pad_kernel(small_weight, 7), bias + small_bias


class PositionalConv(Reparameterizable):
    """Conditional positional encoding: x + depthwise 7 x 7 convolution of x."""

    def __init__(self, dim: int, *, train_form: bool = False) -> None:
        super().__init__()
        self.pe = nn.Conv2d(dim, dim, 7, padding=3, groups=dim) if train_form else None
        self._install(nn.Conv2d(dim, dim, 7, padding=3, groups=dim), ("pe",), train_form=train_form)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        assert self.pe is not None
        return x + self.pe(x)

    def fused(self) -> tuple[Tensor, Tensor]:
        assert self.pe is not None and self.pe.bias is not None
        dim = self.pe.weight.shape[0]
        return self.pe.weight + identity_kernel(dim, dim, 7).to(self.pe.weight), self.pe.bias


class SqueezeExcite(nn.Module):
    """x times a gate per channel, which is computed from the mean over all positions, so that any image size works."""

    def __init__(self, dim: int, se_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, se_dim, 1)
        self.fc2 = nn.Conv2d(se_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class LayerScale(nn.Module):
    """One learned factor for each channel."""

    def __init__(self, dim: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvFFN(nn.Module):
    """Depthwise 7 x 7 with BatchNorm, then two 1 x 1 convolutions with GELU between."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.conv = ConvBN(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, dim * ratio, 1)
        self.fc2 = nn.Conv2d(dim * ratio, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """Stages 1 to 3: RepMixer, then x + gamma * ConvFFN(x)."""

    def __init__(self, dim: int, ratio: int, *, train_form: bool = False) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, train_form=train_form)
        self.mlp = ConvFFN(dim, ratio)
        self.layer_scale = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every position of [batch, channels, height, width]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, LAYER_NORM_EPS).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Global multi-head self-attention over all positions, heads of 32 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, dim, height, width = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2))  # [batch, positions, 3 dim]
        q, k, v = qkv.unflatten(2, (3, dim // HEAD_DIM, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [batch, heads, positions, 32]
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out.transpose(1, 2).unflatten(2, (height, width))


class AttentionBlock(nn.Module):
    """Stages 4 and 5: x + gamma1 * attention(norm(x)), then x + gamma2 * ConvFFN(x), without a second norm."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.token_mixer = Attention(dim)
        self.layer_scale_1 = LayerScale(dim)
        self.mlp = ConvFFN(dim, ratio)
        self.layer_scale_2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.token_mixer(self.norm(x)))
        return x + self.layer_scale_2(self.mlp(x))


class Downsample(nn.Module):
    """Halve the map, double (or change) the channels: large-kernel convolution, then 1 x 1."""

    def __init__(self, c_in: int, c_out: int, *, train_form: bool = False) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernelConv(c_in, c_out, train_form=train_form), MobileOneConv(c_out, c_out, 1, train_form=train_form)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """One resolution of the encoder. Stages 4 and 5 have a positional convolution and attention blocks."""

    def __init__(self, index: int, config: FastViTHDConfig, *, train_form: bool = False) -> None:
        super().__init__()
        dim = config.dims[index]
        self.downsample = Downsample(config.dims[index - 1], dim, train_form=train_form) if index else None
        self.pos_emb = PositionalConv(dim, train_form=train_form) if index >= 3 else None
        block = (
            (lambda: AttentionBlock(dim, config.mlp_ratio))
            if index >= 3
            else (lambda: RepMixerBlock(dim, config.mlp_ratio, train_form=train_form))
        )
        self.blocks = nn.Sequential(*[block() for _ in range(config.depths[index])])

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        if self.pos_emb is not None:
            x = self.pos_emb(x)
        return self.blocks(x)


class FastViTHD(nn.Module):
    """The whole encoder: pixel_values [batch, 3, H, W] in 0..1 -> feature map [batch, out_dim, H/64, W/64]."""

    def __init__(self, config: FastViTHDConfig = FastViTHDConfig(), *, train_form: bool = False) -> None:
        super().__init__()
        self.config = config
        first = config.dims[0]
        self.stem = nn.Sequential(
            MobileOneConv(3, first, 3, 2, train_form=train_form),
            MobileOneConv(first, first, 3, 2, groups=first, train_form=train_form),
            MobileOneConv(first, first, 1, train_form=train_form),
        )
        self.stages = nn.Sequential(*[Stage(index, config, train_form=train_form) for index in range(5)])
        self.final_conv = MobileOneConv(
            config.dims[4], config.out_dim, 3, groups=config.dims[4], se_dim=config.se_dim, train_form=train_form
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.final_conv(self.stages(self.stem(pixel_values)))

    def reparameterize(self) -> FastViTHD:
        """Merge every train-time branch in place; call it in eval mode. Returns self."""
        for module in list(self.modules()):
            if isinstance(module, Reparameterizable):
                module.reparameterize()
        return self


def image_tokens(feature_map: Tensor) -> Tensor:
    """[batch, channels, h, w] -> [batch, h*w, channels] in row-major order, as the projector takes it."""
    return feature_map.flatten(2).transpose(1, 2)
