"""Random checkpoints for tests, written by `examples/checkpoints/random_checkpoint.py`, which the benchmarks use as well."""

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
    "native_config",
    "native_rows",
    "stored_name",
    "stored_shapes",
    "write_checkpoint",
    "write_json",
    "write_safetensors",
    "write_tokenizer",
]
