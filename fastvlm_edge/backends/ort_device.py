"""The decoder of `ort-cuda`: onnxruntime with the cache, the image features and all bindings in device memory. Not yet run on hardware.

A step copies the new ids and their positions to the device, and the candidates back to the host. Nothing else crosses: the graph
`decoder.cuda.onnx` appends keys and values to the cache in place. Copies of slots stay on the device too. With DEVICE = "cpu" the same code
runs on host memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import storage, to_float32
from fastvlm_edge.backends.kv_cache import Slots, check_length
from fastvlm_edge.backends.ort import check_decoder, join_features
from fastvlm_edge.backends.ort_copy import DeviceCopier
from fastvlm_edge.backends.ort_session import ONNX_BFLOAT16, Setup, lacks_memory, ort_value, refuse, run
from fastvlm_edge.backends.protocol import ImageFeatures, SavedSlot, StepOutput, check_context, same_pictures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import DecoderSpec
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory

DEVICE = "cuda"
"""Where onnxruntime allocates: its name for the memory of the GPU."""
_KEPT_SEQ = 16
"""Bindings for calls of up to this many ids (decoding, drafts) are kept. Those of a prefill chunk are used once."""


class DeviceArray:
    """Memory of one tensor on the device. Its address does not change.

    bfloat16 is allocated as uint16, because onnxruntime reads it back only as that. It is bound as bfloat16.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        """`dtype` is the name that the manifest uses, `device` onnxruntime's name.

        Raises OutOfDeviceMemory, and FastVLMError if onnxruntime has no such device or it fails.
        """
        self.shape, self._device = list(shape), device
        self._element = ONNX_BFLOAT16 if dtype == "bfloat16" else storage(dtype).type
        self._stored = storage(dtype)
        self.nbytes = math.prod(self.shape) * self._stored.itemsize
        try:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, self._stored.type, device, 0)
        except Exception as error:  # the classes of onnxruntime's exceptions have no common base
            if lacks_memory(error):
                raise OutOfDeviceMemory(self.nbytes) from error
            refuse(error, f"onnxruntime cannot allocate memory on {device}", "run: fastvlm-edge doctor, or use --backend ort")

    def address(self, *index: int) -> int:
        """Address of an element; indices that are left out are 0."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(index))]
        at = sum(each * stride for each, stride in zip(index, strides, strict=True))
        return int(self._value.data_ptr()) + at * self._stored.itemsize

    def clear(self) -> None:
        """Set everything to zero."""
        self._value.update_inplace(np.zeros(self.shape, self._stored))

    def write(self, array: NDArray[Any]) -> None:
        """Copy a contiguous host array of the same shape and stored type to the device."""
        self._value.update_inplace(array)

    def read(self) -> NDArray[Any]:
        """A copy on the host, in the stored type."""
        copy: NDArray[Any] = self._value.numpy()
        return copy

    def bind(self, binding: Any, *, input: str | None = None, output: str | None = None, first: int = 0, rows: int | None = None) -> None:
        """Make this memory, or `rows` of its first dimension from `first` on, an input, an output or both of a call."""
        shape = [self.shape[0] if rows is None else rows, *self.shape[1:]]
        place = (self._device, 0, self._element, shape, self.address(first))
        if input is not None:
            binding.bind_input(input, *place)
        if output is not None:
            binding.bind_output(output, *place)


@dataclass(frozen=True, eq=False)
class ArraySlot:
    """A copy of the positions of a slot on the device, which is released when nothing refers to it any more."""

    data: DeviceArray  # [layers * 2 * kv_heads, length, head_dim]
    length: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.data.nbytes


class DeviceCache(Slots):
    """Keys and values of every layer, [slots, kv_heads, context, head_dim] each, allocated once for the whole context of all slots.

    The attention reads valid positions only, so a long cache costs memory but no time, and addresses never change.
    """

    def __init__(self, spec: DecoderSpec, device: str, slots: int = 1) -> None:
        """Raises OutOfDeviceMemory."""
        super().__init__(slots)
        self.context = spec.context
        self._spec, self._device = spec, device
        shape = (slots, spec.kv_heads, spec.context, spec.head_dim)
        self.layers = [(DeviceArray(shape, spec.dtype, device), DeviceArray(shape, spec.dtype, device)) for _ in range(spec.layers)]
        for pair in self.layers:
            for array in pair:
                array.clear()

    @functools.cached_property
    def _copier(self) -> DeviceCopier:
        """Copies one piece for each head of every key and value: its positions are one after another."""
        spec = self._spec
        itemsize = storage(spec.dtype).itemsize
        return DeviceCopier(spec.layers * 2 * spec.kv_heads, itemsize, cuda=self._device == "cuda", device=self._device)

    def extend(self, length: int, slot: int) -> None:
        """Set the length of a slot after the graph has appended."""
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`. If the copy fails, it is empty."""
        self.check(length, source)
        if source != target:
            self._replace(target, self._heads(source), length)
        self.extend(length, target)

    def save(self, slot: int) -> ArraySlot:
        """A copy of a slot. Raises OutOfDeviceMemory."""
        spec, length = self._spec, self.lengths[slot]
        pieces = spec.layers * 2 * spec.kv_heads
        data = DeviceArray((pieces, max(length, 1), spec.head_dim), spec.dtype, self._device)
        self._copier.copy([data.address(piece) for piece in range(pieces)], self._heads(slot), length * spec.head_dim)
        return ArraySlot(data, length)

    def restore(self, saved: ArraySlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy. If that fails, it is empty."""
        check_length(length, saved.length, "the copy")
        self._replace(slot, [saved.data.address(piece) for piece in range(saved.data.shape[0])], length)

    def read(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in slot 0: [layers, 2, kv_heads, positions, head_dim]."""
        stored = [[array.read()[0, :, first:length] for array in pair] for pair in self.layers]
        return to_float32(np.stack([np.stack(pair) for pair in stored]), self._spec.dtype)

    def _heads(self, slot: int) -> list[int]:
        """The address of every head in a slot."""
        return [array.address(slot, head) for pair in self.layers for array in pair for head in range(self._spec.kv_heads)]

    def _replace(self, slot: int, sources: Sequence[int], length: int) -> None:
        self.extend(0, slot)
        self._copier.copy(self._heads(slot), sources, length * self._spec.head_dim)
        self.extend(length, slot)


@dataclass(eq=False)
class _Call:
    """A binding of the decoder for n slots with seq ids and m positions each, with the memory that it reads and writes."""

    binding: Any
    input_ids: DeviceArray  # [n, seq]
    position_ids: DeviceArray  # [n, seq]
    logit_positions: DeviceArray  # [n, m]
    asked: tuple[int, ...] | None
    """What each row of logit_positions holds."""
    outputs: dict[str, NDArray[Any]]
    """On the host: top_values, top_ids, log_normalizer and, if wanted, logits."""


class DeviceDecoder:
    """`decoder.cuda.onnx` and the KV cache that it extends."""

    def __init__(self, setup: Setup) -> None:
        """Load the graph. Raises FastVLMError if onnxruntime refuses it or it does not match the manifest, and OutOfDeviceMemory."""
        path, self._session = setup.load("decoder")
        spec = self._spec = setup.manifest.decoder
        appends, self._output_types = check_decoder(path, self._session, spec)
        if not appends:
            raise FastVLMError(f"{path} does not append to the cache", "convert the checkpoint again with this version")
        self._device = DEVICE
        self.cache = DeviceCache(spec, self._device, setup.slots)
        self._image_features: tuple[ImageFeatures, ...] = ()
        self._features = self._no_features = self._upload(())
        self._calls: dict[tuple[int, int, int, int, bool], _Call] = {}

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        slot: int = 0,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to a slot; see `Backend.step`."""
        asked = (len(input_ids) - 1,) if logit_positions is None else tuple(logit_positions)
        visual = max(input_ids) >= self._spec.vocab
        if visual:
            self._set_image_features(image_features)
        return self._output(self._run(slot, np.array([input_ids], np.int64), asked, want_logits, visual=visual), 0)

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Append one text token to each of the slots 0 to n-1; see `Backend.decode`."""
        call = self._run(0, np.array(input_ids, np.int64)[:, None], (0,), want_logits, visual=False)
        return self._output(call, (slice(None), 0))

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""
        return self.cache.read(length, first)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions of a slot from `length` on."""
        self.cache.truncate(length, slot)

    def reset(self, slot: int = 0) -> None:
        """Forget all positions of a slot. The memory is kept."""
        self.cache.truncate(0, slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        self.cache.copy(source, target, length)

    def save(self, slot: int) -> ArraySlot | None:
        """A copy of a slot on the device, or None if there is no memory for it."""
        try:
            return self.cache.save(slot)
        except OutOfDeviceMemory:
            return None

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy."""
        assert isinstance(saved, ArraySlot)
        self.cache.restore(saved, slot, length)

    def _run(self, slot: int, ids: NDArray[np.int64], asked: tuple[int, ...], want_logits: bool, *, visual: bool) -> _Call:
        """Run the slots from `slot` on, one row of `ids` [n, seq] each; the graph appends their keys and values."""
        (rows, seq), cache = ids.shape, self.cache
        starts = cache.lengths[slot : slot + rows]
        check_context(max(starts) + seq, cache.context)
        call = self._call(slot, rows, seq, len(asked), want_logits, visual)
        call.input_ids.write(ids)
        call.position_ids.write(np.array(starts)[:, None] + np.arange(seq))
        if call.asked != asked:
            call.logit_positions.write(np.array([asked] * rows, np.int64))
            call.asked = asked
        run(self._session, call.binding, "the decoder graph")
        call.binding.synchronize_outputs()
        for row, start in enumerate(starts):
            cache.extend(start + seq, slot + row)
        return call

    def _output(self, call: _Call, index: Any) -> StepOutput:
        """The part of the outputs [n, m, ...] that `index` chooses."""
        types, outputs = self._output_types, call.outputs
        logits = outputs.get("logits")
        return StepOutput(
            top_values=to_float32(outputs["top_values"][index], types["top_values"]),
            top_ids=outputs["top_ids"][index],
            log_normalizer=to_float32(outputs["log_normalizer"][index], types["log_normalizer"]),
            logits=None if logits is None else to_float32(logits[index], types["logits"]),
        )

    def _set_image_features(self, image_features: tuple[ImageFeatures, ...]) -> None:
        """Copy the features of all pictures to the device, one after another, unless they are there already."""
        if self._features is self._no_features or not same_pictures(image_features, self._image_features):
            self._features, self._image_features = self._upload(image_features), image_features

    def _upload(self, image_features: tuple[ImageFeatures, ...]) -> DeviceArray:
        joined = join_features(image_features, self._spec)
        array = DeviceArray(joined.shape, self._spec.dtype, self._device)
        array.write(joined)
        return array

    def _call(self, slot: int, rows: int, seq: int, m: int, want_logits: bool, visual: bool) -> _Call:
        key = (slot, rows, seq, m, want_logits)
        if visual or seq > _KEPT_SEQ:
            return self._bind(*key, features=self._features if visual else self._no_features)
        if key not in self._calls:
            self._calls[key] = self._bind(*key, features=self._no_features)
        return self._calls[key]

    def _bind(self, slot: int, rows: int, seq: int, m: int, want_logits: bool, *, features: DeviceArray) -> _Call:
        spec, binding = self._spec, self._session.io_binding()
        shapes = {"top_values": (rows, m, spec.candidates), "top_ids": (rows, m, spec.candidates), "log_normalizer": (rows, m)}
        if want_logits:
            shapes["logits"] = (rows, m, spec.vocab)
        outputs = {name: np.empty(shape, storage(self._output_types[name])) for name, shape in shapes.items()}
        call = _Call(
            binding,
            input_ids=DeviceArray((rows, seq), "int64", self._device),
            position_ids=DeviceArray((rows, seq), "int64", self._device),
            logit_positions=DeviceArray((rows, m), "int64", self._device),
            asked=None,
            outputs=outputs,
        )
        for name in ("input_ids", "position_ids", "logit_positions"):
            getattr(call, name).bind(binding, input=name)
        features.bind(binding, input="image_features")
        for layer, pair in enumerate(self.cache.layers):
            for part, array in zip(("key", "value"), pair, strict=True):
                names = {"input": f"past_key_values.{layer}.{part}", "output": f"present.{layer}.{part}"}
                array.bind(binding, **names, first=slot, rows=rows)
        for name, host in outputs.items():
            binding.bind_ortvalue_output(name, ort_value(host, self._output_types[name]))
        return call
