"""The decoder of `ort-cuda`: onnxruntime with the cache, the image features and all bindings in device memory. Not yet run on hardware.

A step copies the new ids and their positions to the device, and the candidates back to the host. Nothing else crosses: the graph
`decoder.cuda.onnx` appends keys and values to the cache in place. With DEVICE = "cpu" the same code runs on host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import storage, to_float32
from fastvlm_edge.backends.ort import check_decoder, join_features
from fastvlm_edge.backends.ort_session import ONNX_BFLOAT16, Setup, lacks_memory, ort_value, refuse, run
from fastvlm_edge.backends.protocol import ImageFeatures, OneSlot, StepOutput, check_context, same_pictures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import DecoderSpec
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory

DEVICE = "cuda"
"""Where onnxruntime allocates: its name for the memory of the GPU."""
_KEPT_SEQ = 16
"""Bindings for calls of up to this many ids (decoding, drafts) are kept. Those of a prefill chunk are used once."""


class DeviceArray:
    """Memory of one tensor on the device. It is cleared, and its address does not change.

    bfloat16 is allocated as uint16, because onnxruntime reads it back only as that. It is bound as bfloat16.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        """`dtype` is the name that the manifest uses, `device` onnxruntime's name.

        Raises OutOfDeviceMemory, and FastVLMError if onnxruntime has no such device or it fails.
        """
        self.shape, self._device = list(shape), device
        self._element = ONNX_BFLOAT16 if dtype == "bfloat16" else storage(dtype).type
        zeros = np.zeros(self.shape, storage(dtype))
        try:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, zeros.dtype.type, device, 0)
        except Exception as error:  # the classes of onnxruntime's exceptions have no common base
            if lacks_memory(error):
                raise OutOfDeviceMemory(zeros.nbytes) from error
            refuse(error, f"onnxruntime cannot allocate memory on {device}", "run: fastvlm-edge doctor, or use --backend ort")
        self._value.update_inplace(zeros)

    def write(self, array: NDArray[Any]) -> None:
        """Copy a contiguous host array of the same shape and stored type to the device."""
        self._value.update_inplace(array)

    def read(self) -> NDArray[Any]:
        """A copy on the host, in the stored type."""
        copy: NDArray[Any] = self._value.numpy()
        return copy

    def bind(self, binding: Any, *, input: str | None = None, output: str | None = None) -> None:
        """Make this memory an input, an output or both of a call."""
        place = (self._device, 0, self._element, self.shape, self._value.data_ptr())
        if input is not None:
            binding.bind_input(input, *place)
        if output is not None:
            binding.bind_output(output, *place)


class DeviceCache:
    """Keys and values of every layer, [1, kv_heads, context, head_dim] each, allocated once for the whole context.

    The attention reads valid positions only, so a long cache costs memory but no time, and addresses never change.
    """

    def __init__(self, spec: DecoderSpec, device: str) -> None:
        """Raises OutOfDeviceMemory."""
        self.context = spec.context
        self.lengths = [0]
        self._dtype = spec.dtype
        shape = (1, spec.kv_heads, spec.context, spec.head_dim)
        self.layers = [(DeviceArray(shape, spec.dtype, device), DeviceArray(shape, spec.dtype, device)) for _ in range(spec.layers)]

    def extend(self, length: int) -> None:
        """Set the length after the graph has appended."""
        self.lengths[0] = length

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.lengths[0]:
            raise ValueError(f"length {length} is outside the {self.lengths[0]} positions of the cache")
        self.extend(length)

    def read(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1`: [layers, 2, kv_heads, positions, head_dim]."""
        stored = [[array.read()[0, :, first:length] for array in pair] for pair in self.layers]
        return to_float32(np.stack([np.stack(pair) for pair in stored]), self._dtype)


@dataclass(eq=False)
class _Call:
    """A binding of the decoder for one pair (seq, m), with the memory that it reads and writes."""

    binding: Any
    input_ids: DeviceArray  # [1, seq]
    position_ids: DeviceArray  # [1, seq]
    logit_positions: DeviceArray  # [1, m]
    asked: tuple[int, ...] | None
    """What logit_positions holds."""
    outputs: dict[str, NDArray[Any]]
    """On the host: top_values, top_ids, log_normalizer and, if wanted, logits."""


class DeviceDecoder(OneSlot):
    """`decoder.cuda.onnx` and the KV cache that it extends."""

    def __init__(self, setup: Setup) -> None:
        """Load the graph. Raises FastVLMError if onnxruntime refuses it or it does not match the manifest, and OutOfDeviceMemory."""
        path, self._session = setup.load("decoder")
        spec = self._spec = setup.manifest.decoder
        appends, self._output_types = check_decoder(path, self._session, spec)
        if not appends:
            raise FastVLMError(f"{path} does not append to the cache", "convert the checkpoint again with this version")
        self._device = DEVICE
        self.cache = DeviceCache(spec, self._device)
        self._image_features: tuple[ImageFeatures, ...] | None = None
        self._features: DeviceArray | None = None
        self._calls: dict[tuple[int, int, bool], _Call] = {}

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        slot: int = 0,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to the cache; see `Backend.step`."""
        seq, start = len(input_ids), self.cache.lengths[0]
        check_context(start + seq, self.cache.context)
        asked = (seq - 1,) if logit_positions is None else tuple(logit_positions)
        self._set_image_features(image_features)
        call = self._call(seq, len(asked), want_logits)
        call.input_ids.write(np.array([input_ids], np.int64))
        call.position_ids.write(np.arange(start, start + seq, dtype=np.int64)[None])
        if call.asked != asked:
            call.logit_positions.write(np.array([asked], np.int64))
            call.asked = asked
        run(self._session, call.binding, "the decoder graph")
        call.binding.synchronize_outputs()
        self.cache.extend(start + seq)
        types, outputs = self._output_types, call.outputs
        return StepOutput(
            top_values=to_float32(outputs["top_values"][0], types["top_values"]),
            top_ids=outputs["top_ids"][0],
            log_normalizer=to_float32(outputs["log_normalizer"][0], types["log_normalizer"]),
            logits=to_float32(outputs["logits"][0], types["logits"]) if want_logits else None,
        )

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""
        return self.cache.read(length, first)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions from `length` on."""
        self.cache.truncate(length)

    def reset(self, slot: int = 0) -> None:
        """Forget all positions. The memory is kept."""
        self.cache.truncate(0)

    def _set_image_features(self, image_features: tuple[ImageFeatures, ...]) -> None:
        """Copy the features of all pictures to the device, one after another, unless they are there already."""
        if self._image_features is not None and same_pictures(image_features, self._image_features):
            return
        joined = join_features(image_features, self._spec)
        self._features = DeviceArray(joined.shape, self._spec.dtype, self._device)
        self._features.write(joined)
        self._image_features = image_features
        self._calls.clear()

    def _call(self, seq: int, m: int, want_logits: bool) -> _Call:
        key = (seq, m, want_logits)
        call = self._calls.get(key)
        if call is None:
            call = self._bind(seq, m, want_logits)
            if seq <= _KEPT_SEQ:
                self._calls[key] = call
        return call

    def _bind(self, seq: int, m: int, want_logits: bool) -> _Call:
        spec, binding = self._spec, self._session.io_binding()
        shapes = {"top_values": (1, m, spec.candidates), "top_ids": (1, m, spec.candidates), "log_normalizer": (1, m)}
        if want_logits:
            shapes["logits"] = (1, m, spec.vocab)
        outputs = {name: np.empty(shape, storage(self._output_types[name])) for name, shape in shapes.items()}
        call = _Call(
            binding,
            input_ids=DeviceArray((1, seq), "int64", self._device),
            position_ids=DeviceArray((1, seq), "int64", self._device),
            logit_positions=DeviceArray((1, m), "int64", self._device),
            asked=None,
            outputs=outputs,
        )
        for name in ("input_ids", "position_ids", "logit_positions"):
            getattr(call, name).bind(binding, input=name)
        assert self._features is not None
        self._features.bind(binding, input="image_features")
        for layer, pair in enumerate(self.cache.layers):
            for part, array in zip(("key", "value"), pair, strict=True):
                array.bind(binding, input=f"past_key_values.{layer}.{part}", output=f"present.{layer}.{part}")
        for name, host in outputs.items():
            binding.bind_ortvalue_output(name, ort_value(host, self._output_types[name]))
        return call
