"""CUDA in host memory, for tests of a backend on a machine without a GPU: strict where the real one corrupts memory or races.

Nothing that is enqueued runs before its stream is synchronized, new memory holds poison, and every range is checked against what is
allocated, when it is enqueued and again when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia.cuda import DeviceInfo, OutOfDeviceMemory, PinnedMemory

POISON = 0xA5
FREED = 0xDD
_ALIGNMENT = 256  # cuMemAlloc's

Range = tuple[int, int]
"""Address and number of bytes."""


@dataclass(eq=False)
class _Block:
    kind: str  # "device" or "pinned"
    nbytes: int
    live: bool = True
    storage: NDArray[np.uint8] = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.storage = np.full(self.nbytes + _ALIGNMENT, POISON, np.uint8)
        self.address = -(-self.storage.ctypes.data // _ALIGNMENT) * _ALIGNMENT

    def bytes(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        first = address - int(self.storage.ctypes.data)
        return self.storage[first : first + nbytes]

    def holds(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes


@dataclass(frozen=True, eq=False)
class _Operation:
    name: str
    run: Callable[[], object]
    ranges: tuple[Range, ...]


class FakeCuda:
    """Implements `fastvlm_edge.nvidia.cuda.Cuda`. Mistakes of the caller raise AssertionError.

    `log` has the names of the calls in order: "allocate", "free", "allocate_pinned", "free_pinned", "copy", "copy_2d", "zero", "capture",
    "launch", "synchronize", and the names passed to `enqueue`. Work in a graph is logged at the capture, not at the launch.
    """

    binding = "fake"

    def __init__(self, *, memory_limit: int | None = None, supports_graphs: bool = True, integrated: bool = False) -> None:
        """`memory_limit` in bytes: `allocate` beyond it raises OutOfDeviceMemory."""
        self.supports_graphs = supports_graphs
        self._limit = memory_limit if memory_limit is not None else 1 << 34
        self.device = DeviceInfo("Fake GPU", (8, 7), self._limit, integrated, "12.6")
        self.log: list[str] = []
        self.peak_bytes = 0
        self._blocks: list[_Block] = []  # freed ones stay, so that no address is ever given out again
        self._queues: dict[int, list[_Operation]] = {}
        self._graphs: dict[int, tuple[_Operation, ...]] = {}
        self._recording: tuple[int, list[_Operation]] | None = None
        self._last_handle = 0x1000
        self._closed = False

    def live(self) -> dict[str, int]:
        """How many of each kind have not been given back."""
        return {
            "allocations": sum(block.live and block.kind == "device" for block in self._blocks),
            "pinned": sum(block.live and block.kind == "pinned" for block in self._blocks),
            "streams": len(self._queues),
            "graphs": len(self._graphs),
        }

    def memory(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of device or pinned memory, to read and to write; only operations and a test's own checks may look there."""
        return self._block(address, nbytes, "memory").bytes(address, nbytes)

    def enqueue(self, stream: int, run: Callable[[], object], *, name: str = "enqueue", uses: Sequence[Range] = ()) -> None:
        """Let an engine add its work; `uses` are the ranges that it reads or writes, which are checked as those of a copy are."""
        self._enqueue(stream, name, run, *uses)

    def free_bytes(self) -> int:
        self._open()
        return self._limit - sum(block.nbytes for block in self._blocks if block.live and block.kind == "device")

    def allocate(self, nbytes: int) -> int:
        self._note("allocate", capturable=False)
        if nbytes > self.free_bytes():
            raise OutOfDeviceMemory(nbytes, self.free_bytes())
        block = self._new_block("device", nbytes)
        self.peak_bytes = max(self.peak_bytes, self._limit - self.free_bytes())
        return block.address

    def free(self, address: int) -> None:
        self._note("free", capturable=False)
        self._free("device", address)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        self._note("allocate_pinned", capturable=False)
        return PinnedMemory(self._new_block("pinned", nbytes).address, nbytes, self._free_pinned)

    def create_stream(self) -> int:
        self._open()
        stream = self._handle()
        self._queues[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._open()
        waiting = [operation.name for operation in self._queue(stream)]
        assert not waiting, f"stream {stream:#x} is destroyed, but {waiting} was never synchronized"
        del self._queues[stream]

    def synchronize(self, stream: int) -> None:
        self._note("synchronize", capturable=False)
        operations = list(self._queue(stream))
        self._queue(stream).clear()
        for operation in operations:
            self._check_ranges(operation, operation.name)
            operation.run()

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        def run() -> None:
            self.memory(destination, nbytes)[:] = self.memory(source, nbytes)

        assert destination + nbytes <= source or source + nbytes <= destination, "copy: source and destination overlap"
        self._enqueue(stream, "copy", run, (destination, nbytes), (source, nbytes))

    def copy_2d(
        self, destination: int, destination_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        def rows(address: int, pitch: int) -> NDArray[np.uint8]:
            return as_strided(self.memory(address, (height - 1) * pitch + width), (height, width), (pitch, 1))

        def run() -> None:
            rows(destination, destination_pitch)[:] = rows(source, source_pitch)

        assert height > 0 and width > 0, f"copy_2d: {height} rows of {width} bytes"
        assert width <= destination_pitch and width <= source_pitch, f"copy_2d: width {width}, pitches {destination_pitch}, {source_pitch}"
        target = (destination, (height - 1) * destination_pitch + width)
        origin = (source, (height - 1) * source_pitch + width)
        for address, nbytes in (target, origin):
            assert self._block(address, nbytes, "copy_2d").kind == "device", f"copy_2d: {address:#x} is not device memory"
        self._enqueue(stream, "copy_2d", run, target, origin)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        self._enqueue(stream, "zero", lambda: self.memory(address, nbytes).fill(0), (address, nbytes))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        self._note("capture", capturable=False)
        if not self.supports_graphs:
            raise FastVLMError(f"{self.binding} has no CUDA graphs")
        self._queue(stream)
        self._recording = (stream, [])
        try:
            work()
            recorded = tuple(self._recording[1])
        finally:
            self._recording = None
        assert recorded, "capture: nothing was enqueued on the stream"
        graph = self._handle()
        self._graphs[graph] = recorded
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._note("launch")
        assert graph in self._graphs, f"{graph:#x} is no graph"
        assert not self.is_capturing(stream), "launch: a graph inside a graph"
        for operation in self._graphs[graph]:
            self._check_ranges(operation, "launch")
        self._queue(stream).extend(self._graphs[graph])

    def destroy_graph(self, graph: int) -> None:
        self._open()
        assert graph in self._graphs, f"{graph:#x} is no graph"
        del self._graphs[graph]

    def close(self) -> None:
        """A second call does nothing, any other call from now on is a mistake."""
        self._closed = True

    def _enqueue(self, stream: int, name: str, run: Callable[[], object], *ranges: Range) -> None:
        self._note(name)
        operation = _Operation(name, run, ranges)
        self._check_ranges(operation, name)
        queue = self._queue(stream)
        if self._recording is not None and self._recording[0] == stream:
            queue = self._recording[1]
        queue.append(operation)

    def _new_block(self, kind: str, nbytes: int) -> _Block:
        assert nbytes > 0, f"{nbytes} bytes of {kind} memory: CUDA refuses that"
        block = _Block(kind, nbytes)
        self._blocks.append(block)
        return block

    def _free_pinned(self, address: int) -> None:
        self._note("free_pinned", capturable=False)
        self._free("pinned", address)

    def _free(self, kind: str, address: int) -> None:
        block = next((block for block in self._blocks if block.live and block.kind == kind and block.address == address), None)
        assert block is not None, f"free: {address:#x} is no live {kind} memory"
        block.live = False
        block.storage.fill(FREED)
        for stream, queue in self._queues.items():
            waiting = self._users(queue, block)
            assert not waiting, f"free: {waiting} on stream {stream:#x} uses {address:#x} and was never synchronized"
        for graph, operations in self._graphs.items():
            recorded = self._users(operations, block)
            assert not recorded, f"free: {recorded} in graph {graph:#x} uses {address:#x}; destroy the graph first"

    def _users(self, operations: Sequence[_Operation], block: _Block) -> list[str]:
        return [operation.name for operation in operations if any(block.holds(*used) for used in operation.ranges)]

    def _check_ranges(self, operation: _Operation, call: str) -> None:
        for address, nbytes in operation.ranges:
            self._block(address, nbytes, call if call == operation.name else f"{call} of a graph with {operation.name}")

    def _block(self, address: int, nbytes: int, call: str) -> _Block:
        start = next((block for block in self._blocks if block.holds(address, 0) and address < block.address + block.nbytes), None)
        assert start is not None, f"{call}: {address:#x} is in no allocation"
        assert start.live, f"{call}: {address:#x} has been freed"
        offset = address - start.address
        assert start.holds(address, nbytes), (
            f"{call}: {nbytes} bytes from {offset} leave the {start.nbytes} of {start.kind} {start.address:#x}"
        )
        return start

    def _queue(self, stream: int) -> list[_Operation]:
        assert stream in self._queues, f"{stream:#x} is no stream"
        return self._queues[stream]

    def is_capturing(self, stream: int) -> bool:
        """Whether work on the stream is being recorded."""
        return self._recording is not None and self._recording[0] == stream

    def _handle(self) -> int:
        self._last_handle += 0x10
        return self._last_handle

    def _note(self, name: str, *, capturable: bool = True) -> None:
        self._open()
        assert capturable or self._recording is None, f"{name}: not while a stream captures"
        self.log.append(name)

    def _open(self) -> None:
        assert not self._closed, "a call after close()"
