"""Types of the graphs' inputs and outputs. numpy has no bfloat16, so its raw bits are kept as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError

_STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
}


def storage(dtype: str) -> np.dtype[Any]:
    """The numpy type that stores a tensor of the manifest's type `dtype`. Raises FastVLMError for an unknown type."""
    if dtype not in _STORAGE:
        raise FastVLMError(f"tensor type {dtype!r} is unknown", "convert the checkpoint again with this version")
    return _STORAGE[dtype]


def from_float32(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to `dtype`, ties to even. No copy if `dtype` is float32."""
    if dtype != "bfloat16":
        return array.astype(storage(dtype), copy=False)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    # Rounding up may carry a NaN into infinity; keep it a quiet NaN.
    stored: NDArray[Any] = np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return stored


def to_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Widen from `dtype`. No copy if `dtype` is float32."""
    if dtype != "bfloat16":
        return array.astype(np.float32, copy=False)
    widened: NDArray[np.float32] = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened
