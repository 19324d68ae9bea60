"""Copies between places in onnxruntime's device memory, for `ort-cuda`: a graph that has one `Identity` for each of them.

onnxruntime's own functions only copy whole tensors. But a binding takes any address, so a graph can read and write parts of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from fastvlm_edge.backends.ort_session import providers, refuse, run

_ELEMENTS = {2: (4, np.uint16), 4: (12, np.uint32)}
"""Bytes of an element -> a type of that size: its number in onnx.proto (TensorProto.DataType), and numpy's type."""
_OPSET, _IR_VERSION = 21, 10


class DeviceCopier:
    """Copies a fixed number of pieces of equal size in one call."""

    def __init__(self, pieces: int, itemsize: int, *, cuda: bool, device: str) -> None:
        """`itemsize` is that of an element, 2 or 4 bytes. `device` is onnxruntime's name. Raises FastVLMError."""
        number, self._element = _ELEMENTS[itemsize]
        self._device = device
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(identities(pieces, number), options, providers=providers(cuda))
        except Exception as error:  # the classes of onnxruntime's exceptions have no common base
            refuse(error, "onnxruntime cannot copy the KV cache", "use one slot, or --backend ort")

    def copy(self, targets: Sequence[int], sources: Sequence[int], count: int) -> None:
        """Copy `count` elements from each address of `sources` to that in `targets`, and wait. They must not overlap."""
        if not count:
            return
        binding = self._session.io_binding()
        for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
            binding.bind_input(f"x{index}", self._device, 0, self._element, [count], source)
            binding.bind_output(f"y{index}", self._device, 0, self._element, [count], target)
        run(self._session, binding, "a copy of the KV cache")
        binding.synchronize_outputs()


def identities(count: int, element: int) -> bytes:
    """An ONNX model with the nodes y<i> = Identity(x<i>), of vectors of any length of a type in TensorProto.DataType.

    Written as onnx.proto defines it, because the runtime does without the package onnx.
    """
    graph = b"".join(_field(1, _field(1, f"x{index}") + _field(2, f"y{index}") + _field(4, "Identity")) for index in range(count))
    graph += _field(2, "copy")
    tensor = _field(2, _field(1, _field(1, element) + _field(2, _field(1, _field(2, "n")))))
    for field, name in ((11, "x"), (12, "y")):
        graph += b"".join(_field(field, _field(1, f"{name}{index}") + tensor) for index in range(count))
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message: an integer, a string, or a message that was encoded before."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; all but the last have the top bit set."""
    low = bytearray()
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])
