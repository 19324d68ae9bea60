"""Random checkpoints for tests, written by `examples/checkpoints/random_checkpoint.py`, which the benchmarks use as well."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.checkpoints.random_checkpoint import (
    SIZES,
    TINY_VISION,
    apple_config,
    native_config,
    native_rows,
    stored_name,
    stored_shapes,
    write_checkpoint,
    write_json,
    write_safetensors,
    write_tokenizer,
)

__all__ = [
    "SIZES",
    "TINY_VISION",
    "apple_config",
    "as_pickles",
    "native_config",
    "native_rows",
    "stored_name",
    "stored_shapes",
    "write_checkpoint",
    "write_json",
    "write_safetensors",
    "write_tokenizer",
]


def as_pickles(directory: Path, shards: int = 1) -> Path:
    """Replace the safetensors file of a checkpoint by `pytorch_model.bin`, or by shards of it with an index."""
    path = directory / "model.safetensors"
    tensors = list(load_file(path).items())
    path.unlink()
    if shards == 1:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
        return directory
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = dict(tensors[number::shards])
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return directory
