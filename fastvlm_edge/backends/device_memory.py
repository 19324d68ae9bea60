"""Device memory of the TensorRT backend: the KV cache, image features, and buffers that only grow."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import from_float32, storage, to_float32
from fastvlm_edge.backends.kv_cache import Slots, check_length, next_capacity
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import DecoderSpec
from fastvlm_edge.nvidia.cuda import Cuda, PinnedMemory

ALIGNMENT = 256
"""TensorRT requires every address to be a multiple of this."""


def aligned(nbytes: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Keeps track of every allocation, so that all memory is released, also after an error."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._owned: list[Freeable] = []

    def own(self, memory: Freeable) -> None:
        """Free `memory` together with the rest."""
        self._owned.append(memory)

    def buffer(self, nbytes: int) -> Buffer:
        """Allocate device memory. Raises OutOfDeviceMemory."""
        buffer = Buffer(self._cuda, nbytes)
        self.own(buffer)
        return buffer

    def pinned(self, nbytes: int) -> PinnedMemory:
        """Allocate page-locked host memory. Raises OutOfDeviceMemory."""
        memory = self._cuda.allocate_pinned(nbytes)
        self.own(memory)
        return memory

    def free(self) -> None:
        """Release everything. No work may be in progress."""
        with contextlib.ExitStack() as rest:  # an error does not keep the rest from being released
            while self._owned:
                rest.callback(self._owned.pop(0).free)


class Freeable(Protocol):
    """Memory of any kind that can be released."""

    def free(self) -> None: ...


class Buffer:
    """Device memory that can grow. Growing loses the contents and changes the address."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda = cuda
        self.address = 0
        self.nbytes = 0
        self.reserve(nbytes)

    def reserve(self, nbytes: int) -> bool:
        """Grow to at least `nbytes`. No work on the old memory may be in progress. Returns whether the address changed."""
        if nbytes <= self.nbytes:
            return False
        self.free()
        self.address, self.nbytes = self._cuda.allocate(aligned(nbytes)), aligned(nbytes)
        return True

    def free(self) -> None:
        """Release the memory."""
        address, self.address, self.nbytes = self.address, 0, 0  # before CUDA may raise, so that nothing is freed twice
        if address:
            self._cuda.free(address)


@dataclass(frozen=True)
class Block:
    """Where keys and values [layers, 2, rows, kv_heads, capacity, head_dim] are on the device."""

    address: int
    rows: int
    capacity: int


class DeviceCache(Slots):
    """The KV cache as one buffer [layers, 2, rows, kv_heads, capacity, head_dim] on the device; `KVCache` is the same in host memory.

    Row i is slot i. Rows are added as slots are used. What a call enqueues runs in the order of the stream.
    """

    def __init__(
        self, cuda: Cuda, spec: DecoderSpec, stream: int, capacity_for: Callable[[int], int] = next_capacity, slots: int = 1
    ) -> None:
        """`capacity_for` tells which capacity holds a number of positions."""
        super().__init__(slots)
        self._cuda, self._stream, self._capacity_for = cuda, stream, capacity_for
        self._parts = spec.layers * 2
        self._heads = spec.kv_heads
        self._dtype = spec.dtype
        self._position_bytes = spec.head_dim * storage(spec.dtype).itemsize
        self.context = spec.context
        self._block = Block(0, 0, 0)
        self._replace(1, capacity_for(1))

    @property
    def rows(self) -> int:
        """Number of slots that have memory."""
        return self._block.rows

    @property
    def capacity(self) -> int:
        """Number of positions that fit into a slot before the buffer has to grow."""
        return self._block.capacity

    def part(self, layer: int, value: int, slot: int) -> int:
        """Address of the keys (0) or values (1) of a layer, from a slot on: [rows - slot, kv_heads, capacity, head_dim]."""
        return self._block.address + self._offset(self._block, (2 * layer + value) * self.rows + slot)

    def bytes_at(self, capacity: int, rows: int = 1) -> int:
        """Size of a buffer of `rows` slots for `capacity` positions each, in bytes."""
        return self._parts * rows * self._heads * capacity * self._position_bytes

    def append(self, kv_new: int, slot: int, rows: int, seq: int, width: int) -> None:
        """Enqueue the copy of the first `seq` positions of `kv_new` [layers, 2, rows, kv_heads, width, head_dim] to the ends of the slots.

        They are those from `slot` on; `resize` must have made room before.
        """
        new, starts = Block(kv_new, rows, width), self.lengths[slot : slot + rows]
        if rows == self.rows and len({*starts}) == 1:
            self._copy_rows(self._block, starts[0], new, seq)
        else:
            for row, start in enumerate(starts):
                self._copy(self._block, slot + row, start, new, row, seq)
        for row, start in enumerate(starts):
            self.lengths[slot + row] = start + seq

    def resize(self, slots: int, positions: int) -> None:
        """Take rows for the first `slots` and those in use, and the capacity for `positions`, at least those in use.

        Call it after all work that uses the cache. If it raises OutOfDeviceMemory, nothing has changed.
        """
        used = max(slot + 1 for slot, length in enumerate(self.lengths) if length or slot < slots)
        self._replace(used, self._capacity_for(max(positions, 1, *self.lengths)))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another, and wait for that. If it fails, that one is empty."""
        self.check(length, source)
        if source != target:
            self.lengths[target] = 0
            self._copy(self._block, target, 0, self._block, source, length)
            self._cuda.synchronize(self._stream)
        self.lengths[target] = length

    def save(self, slot: int, memory: HeldMemory) -> DeviceSlot:
        """Copy a slot to memory of its own, and wait for that. Raises OutOfDeviceMemory."""
        length = self.lengths[slot]
        nbytes = aligned(max(self.bytes_at(length), 1))
        saved = DeviceSlot(memory, memory.allocate(nbytes), length, nbytes)
        memory.release_with(saved, saved.address)
        self._copy(Block(saved.address, 1, length), 0, 0, self._block, slot, length)
        self._cuda.synchronize(self._stream)
        return saved

    def restore(self, saved: DeviceSlot, slot: int, length: int) -> None:
        """Copy the first `length` positions of a saved slot, and wait for that. If it fails, the slot is empty."""
        check_length(length, saved.length, "the copy")
        self.lengths[slot] = 0
        self._copy(self._block, slot, 0, Block(saved.address, 1, saved.length), 0, length)
        self._cuda.synchronize(self._stream)
        self.lengths[slot] = length

    def read(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Positions `first` to `length - 1` of slot 0 on the host: [layers, 2, kv_heads, positions, head_dim].

        No work may be in progress.
        """
        cuda, size, count, heads = self._cuda, self._position_bytes, length - first, self._heads
        width = count * size
        pinned = cuda.allocate_pinned(self._parts * heads * width)
        try:
            for index in range(self._parts * heads):
                part, head = divmod(index, heads)
                source = self._block.address + self._offset(self._block, part * self.rows, head) + first * size
                cuda.copy(pinned.address + index * width, source, width, self._stream)
            cuda.synchronize(self._stream)
            stored = pinned.view((self._parts // 2, 2, heads, count, size // storage(self._dtype).itemsize), storage(self._dtype))
            return np.array(to_float32(stored, self._dtype))
        finally:
            pinned.free()

    def free(self) -> None:
        """Release the memory."""
        address, self._block = self._block.address, Block(0, 0, 0)
        if address:
            self._cuda.free(address)

    def _replace(self, rows: int, capacity: int) -> None:
        """Move to another buffer. Positions never written are zero: the graph masks them, but a mask does not stop a NaN."""
        cuda, nbytes = self._cuda, self.bytes_at(capacity, rows)
        block = Block(cuda.allocate(aligned(nbytes)), rows, capacity)
        try:
            cuda.zero(block.address, nbytes, self._stream)
            for slot, length in enumerate(self.lengths):
                self._copy(block, slot, 0, self._block, slot, length)
            cuda.synchronize(self._stream)
        except BaseException:
            with contextlib.suppress(FastVLMError):
                cuda.synchronize(self._stream)
            cuda.free(block.address)
            raise
        old, self._block = self._block, block
        if old.address:
            cuda.free(old.address)

    def _copy(self, target: Block, row: int, position: int, source: Block, source_row: int, count: int) -> None:
        """Enqueue the copy of the first `count` positions of a row of `source` to `position` in a row of `target`."""
        if not count:
            return
        if target.rows == source.rows == 1:
            self._copy_rows(target, position, source, count)
            return
        size = self._position_bytes
        for head in range(self._heads):
            to = target.address + self._offset(target, row, head) + position * size
            at = source.address + self._offset(source, source_row, head)
            pitches = self._offset(target, target.rows), self._offset(source, source.rows)
            self._cuda.copy_2d(to, pitches[0], at, pitches[1], count * size, self._parts, self._stream)

    def _copy_rows(self, target: Block, position: int, source: Block, count: int) -> None:
        """Enqueue the copy of the first `count` positions of every row of `source` to `position` in those of `target`, as many rows."""
        size, height = self._position_bytes, self._parts * target.rows * self._heads
        to, pitch = target.address + position * size, target.capacity * size
        self._cuda.copy_2d(to, pitch, source.address, source.capacity * size, count * size, height, self._stream)

    def _offset(self, block: Block, row: int, head: int = 0) -> int:
        """Bytes before a row, counted over all layers, and a head in it."""
        return (row * self._heads + head) * block.capacity * self._position_bytes


class HeldMemory:
    """Owns the device memory of objects that callers hold: image features, and copies of slots.

    They may become garbage at any moment, also during the capture of a CUDA graph, when freeing memory is forbidden. Their memory therefore
    waits in a queue until `sweep`.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._live: set[int] = set()
        self._dead: deque[int] = deque()

    def allocate(self, nbytes: int) -> int:
        """Allocate memory, which is at the latest released by `free`. Raises OutOfDeviceMemory."""
        address = self._cuda.allocate(nbytes)
        self._live.add(address)
        return address

    def release_with(self, holder: object, address: int) -> None:
        """Release memory when nothing refers to `holder` any more."""
        weakref.finalize(holder, self._dead.append, address)

    def holds(self, address: int) -> bool:
        """Whether the memory at an address is still allocated."""
        return address in self._live

    def sweep(self) -> None:
        """Free the memory of objects that are garbage. No work may be in progress."""
        while self._dead:
            address = self._dead.popleft()
            if address in self._live:
                self._live.remove(address)
                self._cuda.free(address)

    def free(self) -> None:
        """Release all memory, also that of objects that are still referred to."""
        with contextlib.ExitStack() as rest:
            while self._live:
                rest.callback(self._cuda.free, self._live.pop())


@dataclass(frozen=True, eq=False)
class DeviceSlot:
    """A copy of the positions of a slot on the device: [layers, 2, kv_heads, length, head_dim].

    Its memory is released when nothing refers to it any more.
    """

    memory: HeldMemory
    address: int
    length: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class DeviceFeatures:
    """Image features of one picture, [rows, hidden] on the device. Their memory is released when nothing refers to them any more."""

    store: FeatureStore
    address: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Memory that they take on the device."""
        return self.rows * self.store.row_bytes()

    def numpy(self) -> NDArray[np.float32]:
        """A copy on the host: [rows, hidden]."""
        return self.store.read(self)


class FeatureStore:
    """Makes and reads DeviceFeatures."""

    def __init__(self, cuda: Cuda, memory: HeldMemory, spec: DecoderSpec, stream: int, lock: AbstractContextManager[Any]) -> None:
        """The backend holds `lock` while it uses the stream, so that no other work gets into a CUDA graph that it captures."""
        self._cuda, self._memory, self._spec, self._stream, self._lock = cuda, memory, spec, stream, lock

    def row_bytes(self) -> int:
        """Size of one visual token in bytes."""
        return self._spec.hidden * storage(self._spec.dtype).itemsize

    def new(self, rows: int) -> DeviceFeatures:
        """Allocate memory for the features of a picture. Raises OutOfDeviceMemory."""
        features = DeviceFeatures(self, self._memory.allocate(aligned(rows * self.row_bytes())), rows)
        self._memory.release_with(features, features.address)
        return features

    def holds(self, features: object) -> bool:
        """Whether `features` belong to this store and are still allocated."""
        return isinstance(features, DeviceFeatures) and features.store is self and self._memory.holds(features.address)

    def read(self, features: DeviceFeatures) -> NDArray[np.float32]:
        """A copy on the host: [rows, hidden]. Raises FastVLMError if the backend was closed."""
        nbytes = features.rows * self.row_bytes()
        with self._lock:
            if not self.holds(features):
                raise FastVLMError("the model that encoded this picture was closed", "read image features before closing the model")
            pinned = self._cuda.allocate_pinned(nbytes)
            try:
                self._cuda.copy(pinned.address, features.address, nbytes, self._stream)
                self._cuda.synchronize(self._stream)
                dtype = self._spec.dtype
                return np.array(to_float32(pinned.view((features.rows, self._spec.hidden), storage(dtype)), dtype))
            finally:
                pinned.free()

    def write(self, features: DeviceFeatures, values: NDArray[np.float32]) -> None:
        """Copy values [rows, hidden] from the host, rounded to the decoder's type. The caller holds the lock."""
        stored = from_float32(values, self._spec.dtype)
        pinned = self._cuda.allocate_pinned(stored.nbytes)
        try:
            np.copyto(pinned.view(stored.shape, stored.dtype), stored)
            self._cuda.copy(features.address, pinned.address, stored.nbytes, self._stream)
            self._cuda.synchronize(self._stream)
        finally:
            pinned.free()


def cache_addresses(cache: DeviceCache, layers: int, slot: int) -> Iterator[tuple[str, int]]:
    """Name and address of every `past_key_values` input of the decoder, from a slot on."""
    for layer in range(layers):
        for value, part in enumerate(("key", "value")):
            yield f"past_key_values.{layer}.{part}", cache.part(layer, value, slot)
