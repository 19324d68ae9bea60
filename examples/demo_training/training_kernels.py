"""Faster depthwise convolution and GELU for training on CPUs (`training_kernels.cpp`), compiled at first use.

They replace PyTorch's own only in training under bfloat16 autocast. Without a C++ compiler, training uses PyTorch's and is slower.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import cpp_extension


@functools.cache
def load_kernels() -> Any:
    """The compiled module, or None (with a line on stderr) where it cannot be compiled."""
    flags = ["-O3", "-march=native", "-ffast-math", "-Wno-unknown-pragmas"]
    try:
        return cpp_extension.load("fastvlm_demo_kernels", [str(Path(__file__).with_name("training_kernels.cpp"))], extra_cflags=flags)
    except (OSError, RuntimeError) as error:
        print(f"kernels: not compiled, training will be slower ({str(error).splitlines()[0]})", file=sys.stderr)
        return None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return load_kernels().depthwise_forward(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight = load_kernels().depthwise_backward(gradient, x, weight, ctx.stride)
        return grad_x, grad_weight, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        return load_kernels().gelu_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].to(torch.bfloat16)
        gradient = gradient.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else gradient.contiguous()
        return load_kernels().gelu_backward(gradient, x)


def _in_training(x: Tensor) -> bool:
    return torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and load_kernels() is not None


def gelu(x: Tensor) -> Tensor:
    """Exact GELU (erf), by the compiled kernel in training."""
    if _in_training(x) and x.dtype == torch.bfloat16:
        return _Gelu.apply(x)
    return F.gelu(x)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution. oneDNN still does the case that it is good at: 3 x 3, stride 1, one output per channel."""

    def forward(self, x: Tensor) -> Tensor:
        easy = self.kernel_size == (3, 3) and self.stride == (1, 1) and self.out_channels == self.in_channels
        if self.kernel_size[0] not in (3, 7) or easy or not _in_training(x):
            return super().forward(x)
        out = _Depthwise.apply(x, self.weight, self.stride[0])
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)
