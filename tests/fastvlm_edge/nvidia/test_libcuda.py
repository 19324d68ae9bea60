"""The real cuda-python over the stand-in for libcuda.so.1 (tests/support/fake_libcuda): every call of `CudaPython` as the driver sees it.

Each function that a test passes to `libcuda.run` runs in a process of its own, whose cuda-python finds the stand-in.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia.cuda import Cuda, CudaError, OutOfDeviceMemory, host_bytes
from fastvlm_edge.nvidia.drivers import open_cuda
from tests.support.fake_libcuda import Libcuda
from tests.support.fake_libcuda.books import Books

MIB = 1 << 20


def expect_error(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(CudaError) as caught:
        call()
    assert caught.value.name == name, caught.value


def everything_once() -> None:
    books, cuda = Books(), open_cuda()
    assert cuda.binding.startswith("cuda-python ") and cuda.supports_graphs
    assert (cuda.device.name, cuda.device.compute_capability, cuda.device.multiprocessors) == ("Fake GPU", (8, 7), 8)
    assert (cuda.device.total_bytes, cuda.device.integrated, cuda.device.driver) == (1 << 30, True, "13.0")
    stream = cuda.create_stream()
    host, rows, wide = cuda.allocate_pinned(24 * 7), cuda.allocate(24 * 7), cuda.allocate(24 * 33)
    assert wide % 256 == 0 and cuda.free_bytes() == (1 << 30) - 24 * 7 - 24 * 33
    numbers = host.view((24, 7), np.uint8)
    numbers[:] = np.arange(24 * 7).reshape(24, 7)
    expected = numbers.copy()

    def there() -> None:
        cuda.copy(rows, host.address, 24 * 7, stream)
        cuda.zero(wide, 24 * 33, stream)
        cuda.copy_2d(wide + 3, 33, rows, 7, 7, 24, stream)  # 24 rows of 7 bytes to rows of 33

    there()
    cuda.synchronize(stream)
    numbers[:] = 0
    cuda.copy_2d(rows, 7, wide + 3, 33, 7, 24, stream)
    cuda.copy(host.address, rows, 24 * 7, stream)
    assert (numbers == 0).all(), "work waits for the stream"
    cuda.synchronize(stream)
    assert np.array_equal(numbers, expected)

    graph = cuda.capture(stream, there)
    numbers[:] = expected[::-1]
    cuda.synchronize(stream)
    cuda.launch(graph, stream)
    cuda.copy_2d(rows, 7, wide + 3, 33, 7, 24, stream)
    cuda.synchronize(stream)
    numbers[:] = 0
    cuda.copy(host.address, rows, 24 * 7, stream)
    cuda.synchronize(stream)
    assert np.array_equal(numbers, expected[::-1]), "the graph reads the memory of its capture when it is launched"

    cuda.destroy_graph(graph)
    host.free()
    cuda.free(rows)
    cuda.free(wide)
    cuda.destroy_stream(stream)
    cuda.close()
    cuda.close()
    books.assert_clean()


def test_every_method_of_cuda_python_does_what_it_says_and_gives_everything_back(libcuda: Libcuda) -> None:
    libcuda.run(everything_once)


def forbidden_in_a_capture() -> None:
    books, cuda = Books(), open_cuda()
    stream, address, pinned = cuda.create_stream(), cuda.allocate(64), cuda.allocate_pinned(64)
    forbidden: dict[str, Callable[[], object]] = {
        "cuMemAlloc": lambda: cuda.allocate(64),
        "cuMemFree": lambda: cuda.free(address),
        "cuMemHostAlloc": lambda: cuda.allocate_pinned(64),
        "cuMemFreeHost": pinned.free,
        "cuStreamSynchronize": lambda: cuda.synchronize(stream),
    }
    for name, call in forbidden.items():

        def swallow(call: Callable[[], object] = call) -> None:
            expect_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", call)

        expect_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", lambda call=call: cuda.capture(stream, call))  # type: ignore[misc]
        assert books.last_mistake() == f"{name} while s1 captures"
        expect_error("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", lambda swallow=swallow: cuda.capture(stream, swallow))  # type: ignore[misc]
        cuda.zero(address, 64, stream)
        cuda.synchronize(stream)  # the stream works again
    assert books.mistakes() == 2 * len(forbidden)
    pinned.free()
    cuda.free(address)
    cuda.destroy_stream(stream)
    cuda.close()
    assert not books.alive()


def test_what_a_capture_forbids_fails_and_the_stream_works_afterwards(libcuda: Libcuda) -> None:
    libcuda.run(forbidden_in_a_capture)


def interrupted_capture() -> None:
    books, cuda = Books(), open_cuda()
    stream, address = cuda.create_stream(), cuda.allocate(64)

    def interrupted() -> None:
        cuda.zero(address, 64, stream)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.capture(stream, interrupted)
    cuda.zero(address, 64, stream)
    cuda.synchronize(stream)
    cuda.free(address)
    cuda.destroy_stream(stream)
    cuda.close()
    books.assert_clean()


def test_ctrl_c_in_a_capture_leaves_a_usable_stream_and_no_graph(libcuda: Libcuda) -> None:
    libcuda.run(interrupted_capture)


def out_of_memory() -> None:
    books, cuda = Books(), open_cuda()
    kept = cuda.allocate(6 * MIB)
    with pytest.raises(OutOfDeviceMemory, match=r"^5 MiB of GPU memory are needed and 2 MiB are free; ") as caught:
        cuda.allocate(4 * MIB + 1)
    assert (caught.value.needed, caught.value.free) == (4 * MIB + 1, 2 * MIB)
    cuda.free(cuda.allocate(2 * MIB))
    cuda.free(kept)
    cuda.close()
    books.assert_clean()


def test_out_of_memory_has_the_drivers_figures(libcuda: Libcuda) -> None:
    libcuda.run(out_of_memory, memory=8 * MIB)


def several_threads() -> None:
    books, cuda = Books(), open_cuda()
    shared = cuda.create_stream()
    failed: list[BaseException] = []
    capturing, allocated = threading.Event(), threading.Event()

    def work(value: int) -> None:
        try:
            stream, address, host = cuda.create_stream(), cuda.allocate(4096), cuda.allocate_pinned(4096)
            array = host.view(4096, np.uint8)
            for count in range(50):
                array[:] = value + count
                cuda.copy(address, host.address, 4096, stream)
                cuda.synchronize(stream)
                array[:] = 0
                cuda.copy(host.address, address, 4096, stream)
                cuda.synchronize(stream)
                assert (array == value + count).all()
            assert capturing.wait(60)
            cuda.free(cuda.allocate(4096))  # the main thread captures, thread-locally
            host.free()
            cuda.free(address)
            cuda.destroy_stream(stream)
        except BaseException as error:
            failed.append(error)
        allocated.set()

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 101)]
    address = cuda.allocate(64)
    for thread in threads:
        thread.start()

    def slowly() -> None:
        cuda.zero(address, 64, shared)
        capturing.set()
        assert allocated.wait(60)

    graph = cuda.capture(shared, slowly)
    for thread in threads:
        thread.join()
    assert not failed, failed
    cuda.destroy_graph(graph)
    cuda.free(address)
    cuda.destroy_stream(shared)
    cuda.close()
    books.assert_clean()


def test_threads_get_the_context_and_may_allocate_while_another_one_captures(libcuda: Libcuda, tmp_path: Path) -> None:
    libcuda.run(several_threads, trace=tmp_path / "trace")
    trace = (tmp_path / "trace").read_text()
    for thread in ("", "[thread 2] ", "[thread 3] "):
        assert len(re.findall(rf"^{re.escape(thread)}cuCtxSetCurrent\(primary\)$", trace, re.MULTILINE)) == 1


def opened_twice() -> None:
    books = Books()
    first, second = open_cuda(), open_cuda()
    address = first.allocate(64)
    second.close()
    first.free(address)  # the context lives as long as one of them
    first.close()
    books.assert_clean()
    third = open_cuda()
    third.free(third.allocate(64))
    expect_error("CUDA_ERROR_CONTEXT_IS_DESTROYED", lambda: opened_and_closed(third).free_bytes())
    assert books.last_mistake() == "cuMemGetInfo after the context was released"


def opened_and_closed(cuda: Cuda) -> Cuda:
    cuda.close()
    return cuda


def test_the_primary_context_is_retained_and_released_once_by_each(libcuda: Libcuda) -> None:
    libcuda.run(opened_twice)


def no_gpu() -> None:
    with pytest.raises(FastVLMError, match="the NVIDIA driver sees no GPU"):
        open_cuda()
    assert not Books().alive()


def old_driver() -> None:
    with pytest.raises(FastVLMError, match=r"the NVIDIA driver supports CUDA 11\.4, but cuda-python .* needs CUDA 1"):
        open_cuda()
    assert not Books().alive()


def test_a_driver_without_a_gpu_and_one_that_is_too_old_are_named(libcuda: Libcuda) -> None:
    libcuda.run(no_gpu, devices=0)
    libcuda.run(old_driver, version=11040)


def failing_in_opening() -> None:
    """Every call of opening fails once; the next attempt succeeds."""
    books = Books()
    books.fail_at(0)
    open_cuda().close()
    for call in range(1, books.calls()):  # the last one is the release
        books.fail_at(call)
        with pytest.raises(CudaError, match="failed: CUDA_ERROR_OUT_OF_MEMORY"):
            open_cuda()
        books.fail_at(0)
        open_cuda().close()
    books.assert_clean()


def test_an_error_at_any_call_of_opening_is_a_cuda_error_and_leaves_nothing(libcuda: Libcuda) -> None:
    libcuda.run(failing_in_opening)


def first_call_fails() -> None:
    with pytest.raises(CudaError, match=r"^cuInit failed: CUDA_ERROR_ILLEGAL_ADDRESS .*; start the program again"):
        open_cuda()


def test_a_failure_can_be_asked_for_in_the_environment(libcuda: Libcuda) -> None:
    libcuda.run(first_call_fails, fail="1:700")


# How a thread waits -----------------------------------------------------------------------------------------------------------------------


def has_flags(expected: str) -> None:
    open_cuda().close()
    assert Books().context_flags() == int(expected)


@pytest.mark.parametrize(("asked", "flags"), [("spin", 1), ("yield", 2), ("block", 4), ("auto", 0), ("", 0)])
def test_the_context_waits_as_the_environment_asks(libcuda: Libcuda, asked: str, flags: int, tmp_path: Path) -> None:
    libcuda.run(has_flags, flags, FASTVLM_EDGE_CUDA_SYNC=asked, trace=tmp_path / "trace")
    calls = [line.partition("(")[0] for line in (tmp_path / "trace").read_text().splitlines()]
    assert ("cuDevicePrimaryCtxSetFlags" in calls) == bool(flags)
    if flags:
        assert calls.index("cuDevicePrimaryCtxSetFlags") + 1 == calls.index("cuDevicePrimaryCtxRetain")


# What the stand-in itself notices ---------------------------------------------------------------------------------------------------------


def mistakes() -> None:
    """Each mistake of a caller is an error of CUDA, or at least in the books."""
    from cuda.bindings import driver

    def thread_without_context() -> None:
        errors: list[int] = []
        thread = threading.Thread(target=lambda: errors.append(int(driver.cuMemAlloc(64)[0])))
        thread.start()
        thread.join()
        assert errors == [201]  # CUDA_ERROR_INVALID_CONTEXT

    def freed_under_a_graph() -> None:
        memory = cuda.allocate(64)
        cuda.capture(stream, lambda: cuda.zero(memory, 64, stream))
        cuda.free(memory)

    def launched_after_free() -> None:
        memory = cuda.allocate(64)
        graph = cuda.capture(stream, lambda: cuda.zero(memory, 64, stream))
        cuda.free(memory)
        cuda.launch(graph, stream)

    def freed_before_the_stream_is_done() -> None:
        memory = cuda.allocate(64)
        cuda.zero(memory, 64, stream)
        cuda.free(memory)

    def written_beside() -> None:
        memory = cuda.allocate(60)
        np.ctypeslib.as_array(host_bytes(memory, 64))[60] = 1
        cuda.free(memory)

    def freed_twice() -> None:
        memory = cuda.allocate(64)
        cuda.free(memory)
        cuda.free(memory)

    def destroyed_before_it_is_done() -> None:
        other = cuda.create_stream()
        cuda.zero(address, 64, other)
        cuda.destroy_stream(other)

    books, cuda = Books(), open_cuda()
    stream, address, pinned = cuda.create_stream(), cuda.allocate(64), cuda.allocate_pinned(64)
    says: list[tuple[Callable[[], object], str]] = [
        (lambda: cuda.copy(address, pinned.address + 60, 8, stream), r"cuMemcpyAsync of 8 bytes at h1\+60, which has 64 in all"),
        (lambda: cuda.copy(address, address + 8, 16, stream), r"cuMemcpyAsync from d1\+8 to d1, which overlap"),
        (lambda: cuda.copy_2d(address, 16, address, 16, 8, 5, stream), r"cuMemcpy2DAsync of 72 bytes at d1, which has 64"),
        (lambda: cuda.copy_2d(address, 4, address, 16, 8, 2, stream), r"cuMemcpy2DAsync of 2 rows of 8 bytes, pitches 4 and 16"),
        (lambda: cuda.zero(address + 4096, 8, stream), "cuMemsetD8Async at an unknown address"),
        (lambda: cuda.zero(address, 8, stream + 8), "cuMemsetD8Async on the unknown stream"),
        (lambda: cuda.allocate(0), "cuMemAlloc of no bytes"),
        (lambda: cuda.free(pinned.address), "cuMemFree of an address that was never allocated"),
        (lambda: cuda.launch(stream, stream), "cuGraphLaunch of a graph that is not there"),
        (freed_twice, r"cuMemFree of d\d+, which was freed before"),
        (freed_before_the_stream_is_done, r"cuMemFree of d\d+, which cuMemsetD8Async on s1 uses"),
        (freed_under_a_graph, r"cuMemFree of d\d+, which cuMemsetD8Async in x\d+ uses"),
        (launched_after_free, r"cuMemsetD8Async at d\d+, which was freed"),
        (written_beside, r"something wrote beside d\d+"),
        (destroyed_before_it_is_done, "s2 is destroyed, but was not synchronized"),
        (thread_without_context, "cuMemAlloc in a thread without a context"),
        (lambda: driver.cuDevicePrimaryCtxSetFlags(0, 3), "flags 3: one of SPIN, YIELD and BLOCKING_SYNC at most"),
        (cuda.close, r"x\d+ was not destroyed"),
    ]
    for act, sentence in says:
        before = books.mistakes()
        with contextlib.suppress(CudaError):
            act()
        assert books.mistakes() > before and re.fullmatch(rf"{sentence}.*", books.last_mistake()), (sentence, books.last_mistake())


def test_the_stand_in_notes_every_mistake(libcuda: Libcuda) -> None:
    libcuda.run(mistakes)
