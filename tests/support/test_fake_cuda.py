"""FakeCuda raises where the real CUDA corrupts memory or races: the tests of the TensorRT backend rely on this."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.support.fake_cuda import FREED, POISON, FakeCuda

SIZE = 64


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


def test_new_memory_is_poison_and_work_is_deferred_until_synchronize(fake: FakeCuda) -> None:
    stream, other, address, pinned = fake.create_stream(), fake.create_stream(), fake.allocate(SIZE), fake.allocate_pinned(SIZE)
    host = pinned.view(SIZE, np.uint8)
    assert (fake.memory(address, SIZE) == POISON).all() and (host == POISON).all()
    fake.zero(address, 32, stream)
    fake.copy(pinned.address, address, SIZE, stream)
    fake.synchronize(other)
    assert (fake.memory(address, SIZE) == POISON).all() and (host == POISON).all()
    fake.synchronize(stream)
    assert host.tolist() == [0] * 32 + [POISON] * 32


MISTAKES: dict[str, tuple[Callable[[FakeCuda, int, int, int], object], str]] = {
    "reading past the end": (lambda fake, stream, a, b: fake.copy(a, b + 60, 8, stream), "8 bytes from 60 leave the 64 of device"),
    "writing past the end": (lambda fake, stream, a, b: fake.copy(a + 60, b, 8, stream), "8 bytes from 60 leave the 64 of device"),
    "rows past the end": (lambda fake, stream, a, b: fake.copy_2d(a, 16, b, 8, 8, 5, stream), "72 bytes from 0 leave"),
    "outside of every allocation": (lambda fake, stream, a, b: fake.zero(0x10, 8, stream), "zero: 0x10 is in no allocation"),
    "used after free": (lambda fake, stream, a, b: [fake.free(a), fake.zero(a, 8, stream)], "has been freed"),
    "freed twice": (lambda fake, stream, a, b: [fake.free(a), fake.free(a)], "no live device memory"),
    "freed before synchronize": (lambda fake, stream, a, b: [fake.zero(a, 8, stream), fake.free(a)], "never synchronized"),
    "synchronizing in a capture": (lambda fake, stream, a, b: fake.capture(stream, lambda: fake.synchronize(stream)), "while a stream"),
    "used after close": (lambda fake, stream, a, b: [fake.close(), fake.zero(a, 8, stream)], "after close"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises(fake: FakeCuda, mistake: str) -> None:
    act, says = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=says):
        act(fake, fake.create_stream(), fake.allocate(SIZE), fake.allocate(SIZE))


def test_memory_freed_under_a_graph(fake: FakeCuda) -> None:
    stream, address = fake.create_stream(), fake.allocate(8)
    graph = fake.capture(stream, lambda: fake.zero(address, 8, stream))
    with pytest.raises(AssertionError, match="destroy the graph first"):
        fake.free(address)
    with pytest.raises(AssertionError, match=r"launch of a graph with zero: .* has been freed"):
        fake.launch(graph, stream)


def test_a_graph_runs_at_each_launch_and_not_at_the_capture(fake: FakeCuda) -> None:
    stream, address = fake.create_stream(), fake.allocate(8)
    fake.memory(address, 8)[:] = 0

    def add_one() -> None:
        fake.memory(address, 8)[:] += 1

    graph = fake.capture(stream, lambda: fake.enqueue(stream, add_one, name="engine", uses=[(address, 8)]))
    fake.synchronize(stream)
    assert (fake.memory(address, 8) == 0).all()
    fake.launch(graph, stream)
    fake.launch(graph, stream)
    assert (fake.memory(address, 8) == 0).all()
    fake.synchronize(stream)
    assert (fake.memory(address, 8) == 2).all()


def test_a_view_of_freed_pinned_memory_reads_garbage(fake: FakeCuda) -> None:
    pinned = fake.allocate_pinned(8)
    host = pinned.view(8, np.uint8)
    pinned.free()
    assert (host == FREED).all()
