"""The KV cache of the onnxruntime backend: one contiguous buffer, to which one strided copy appends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import storage
from fastvlm_edge.backends.protocol import check_context
from fastvlm_edge.errors import FastVLMError

FIRST_CAPACITY = 128


def next_capacity(needed: int) -> int:
    """The capacity that holds `needed` positions: a multiple of 128 up to 1,024 and of 512 above."""
    step = 128 if needed <= 1024 else 512
    return -(-needed // step) * step


class KVCache:
    """Buffer [layers, 2, batch, kv_heads, capacity, head_dim] on the host.

    The capacity grows in the steps of `next_capacity`, to at most `context`. The graph attends to the whole buffer, so it should not be
    much larger than the conversation: at position 300, a capacity of 384 instead of 512 saves 3 % of a decode step. Growing costs one copy.
    Positions that were never written are zero: the graph masks them, but a mask does not stop a NaN.
    """

    def __init__(self, *, layers: int, kv_heads: int, head_dim: int, context: int, dtype: str, batch: int = 1) -> None:
        """`dtype` is the name that the manifest uses; bfloat16 is kept as raw uint16 bits."""
        self._outer = (layers, 2, batch, kv_heads)
        self._head_dim = head_dim
        self._dtype = storage(dtype)
        self.context = context
        self.length = 0
        self.revision = 0
        """Counts every change of the contents."""
        self.buffer = self._allocate(min(FIRST_CAPACITY, context))

    @property
    def capacity(self) -> int:
        """Number of positions that fit before the buffer has to grow."""
        return int(self.buffer.shape[4])

    def append(self, kv_new: NDArray[Any], position: int) -> bool:
        """Write `kv_new` [layers, 2, batch, kv_heads, seq, head_dim] at `position` and forget all positions after it.

        Returns whether the buffer grew, which invalidates earlier views. Raises FastVLMError past the context.
        """
        if not 0 <= position <= self.length:
            raise ValueError(f"position {position} is outside the {self.length} positions of the cache")
        end = position + kv_new.shape[4]
        grew = self.reserve(end)
        self.buffer[:, :, :, :, position:end] = kv_new
        self.length = end
        self.revision += 1
        return grew

    def reserve(self, positions: int) -> bool:
        """Make room for `positions` in total. Returns whether the buffer grew. Raises FastVLMError past the context."""
        return positions > self.capacity and self._grow(positions)

    def extend(self, length: int) -> None:
        """Set the length after a graph has written into the buffer itself; `reserve` made the room before."""
        if not self.length <= length <= self.capacity:
            raise ValueError(f"length {length} is outside {self.length} to {self.capacity}")
        self.length = length
        self.revision += 1

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is outside the {self.length} positions of the cache")
        self.length = length
        self.revision += 1

    def reset(self) -> bool:
        """Forget all positions and release the memory beyond the first capacity. Returns whether the buffer changed."""
        self.length = 0
        self.revision += 1
        if self.capacity <= FIRST_CAPACITY:
            return False
        self.buffer = self._allocate(FIRST_CAPACITY)
        return True

    def views(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and contiguous view [batch, kv_heads, capacity, head_dim] of every `past_key_values` input of the decoder."""
        for layer, pair in enumerate(self.buffer):
            yield f"past_key_values.{layer}.key", pair[0]
            yield f"past_key_values.{layer}.value", pair[1]

    def _grow(self, needed: int) -> bool:
        check_context(needed, self.context)
        larger = self._allocate(min(next_capacity(needed), self.context))
        larger[:, :, :, :, : self.length] = self.buffer[:, :, :, :, : self.length]
        self.buffer = larger
        return True

    def _allocate(self, capacity: int) -> NDArray[Any]:
        try:
            return np.zeros((*self._outer, capacity, self._head_dim), dtype=self._dtype)
        except MemoryError:
            raise FastVLMError(f"there is not enough memory for a KV cache of {capacity} positions", "shorten the conversation") from None
