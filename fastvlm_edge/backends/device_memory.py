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
from fastvlm_edge.backends.kv_cache import next_capacity
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


class DeviceCache:
    """The KV cache as one buffer [layers, 2, 1, kv_heads, capacity, head_dim] on the device; `KVCache` is the same in host memory."""

    def __init__(self, cuda: Cuda, spec: DecoderSpec, stream: int, capacity_for: Callable[[int], int] = next_capacity) -> None:
        """`capacity_for` tells which capacity holds a number of positions."""
        self._cuda, self._stream, self._capacity_for = cuda, stream, capacity_for
        self._parts = spec.layers * 2
        self._rows = spec.kv_heads
        self._dtype = spec.dtype
        self._position_bytes = spec.head_dim * storage(spec.dtype).itemsize
        self.context = spec.context
        self.length = 0
        self.capacity = 0
        self.address = 0
        self._replace(capacity_for(1))

    def part(self, layer: int, value: int) -> int:
        """Address of the keys (0) or values (1) of a layer: [1, kv_heads, capacity, head_dim]."""
        return self.address + (2 * layer + value) * self._rows * self.capacity * self._position_bytes

    def bytes_at(self, capacity: int) -> int:
        """Size of a buffer for `capacity` positions, in bytes."""
        return self._parts * self._rows * capacity * self._position_bytes

    def append(self, kv_new: int, position: int, seq: int, width: int) -> None:
        """Enqueue the copy of the first `seq` of `kv_new` [layers, 2, 1, kv_heads, width, head_dim] to `position`; forget all after it.

        `grow` must have made room before.
        """
        end, size = position + seq, self._position_bytes
        height = self._parts * self._rows
        self._cuda.copy_2d(self.address + position * size, self.capacity * size, kv_new, width * size, seq * size, height, self._stream)
        self.length = end

    def resize(self, positions: int) -> None:
        """Take the capacity for `positions`, at least `length`, after all work that uses the cache.

        If it raises OutOfDeviceMemory, nothing has changed.
        """
        self._replace(self._capacity_for(positions))

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is outside the {self.length} positions of the cache")
        self.length = length

    def reset(self) -> None:
        """Forget all positions. The buffer stays."""
        self.length = 0

    def read(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Positions `first` to `length - 1` on the host: [layers, 2, kv_heads, positions, head_dim]. No work may be in progress."""
        cuda, size, count = self._cuda, self._position_bytes, length - first
        parts, width = self._parts * self._rows, count * size
        pinned = cuda.allocate_pinned(parts * width)
        try:
            for part in range(parts):
                cuda.copy(pinned.address + part * width, self.address + (part * self.capacity + first) * size, width, self._stream)
            cuda.synchronize(self._stream)
            stored = pinned.view((self._parts // 2, 2, self._rows, count, size // storage(self._dtype).itemsize), storage(self._dtype))
            return np.array(to_float32(stored, self._dtype))
        finally:
            pinned.free()

    def free(self) -> None:
        """Release the memory."""
        address, self.address = self.address, 0
        if address:
            self._cuda.free(address)

    def _replace(self, capacity: int) -> None:
        """Move to a buffer of another capacity. Positions never written are zero: the graph masks them, but a mask does not stop a NaN."""
        cuda, size = self._cuda, self._position_bytes
        address = cuda.allocate(aligned(self.bytes_at(capacity)))
        try:
            cuda.zero(address, self.bytes_at(capacity), self._stream)
            if self.length:
                height = self._parts * self._rows
                cuda.copy_2d(address, capacity * size, self.address, self.capacity * size, self.length * size, height, self._stream)
            cuda.synchronize(self._stream)
        except BaseException:
            with contextlib.suppress(FastVLMError):
                cuda.synchronize(self._stream)
            cuda.free(address)
            raise
        old, self.address, self.capacity = self.address, address, capacity
        if old:
            cuda.free(old)


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
    """Owns the memory of every DeviceFeatures.

    Features may become garbage at any moment, also during the capture of a CUDA graph, when freeing memory is forbidden. Their memory
    therefore waits in a queue until `sweep`.
    """

    def __init__(self, cuda: Cuda, spec: DecoderSpec, stream: int, lock: AbstractContextManager[Any]) -> None:
        """The backend holds `lock` while it uses the stream, so that no other work gets into a CUDA graph that it captures."""
        self._cuda, self._spec, self._stream, self._lock = cuda, spec, stream, lock
        self._live: set[int] = set()
        self._dead: deque[int] = deque()

    def row_bytes(self) -> int:
        """Size of one visual token in bytes."""
        return self._spec.hidden * storage(self._spec.dtype).itemsize

    def new(self, rows: int) -> DeviceFeatures:
        """Allocate memory for the features of a picture. Raises OutOfDeviceMemory."""
        features = DeviceFeatures(self, self._cuda.allocate(aligned(rows * self.row_bytes())), rows)
        self._live.add(features.address)
        weakref.finalize(features, self._dead.append, features.address)
        return features

    def holds(self, features: object) -> bool:
        """Whether `features` belong to this store and are still allocated."""
        return isinstance(features, DeviceFeatures) and features.store is self and features.address in self._live

    def sweep(self) -> None:
        """Free the memory of features that are garbage. No work may be in progress."""
        while self._dead:
            address = self._dead.popleft()
            if address in self._live:
                self._live.remove(address)
                self._cuda.free(address)

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

    def free(self) -> None:
        """Release all memory, also that of features that are still referred to."""
        with contextlib.ExitStack() as rest:
            while self._live:
                rest.callback(self._cuda.free, self._live.pop())


def cache_addresses(cache: DeviceCache, layers: int) -> Iterator[tuple[str, int]]:
    """Name and address of every `past_key_values` input of the decoder."""
    for layer in range(layers):
        for value, part in enumerate(("key", "value")):
            yield f"past_key_values.{layer}.{part}", cache.part(layer, value)
