"""The TensorRT backend over the real cuda-python and the stand-in for libcuda.so.1: its calls, and what it does when one of them fails.

Engines compute with onnxruntime on the memory of the stand-in. Functions that a test passes to `libcuda.run` run in a process of their own.
"""

from __future__ import annotations

import difflib
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.tensorrt import TensorRTBackend
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.nvidia.cuda import CudaError, OutOfDeviceMemory
from tests.support.fake_libcuda import Libcuda
from tests.support.fake_libcuda.books import ILLEGAL_ADDRESS, Books
from tests.support.fake_libcuda.golden import GOLDEN, trace_of_session
from tests.support.fake_libcuda.session import PIXELS, TEXT, Notes, assert_equal, build, expected_logits, load, talk

QUIET = ("cuGraphDestroy", "cuMemFree")
"""Errors of these may go unsaid: of a graph's template, and of weights, which TensorRT releases itself."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("session"))


def test_a_session_calls_the_driver_as_in_the_golden_trace(libcuda: Libcuda, model: Path, tmp_path: Path) -> None:
    found, golden = trace_of_session(libcuda, model, tmp_path), GOLDEN.read_text()
    difference = "\n".join(difflib.unified_diff(golden.splitlines(), found.splitlines(), "golden", "found", lineterm="", n=2))
    assert not difference, f"if this is meant: .venv/bin/python -m tests.support.fake_libcuda.golden\n{difference}"


def out_of_memory_at_every_call(model: str) -> None:
    expected = expected_logits(Path(model))
    books = Books()
    books.fail_at(0)
    backend = load(Path(model), books)
    loading = books.calls()
    talk(backend)
    talking = books.calls()
    backend.close()
    books.assert_clean()
    gone_on, whole = 0, books.calls()
    for call in range(1, whole + 1):
        books.fail_at(call)
        notes = Notes()
        try:
            backend = load(Path(model), books, notes)
        except FastVLMError as error:
            check_words(error, expected=call <= loading)
        else:
            try:
                found = talk(backend)
            except FastVLMError as error:
                check_words(error, expected=loading < call <= talking)
            else:
                assert call > talking or notes.texts or books.failed() in QUIET, f"nobody was told that {books.failed()} failed"
                assert_equal(found, expected)
            if call <= talking:
                backend.reset()
                try:
                    assert_equal(talk(backend, 2), expected[:3])
                except Exception as error:
                    raise AssertionError(f"the backend does not work after {books.failed()}, call {call}, failed") from error
                gone_on += 1
            try:
                backend.close()
            except FastVLMError as error:
                check_words(error, expected=call > talking)
        gc.collect()
        assert not books.mistakes(), f"after {books.failed()}, call {call}, failed: {books.last_mistake()}"
        assert not books.alive(), f"after {books.failed()}, call {call}, failed: {books.alive()} things are alive"
    print(f"{whole} calls, {loading} of them to load; the backend worked on {gone_on} times")


def check_words(error: FastVLMError, *, expected: bool) -> None:
    """The user learns which call failed, or that memory is short and what to do. `expected` says whether an error belongs here."""
    assert expected, error
    named = isinstance(error, CudaError) and error.name == "CUDA_ERROR_OUT_OF_MEMORY"
    assert named or isinstance(error, OutOfDeviceMemory) or "does not fit on" in error.what or "failed to run" in error.what, error
    assert error.mend or "failed to run" in error.what, f"{error}: and what to do?"


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_out_of_memory_at_any_call_is_a_sentence_and_leaks_nothing_and_the_backend_goes_on(
    libcuda: Libcuda, tmp_path: Path, static: bool
) -> None:
    print(libcuda.run(out_of_memory_at_every_call, build(tmp_path, static=static)))


class ThreeSlots:
    """A conversation in each slot, and what the slots hold, also after a call that failed."""

    def __init__(self, backend: TensorRTBackend) -> None:
        self.backend = backend
        self.held: list[list[int]] = [[], [], []]

    def step(self, slot: int, ids: list[int]) -> None:
        self.backend.step(ids, slot=slot)
        self.held[slot] += ids

    def decode(self, count: int) -> None:
        self.backend.decode(TEXT[:count])
        for slot in range(count):
            self.held[slot].append(TEXT[slot])

    def replace(self, slot: int, ids: list[int], work: Callable[[], None]) -> None:
        try:
            work()
        except FastVLMError:
            if not self.backend.lengths[slot]:  # a copy that fails may leave an empty slot
                self.held[slot] = []
            raise
        self.held[slot] = ids

    def talk(self) -> None:
        """The cache grows in rows and in positions; a slot is copied and restored, and the saved one is dropped."""
        backend = self.backend
        self.step(0, TEXT[:100])
        self.step(2, TEXT[:30])
        for count in (3, 3, 2, 3):
            self.decode(count)
        saved = backend.save(0)
        beginning = self.held[0].copy()
        self.replace(1, beginning[:50], lambda: backend.copy(0, 1, 50))
        self.step(2, TEXT[:110])
        if saved is not None:
            kept = saved
            self.replace(1, beginning[:60], lambda: backend.restore(kept, 1, 60))
            del kept
        del saved
        self.decode(3)
        self.held[2] = []  # also if releasing memory fails
        backend.reset(2)
        self.decode(2)


def slots_at_every_call(model: str) -> None:
    books, reference = Books(), OrtBackend(Path(model), read_manifest(Path(model)), threads=1)
    call, failed = 0, "none yet"
    while failed:
        call += 1
        books.fail_at(0)
        backend = load(Path(model), books, slots=3)
        slots = ThreeSlots(backend)
        books.fail_at(call)
        try:
            slots.talk()
        except FastVLMError as error:
            check_words(error, expected=True)
        failed = books.failed()
        books.fail_at(0)
        where = f"after {failed}, call {call}, failed"
        assert list(backend.lengths) == [len(ids) for ids in slots.held], where
        found = backend.decode(TEXT[-3:], want_logits=True).logits
        assert found is not None
        for slot, token in enumerate(TEXT[-3:]):
            reference.reset()
            expected = reference.step([*slots.held[slot], token], want_logits=True).logits
            assert expected is not None
            np.testing.assert_allclose(found[slot], expected[0], atol=1e-2, err_msg=where)
        del slots
        gc.collect()
        backend.close()
        assert not books.mistakes() and not books.alive(), f"{where}: {books.last_mistake()}, {books.alive()} things are alive"
    assert call > 100
    print(f"{call - 1} calls failed in turn")


def test_out_of_memory_at_any_call_leaves_every_slot_as_it_was(libcuda: Libcuda, tmp_path: Path) -> None:
    print(libcuda.run(slots_at_every_call, build(tmp_path, max_batch=2)))


def lost_at_every_call(model: str) -> None:
    """After an illegal address every call fails, those that release too: still there is no other error than FastVLMError."""
    books = Books()
    books.fail_at(0)
    backend = load(Path(model), books)
    talk(backend)
    backend.close()
    for call in range(1, books.calls() + 1):
        books.fail_at(call, ILLEGAL_ADDRESS, for_good=True)
        try:
            backend = load(Path(model), books)
            try:
                talk(backend)
            finally:
                backend.close()
        except FastVLMError:
            pass
    gc.collect()


def test_a_lost_context_is_a_sentence_wherever_it_happens(libcuda: Libcuda, model: Path) -> None:
    libcuda.run(lost_at_every_call, model)


def two_threads(model: str) -> None:
    books = Books()
    backend = load(Path(model), books)
    expected = talk(backend)
    picture = backend.encode(PIXELS).numpy()
    failed: list[BaseException] = []

    def pictures() -> None:
        try:
            for _ in range(20):
                assert np.array_equal(backend.encode(PIXELS).numpy(), picture)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=pictures)
    thread.start()
    for _ in range(5):
        backend.reset()
        assert_equal(talk(backend), expected)
    thread.join()
    assert not failed, failed
    thread = threading.Thread(target=backend.close)  # closed by another thread than that which loaded it
    thread.start()
    thread.join()
    books.assert_clean()


def test_one_thread_encodes_while_another_one_answers(libcuda: Libcuda, model: Path) -> None:
    libcuda.run(two_threads, model)


def forgotten(model: str) -> None:
    books = Books()
    backend = load(Path(model), books)
    backend.step(TEXT[:5])
    del backend
    gc.collect()
    books.assert_clean()


def test_a_backend_that_nobody_closed_is_released_when_it_is_garbage(libcuda: Libcuda, model: Path) -> None:
    libcuda.run(forgotten, model)
