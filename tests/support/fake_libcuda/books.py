"""Inside a process with the stand-in: what its books say, failures on request, and engines that compute on its memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.tensorrt import Platform
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia.cuda import Cuda, CudaError, host_bytes
from tests.support.fake_engine import VERSION, FakeEngine

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
_WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_size_t), ("nbytes", ctypes.c_size_t))


class Books:
    """The books of the libcuda.so.1 in this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.fake_last_mistake.restype = self.library.fake_failed.restype = ctypes.c_char_p
        self.library.fake_fail_at.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_bool)
        self.library.fake_enqueue.argtypes = (
            ctypes.c_void_p,
            ctypes.c_char_p,
            _WORK,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.POINTER(_Range),
        )

    def fail_at(self, call: int, error: int = OUT_OF_MEMORY, *, for_good: bool = False) -> None:
        """Fail at that call from now on, counted from 1; 0 means never. `for_good`: at all later ones too, as after an illegal address."""
        self.library.fake_fail_at(call, error, for_good)

    def failed(self) -> str:
        """Name of the call that failed because `fail_at` asked for it."""
        return str(self.library.fake_failed().decode())

    def calls(self) -> int:
        """Calls since `fail_at`."""
        return int(self.library.fake_calls())

    def alive(self) -> int:
        """Allocations, streams, graphs and contexts that were not given back."""
        return int(self.library.fake_alive())

    def mistakes(self) -> int:
        """How often a caller broke the rules of CUDA."""
        return int(self.library.fake_mistakes())

    def last_mistake(self) -> str:
        """The last one, as a sentence."""
        return str(self.library.fake_last_mistake().decode())

    def context_flags(self) -> int:
        """Those of the primary context."""
        return int(self.library.fake_context_flags())

    def assert_clean(self) -> None:
        """No mistake so far, and nothing is alive."""
        assert not self.mistakes(), self.last_mistake()
        assert not self.alive(), f"{self.alive()} things are alive"


class EngineMemory:
    """Implements `fake_engine.Device` over the real cuda-python: device memory of the stand-in is memory of this process."""

    def __init__(self, cuda: Cuda, books: Books) -> None:
        self._cuda, self._books = cuda, books
        self._kept: list[Any] = []  # functions that the library may still call

    def allocate(self, nbytes: int) -> int:
        return self._cuda.allocate(nbytes)

    def free(self, address: int) -> None:
        with contextlib.suppress(CudaError):  # TensorRT releases weights without a word
            self._cuda.free(address)

    def memory(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        return np.ctypeslib.as_array(host_bytes(address, nbytes))

    def is_capturing(self, stream: int) -> bool:
        return False  # libcuda.c looks after that

    def enqueue(self, stream: int, run: Callable[[], object], *, name: str = "enqueue", uses: Sequence[tuple[int, int]] = ()) -> None:
        """Enqueue `run` as a kernel that uses these ranges. Raises FastVLMError if that fails, as TensorRT's execute_async_v3 does."""

        def work(_argument: Any) -> int:
            try:
                run()
            except BaseException:
                traceback.print_exc(file=sys.stderr)
                return 1
            return 0

        callback = _WORK(work)
        self._kept.append(callback)
        ranges = (_Range * len(uses))(*[_Range(*each) for each in uses])
        error = self._books.library.fake_enqueue(stream, name.encode(), callback, None, len(uses), ranges)
        if error:
            raise FastVLMError(f"{name} failed to run: CUDA error {error}")


def platform(cuda: Cuda, books: Books) -> Platform:
    """`cuda` with a TensorRT whose engines compute with onnxruntime."""
    memory = EngineMemory(cuda, books)
    return Platform(cuda, "tensorrt", VERSION, lambda path: FakeEngine(path, memory))
