"""A stand-in for `triton_python_backend_utils`, which only Triton's Python backend has: its decoupled mode, as its documentation has it.

https://github.com/triton-inference-server/python_backend#decoupled-mode, read in November 2026. What Triton forbids is an AssertionError.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError:
    """A message and a code."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert type(message) is str and code in range(8)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert type(name) is str and type(array) is np.ndarray
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        assert error is not None or output_tensors
        self.tensors, self.error = output_tensors or [], error


class InferenceResponseSender:
    """Remembers what was sent. Nothing may follow the final flag, and every response is an object of its own."""

    def __init__(self) -> None:
        self.sent: list[InferenceResponse] = []
        self.final = threading.Event()
        self.cancelled_after: int | None = None
        """How many responses the client takes before it cancels."""

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response after the final flag"
        assert flags in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        assert response is not None or flags, "neither a response nor the final flag"
        if response is not None:
            assert response not in self.sent
            self.sent.append(response)
        if flags:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled_after is not None and len(self.sent) >= self.cancelled_after


class InferenceRequest:
    """Its tensors are overwritten when `execute` has returned, as the shared memory behind them may be."""

    def __init__(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.inputs = {name: array.copy() for name, array in inputs.items()}
        self.sender = InferenceResponseSender()

    def get_response_sender(self) -> InferenceResponseSender:
        return self.sender

    def release(self) -> None:
        for array in self.inputs.values():
            array[...] = b"gone" if array.dtype == np.object_ else -1


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    array = request.inputs.get(name)
    return None if array is None else Tensor(name, array)
