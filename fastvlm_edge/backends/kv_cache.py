"""The KV cache of the onnxruntime backend: one buffer with a row for each slot, to which strided copies append."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


def check_length(length: int, held: int, where: str) -> None:
    """Raise ValueError if `length` is not a number of the `held` positions of `where`."""
    if not 0 <= length <= held:
        raise ValueError(f"length {length} is outside the {held} positions of {where}")


class Slots:
    """The number of positions that each slot of a cache holds."""

    def __init__(self, slots: int) -> None:
        self.lengths = [0] * slots

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget every position of a slot from `length` on."""
        self.check(length, slot)
        self.lengths[slot] = length

    def check(self, length: int, slot: int) -> None:
        """Raise ValueError if a slot does not hold the first `length` positions."""
        check_length(length, self.lengths[slot], f"slot {slot}")


@dataclass(frozen=True, eq=False)
class HostSlot:
    """A copy of the positions of a slot in host memory."""

    data: NDArray[Any]  # [layers, 2, kv_heads, positions, head_dim]

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.data.shape[3])

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.data.nbytes


class KVCache(Slots):
    """Buffer [layers, 2, rows, kv_heads, capacity, head_dim] on the host; row i is slot i.

    Rows and capacity grow as they are needed: to at most `slots` and `context`, the capacity in the steps of `next_capacity`. The graph
    attends to the whole capacity, so it should not be much larger than the longest conversation: at position 300, a capacity of 384
    instead of 512 saves 3 % of a decode step. Growing costs one copy. Positions that were never written are zero: the graph masks them, but
    a mask does not stop a NaN.
    """

    def __init__(self, *, layers: int, kv_heads: int, head_dim: int, context: int, dtype: str, slots: int = 1) -> None:
        """`dtype` is the name that the manifest uses; bfloat16 is kept as raw uint16 bits."""
        super().__init__(slots)
        self._shape = (layers, 2, kv_heads, head_dim)
        self._dtype = storage(dtype)
        self.context = context
        self.buffer = self._allocate(1, min(FIRST_CAPACITY, context))

    @property
    def rows(self) -> int:
        """Number of slots that have memory."""
        return int(self.buffer.shape[2])

    @property
    def capacity(self) -> int:
        """Number of positions that fit into a slot before the buffer has to grow."""
        return int(self.buffer.shape[4])

    def append(self, kv_new: NDArray[Any], slot: int = 0) -> None:
        """Append `kv_new` [layers, 2, n, kv_heads, seq, head_dim] to the slots from `slot` on; `reserve` made the room before."""
        seq = kv_new.shape[4]
        for row in range(kv_new.shape[2]):
            start = self.lengths[slot + row]
            self.buffer[:, :, slot + row, :, start : start + seq] = kv_new[:, :, row]
            self.lengths[slot + row] = start + seq

    def reserve(self, slot: int, positions: int) -> bool:
        """Make room for `positions` in a slot and those before it. Returns whether the buffer changed, which invalidates earlier views.

        Raises FastVLMError past the context, or without memory.
        """
        check_context(positions, self.context)
        capacity = self.capacity if positions <= self.capacity else min(next_capacity(positions), self.context)
        return self._resize(max(self.rows, slot + 1), capacity)

    def extend(self, length: int, slot: int = 0) -> None:
        """Set the length of a slot after a graph has written into the buffer itself; `reserve` made the room before."""
        if not self.lengths[slot] <= length <= self.capacity:
            raise ValueError(f"length {length} is outside {self.lengths[slot]} to {self.capacity}")
        self.lengths[slot] = length

    def reset(self, slot: int = 0) -> bool:
        """Forget a slot, and release the memory that the others do not need. Returns whether the buffer changed."""
        self.lengths[slot] = 0
        used = [number for number, length in enumerate(self.lengths) if length]
        capacity = min(next_capacity(max(*self.lengths, FIRST_CAPACITY)), self.context)
        if used and self.capacity < 2 * capacity:  # not worth a copy
            return False
        return self._resize(used[-1] + 1 if used else 1, capacity)

    def save(self, slot: int) -> HostSlot:
        """A copy of a slot. Raises MemoryError."""
        return HostSlot(self.buffer[:, :, slot, :, : self.lengths[slot]].copy())

    def copy(self, source: int, target: int, length: int) -> bool:
        """Let slot `target` hold the first `length` positions of slot `source`. Returns whether the buffer changed."""
        self.check(length, source)
        changed = self.reserve(target, length)
        self.buffer[:, :, target, :, :length] = self.buffer[:, :, source, :, :length]
        self.lengths[target] = length
        return changed

    def restore(self, saved: HostSlot, slot: int, length: int) -> bool:
        """Let a slot hold the first `length` positions of a copy. Returns whether the buffer changed."""
        check_length(length, saved.length, "the copy")
        changed = self.reserve(slot, length)
        self.buffer[:, :, slot, :, :length] = saved.data[:, :, :, :length]
        self.lengths[slot] = length
        return changed

    def views(self, slot: int = 0, rows: int = 1) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and contiguous view [rows, kv_heads, capacity, head_dim] of every `past_key_values` input of the decoder, from `slot` on."""
        for layer, pair in enumerate(self.buffer):
            yield f"past_key_values.{layer}.key", pair[0, slot : slot + rows]
            yield f"past_key_values.{layer}.value", pair[1, slot : slot + rows]

    def _resize(self, rows: int, capacity: int) -> bool:
        if (rows, capacity) == (self.rows, self.capacity):
            return False
        other = self._allocate(rows, capacity)
        for slot, length in enumerate(self.lengths[: min(rows, self.rows)]):
            other[:, :, slot, :, :length] = self.buffer[:, :, slot, :, :length]
        self.buffer = other
        return True

    def _allocate(self, rows: int, capacity: int) -> NDArray[Any]:
        layers, pair, kv_heads, head_dim = self._shape
        try:
            return np.zeros((layers, pair, rows, kv_heads, capacity, head_dim), dtype=self._dtype)
        except MemoryError:
            what = f"there is not enough memory for a KV cache of {rows} x {capacity} positions"
            raise FastVLMError(what, "shorten the conversation, or use fewer slots") from None
