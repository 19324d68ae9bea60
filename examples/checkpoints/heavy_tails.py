"""An encoder with activations that are as hard to quantise as those of trained encoders."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastvlm_edge.convert.fastvithd import AttentionBlock, ConvFFN, Downsample, FastViTHD


@torch.no_grad()
def add_heavy_tails(encoder: FastViTHD, *, degrees: float = 2.0, seed: int = 0) -> None:
    """Give the inputs of the dense layers channels that tower over the others, as those of trained encoders do; in place.

    Each channel gets a factor 0.2 + |t| of Student's t with `degrees` degrees of freedom: of 1536 channels the largest is some 40 times the
    median one. Before fc1, qkv, proj the layer's own columns are divided by it, so the function stays as it was; behind a GELU (fc2, the
    1 x 1 of a downsampling) it changes, and the magnitude of the sum is kept.
    """
    rng = np.random.default_rng(seed)

    def factors(channels: int) -> torch.Tensor:
        return torch.from_numpy((0.2 + np.abs(rng.standard_t(degrees, channels))).astype(np.float32))

    def scale(parts: list[torch.Tensor | None], f: torch.Tensor) -> None:
        for part in parts:
            if part is not None:
                part *= f.reshape(-1, *[1] * (part.ndim - 1))

    for module in encoder.modules():
        if isinstance(module, ConvFFN):
            for before, after in (
                ((module.conv.bn.weight, module.conv.bn.bias), module.fc1),
                ((module.fc1.weight, module.fc1.bias), module.fc2),
            ):
                f = factors(after.in_channels)
                scale(list(before), f)
                after.weight /= f.reshape(1, -1, 1, 1)
        elif isinstance(module, AttentionBlock):
            f = factors(module.norm.weight.numel())
            scale([module.norm.weight, module.norm.bias], f)
            module.token_mixer.qkv.weight /= f
            f = factors(f.numel())
            module.token_mixer.qkv.weight[-f.numel() :] *= f[:, None]
            module.token_mixer.proj.weight /= f
        elif isinstance(module, Downsample):
            large, small = (part.reparam_conv for part in module.proj)
            assert isinstance(large, nn.Conv2d) and isinstance(small, nn.Conv2d)
            f = factors(small.in_channels)
            scale([large.weight, large.bias], f)
            small.weight /= f.reshape(1, -1, 1, 1)
