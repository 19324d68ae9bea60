"""Fine-tunes for tests, made and merged by the real PEFT: the reference that `convert --adapter` is compared with.

PEFT needs modules, not a model that runs: a tree of them is built from the names and shapes of a checkpoint, in whichever naming it has.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

Tensors = dict[str, torch.Tensor]


def module_tree(directory: Path) -> nn.Module:
    """The model of a checkpoint of one safetensors file as linear layers, convolutions, embeddings and loose parameters."""
    parts: dict[str, Tensors] = defaultdict(dict)
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        parts[module][part] = tensor
    root = nn.Module()
    for name, tensors in parts.items():
        parent = root
        *above, last = name.split(".")
        for step in above:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        if last in parent._modules:
            _fill(parent.get_submodule(last), tensors)
        else:
            parent.add_module(last, _layer(last, tensors))
    if "lm_head" not in root._modules:  # tied to the embedding, and computed like any other layer
        weight = next(module.weight for module in root.modules() if isinstance(module, nn.Embedding))
        root.add_module("lm_head", _layer("lm_head", {"weight": weight.detach().clone()}))
    return root.requires_grad_(False)


def _layer(name: str, tensors: Tensors) -> nn.Module:
    weight, biased = tensors.get("weight"), "bias" in tensors
    layer: nn.Module
    if weight is None or weight.dim() not in (2, 4):
        return _fill(nn.Module(), tensors)
    if name == "embed_tokens":
        layer = nn.Embedding(*weight.shape)
    elif weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], biased)
    else:
        rows, inputs, *kernel = weight.shape
        groups = rows if inputs == 1 else 1
        layer = nn.Conv2d(inputs * groups, rows, (kernel[0], kernel[1]), groups=groups, bias=biased)
    layer.load_state_dict(tensors, assign=True)
    return layer


def _fill(module: nn.Module, tensors: Tensors) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)
    return module


def train(directory: Path, *, seed: int = 0, size: float = 0.05, **options: Any) -> peft.PeftModel:
    """A LoRA on the model of a checkpoint, with `options` of PEFT's LoraConfig, and random values in everything that it trains."""
    model = peft.get_peft_model(module_tree(directory), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * size
            update = "lora_" in name and "magnitude" not in name
            parameter.data.copy_(noise if update else parameter.data * (1 + noise) + noise)
    return model


def merged(model: peft.PeftModel) -> Tensors:
    """PEFT's own merge: every tensor by its stored name."""
    tensors: Tensors = model.merge_and_unload().state_dict()
    return tensors
