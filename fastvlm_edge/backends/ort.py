"""onnxruntime backend. Its decoder on the CPU, the reference, is here; `ort_device.py` has the one for an NVIDIA GPU.

Every tensor is bound once (IOBinding): the decoder reads the cache in place and writes into buffers that are kept between steps, so that
Python only does a few small writes and one strided copy in a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import from_float32, storage, to_float32
from fastvlm_edge.backends.kv_cache import HostSlot, KVCache
from fastvlm_edge.backends.ort_session import DTYPES, Setup, check_shapes, check_tensors, on_device, ort_value, run
from fastvlm_edge.backends.protocol import (
    Decoder,
    ImageFeatures,
    SavedSlot,
    StepOutput,
    check_context,
    check_pixels,
    position_bytes,
    same_pictures,
)
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import EngineRecord
from fastvlm_edge.model_dir.manifest import DecoderSpec, Manifest
from fastvlm_edge.progress import Progress, SilentProgress

_KEPT_SEQ = 16
"""Bindings for calls of up to this many ids (decoding, drafts) are kept, unless they have several rows of logits, which are large. Those of
a prefill chunk are used once."""


@dataclass(frozen=True, eq=False)
class HostFeatures:
    """Image features of one picture in host memory, in the type of the decoder."""

    data: NDArray[Any]
    dtype: str

    @property
    def rows(self) -> int:
        """Number of visual tokens."""
        return int(self.data.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.data.nbytes

    def numpy(self) -> NDArray[np.float32]:
        """A copy as float32: [rows, hidden]."""
        return np.array(to_float32(self.data, self.dtype))


@dataclass(eq=False)
class _Call:
    """A binding of the decoder for n rows of seq ids and m positions each, with the buffers that it reads and writes."""

    binding: Any
    input_ids: NDArray[np.int64]  # [n, seq]
    position_ids: NDArray[np.int64]  # [n, seq]
    logit_positions: NDArray[np.int64]  # [n, m]
    kv_new: NDArray[Any] | None  # [layers, 2, n, kv_heads, seq, head_dim]; None where the graph appends to the cache itself
    top_values: NDArray[Any]  # [n, m, candidates]
    top_ids: NDArray[np.int64]  # [n, m, candidates]
    log_normalizer: NDArray[Any]  # [n, m]
    logits: NDArray[Any] | None  # [n, m, vocab]


class OrtVision:
    """`vision.onnx`: pixel_values -> image_features."""

    def __init__(self, setup: Setup) -> None:
        """Load the graph. Raises FastVLMError if onnxruntime refuses it or it does not match the manifest."""
        path, self._session = setup.load("vision")
        self._manifest = setup.manifest
        check_tensors(path, self._session.get_inputs(), {"pixel_values": "float32"})
        check_tensors(path, self._session.get_outputs(), {"image_features": setup.manifest.decoder.dtype})
        vision = setup.manifest.vision
        size, tokens = (None, None) if vision.other_sizes else (vision.image_size, vision.tokens)
        check_shapes(path, self._session.get_inputs(), {"pixel_values": (None, 3, size, size)})
        check_shapes(path, self._session.get_outputs(), {"image_features": (None, tokens, vision.hidden)})

    def encode(self, pixel_values: NDArray[np.float32]) -> HostFeatures:
        """pixel_values [1, 3, S, S] -> features [tokens, hidden]."""
        vision, dtype = self._manifest.vision, self._manifest.decoder.dtype
        vision = vision.at(check_pixels(pixel_values, vision))
        pixels = np.ascontiguousarray(pixel_values, dtype=np.float32)
        features = np.empty((1, vision.tokens, vision.hidden), dtype=storage(dtype))
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("pixel_values", ort_value(pixels, "float32"))
        binding.bind_ortvalue_output("image_features", ort_value(features, dtype))
        run(self._session, binding, "the vision graph")
        return HostFeatures(features[0], dtype)


def check_decoder(path: Path, session: Any, spec: DecoderSpec) -> tuple[bool, dict[str, str]]:
    """Compare inputs and outputs of a decoder graph with the manifest.

    Returns whether the graph appends to the cache itself, as those for a provider of onnxruntime do (docs/graphs.md), and the type of each
    output. Raises FastVLMError for the first difference.
    """
    past = {f"past_key_values.{layer}.{part}": spec.dtype for layer in range(spec.layers) for part in ("key", "value")}
    wanted = {"input_ids": "int64", "position_ids": "int64", "logit_positions": "int64", "image_features": spec.dtype, **past}
    check_tensors(path, session.get_inputs(), wanted)
    outputs = session.get_outputs()
    found = {tensor.name: DTYPES.get(tensor.type, tensor.type) for tensor in outputs}
    appends = "kv_new" not in found
    present = {name.replace("past_key_values", "present"): kind for name, kind in past.items()}
    floats = ("top_values", "log_normalizer", "logits")
    types = {name: found.get(name, "float32") for name in floats} | {"top_ids": "int64"}
    types |= present if appends else {"kv_new": spec.dtype}
    check_tensors(path, outputs, types)
    cache = (None, spec.kv_heads, None, spec.head_dim)
    check_shapes(path, session.get_inputs(), {"image_features": (None, spec.hidden), **dict.fromkeys(past, cache)})
    rows: dict[str, tuple[int | None, ...]] = {
        "kv_new": (spec.layers, 2, None, spec.kv_heads, None, spec.head_dim),
        "logits": (None, None, spec.vocab),
        "top_values": (None, None, spec.candidates),
        "top_ids": (None, None, spec.candidates),
    }
    check_shapes(path, outputs, {**rows, **dict.fromkeys(present, cache)})
    return appends, types


def join_features(image_features: Sequence[ImageFeatures], spec: DecoderSpec) -> NDArray[Any]:
    """The features of all pictures [rows, hidden], one after another; one row of zeros if there is none.

    Raises FastVLMError if they come from another model or backend.
    """
    hosts = [picture for picture in image_features if isinstance(picture, HostFeatures)]
    if len(hosts) < len(image_features) or any((host.dtype, host.data.shape[1]) != (spec.dtype, spec.hidden) for host in hosts):
        raise FastVLMError("the image features come from another model or backend", "encode the picture again with this one")
    return np.concatenate([host.data for host in hosts]) if hosts else np.zeros((1, spec.hidden), storage(spec.dtype))


class OrtDecoder:
    """`decoder.onnx` and the KV cache that it reads."""

    def __init__(self, setup: Setup) -> None:
        """Load the graph. Raises FastVLMError if onnxruntime refuses it or it does not match the manifest."""
        path, self._session = setup.load("decoder")
        spec = self._spec = setup.manifest.decoder
        self._appends, self._output_types = check_decoder(path, self._session, spec)
        self.cache = KVCache(
            layers=spec.layers, kv_heads=spec.kv_heads, head_dim=spec.head_dim, context=spec.context, dtype=spec.dtype, slots=setup.slots
        )
        self._image_features: tuple[ImageFeatures, ...] = ()
        self._features = self._no_features = ort_value(join_features((), spec), spec.dtype)
        self._kept: Any = None
        """The memory that `_features` points to."""
        self._views: dict[tuple[int, int], list[tuple[str, Any]]] = {}
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
        seq = len(input_ids)
        positions = (seq - 1,) if logit_positions is None else logit_positions
        visual = max(input_ids) >= self._spec.vocab
        if visual:
            self._set_image_features(image_features)
        call = self._run(slot, np.array([input_ids], np.int64), positions, want_logits, visual=visual)
        return self._output(call, 0)

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Append one text token to each of the slots 0 to n-1; see `Backend.decode`."""
        call = self._run(0, np.array(input_ids, np.int64)[:, None], (0,), want_logits, visual=False)
        return self._output(call, (slice(None), 0))

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in slot 0: [layers, 2, kv_heads, positions, head_dim]."""
        stored: NDArray[Any] = self.cache.buffer[:, :, 0, :, first:length]
        return np.array(to_float32(stored, self._spec.dtype))

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions of a slot from `length` on."""
        self.cache.truncate(length, slot)

    def reset(self, slot: int = 0) -> None:
        """Forget all positions of a slot, and release the memory of a long conversation."""
        self._changed(self.cache.reset(slot))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        self._changed(self.cache.copy(source, target, length))

    def save(self, slot: int) -> HostSlot | None:
        """A copy of a slot."""
        try:
            return self.cache.save(slot)
        except MemoryError:
            return None

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy."""
        assert isinstance(saved, HostSlot)
        self._changed(self.cache.restore(saved, slot, length))

    def _run(self, slot: int, ids: NDArray[np.int64], positions: Sequence[int], want_logits: bool, *, visual: bool) -> _Call:
        """Run the slots from `slot` on, one row of `ids` [n, seq] each, and append their keys and values."""
        (rows, seq), cache = ids.shape, self.cache
        last, starts = slot + rows - 1, cache.lengths[slot : slot + rows]
        check_context(max(starts) + seq, cache.context)
        self._changed(cache.reserve(last, max(starts) + (seq if self._appends else 0)))
        call = self._call(slot, rows, seq, len(positions), want_logits, visual)
        call.input_ids[:] = ids
        for row, start in enumerate(starts):
            call.position_ids[row] = range(start, start + seq) if seq < _KEPT_SEQ else np.arange(start, start + seq)
        call.logit_positions[:] = positions
        run(self._session, call.binding, "the decoder graph")
        if call.kv_new is not None:
            self._changed(cache.reserve(last, max(starts) + seq))
            cache.append(call.kv_new, slot)
        else:
            for row, start in enumerate(starts):
                cache.extend(start + seq, slot + row)
        return call

    def _output(self, call: _Call, index: Any) -> StepOutput:
        """The part of the outputs [n, m, ...] that `index` chooses."""
        types = self._output_types
        return StepOutput(
            top_values=to_float32(call.top_values[index], types["top_values"]),
            top_ids=call.top_ids[index],
            log_normalizer=to_float32(call.log_normalizer[index], types["log_normalizer"]),
            logits=None if call.logits is None else to_float32(call.logits[index], types["logits"]),
        )

    def _set_image_features(self, image_features: tuple[ImageFeatures, ...]) -> None:
        """Concatenate `image_features` into the graph input of that name, unless it holds them already."""
        if self._kept is not None and same_pictures(image_features, self._image_features):
            return
        self._kept = join_features(image_features, self._spec)
        self._features = ort_value(self._kept, self._spec.dtype)
        self._image_features = image_features

    def _changed(self, changed: bool) -> None:
        """Forget what points to the buffer if it is another one now."""
        if changed:
            self._calls.clear()
            self._views.clear()

    def _call(self, slot: int, rows: int, seq: int, m: int, want_logits: bool, visual: bool) -> _Call:
        key = (slot, rows, seq, m, want_logits)
        if visual or seq > _KEPT_SEQ or (want_logits and m > 1):
            return self._bind(*key, features=self._features if visual else self._no_features)
        if key not in self._calls:
            self._calls[key] = self._bind(*key, features=self._no_features)
        return self._calls[key]

    def _bind(self, slot: int, rows: int, seq: int, m: int, want_logits: bool, *, features: Any) -> _Call:
        spec, types = self._spec, self._output_types
        past = self._views.get((slot, rows))
        if past is None:
            past = [(name, ort_value(view, spec.dtype)) for name, view in self.cache.views(slot, rows)]
            self._views[slot, rows] = past
        kv_new = None if self._appends else np.empty((spec.layers, 2, rows, spec.kv_heads, seq, spec.head_dim), storage(spec.dtype))
        call = _Call(
            binding=self._session.io_binding(),
            input_ids=np.empty((rows, seq), np.int64),
            position_ids=np.empty((rows, seq), np.int64),
            logit_positions=np.empty((rows, m), np.int64),
            kv_new=kv_new,
            top_values=np.empty((rows, m, spec.candidates), storage(types["top_values"])),
            top_ids=np.empty((rows, m, spec.candidates), np.int64),
            log_normalizer=np.empty((rows, m), storage(types["log_normalizer"])),
            logits=np.empty((rows, m, spec.vocab), storage(types["logits"])) if want_logits else None,
        )
        for name, value in (*past, ("image_features", features)):
            call.binding.bind_ortvalue_input(name, value)
        for name in ("input_ids", "position_ids", "logit_positions"):
            call.binding.bind_ortvalue_input(name, ort_value(getattr(call, name), "int64"))
        given = ("top_values", "top_ids", "log_normalizer", *(() if self._appends else ("kv_new",)), *(("logits",) if want_logits else ()))
        for name in given:
            call.binding.bind_ortvalue_output(name, ort_value(getattr(call, name), types[name]))
        if self._appends:
            for name, value in past:
                call.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        return call


class _Cache(Protocol):
    """How much of the cache is valid."""

    lengths: list[int]


class CachingDecoder(Decoder, Protocol):
    """A decoder with its cache, on the host or on a device; the calls are those of `Backend`."""

    @property
    def cache(self) -> _Cache: ...

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]: ...

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput: ...

    def truncate(self, length: int, slot: int = 0) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def save(self, slot: int) -> SavedSlot | None: ...

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None: ...


class OrtBackend:
    """Implements `backends.protocol.Backend` with onnxruntime."""

    engines: EngineRecord | None = None

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        slots: int = 1,
        cuda: bool = False,
        load_decoder: Callable[[Setup], CachingDecoder] = OrtDecoder,
    ) -> None:
        """Load both graphs in parallel. `cuda` needs a decoder on the device. Raises FastVLMError if onnxruntime refuses a graph."""
        progress = progress or SilentProgress()
        setup = on_device(directory, manifest, cuda=cuda, threads=threads, slots=slots)
        self.name = "ort-cuda" if cuda else "ort"
        self.description = setup.description
        self.slots = slots
        self._dtype = setup.manifest.decoder.dtype
        self.position_bytes = position_bytes(setup.manifest.decoder)
        progress.stage(f"loading {manifest.name} ({manifest.precision})", 2)
        with ThreadPoolExecutor(2) as pool:
            vision, decoder = pool.submit(OrtVision, setup), pool.submit(load_decoder, setup)
            self._vision = vision.result()
            progress.advance()
            self._decoder = decoder.result()
            progress.advance()
        progress.done()

    @property
    def lengths(self) -> Sequence[int]:
        """Number of positions in each slot."""
        return self._decoder.cache.lengths

    def encode(self, pixel_values: NDArray[np.float32]) -> HostFeatures:
        """pixel_values [1, 3, S, S] -> features [tokens, hidden]."""
        return self._vision.encode(pixel_values)

    def upload(self, features: NDArray[np.float32]) -> HostFeatures:
        """Image features [rows, hidden] that were computed elsewhere."""
        return HostFeatures(from_float32(features, self._dtype), self._dtype)

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""
        return self._decoder.cached(length, first)

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
        return self._decoder.step(input_ids, image_features, slot=slot, logit_positions=logit_positions, want_logits=want_logits)

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Append one text token to each of the slots 0 to n-1; see `Backend.decode`."""
        return self._decoder.decode(input_ids, want_logits=want_logits)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions of a slot from `length` on."""
        self._decoder.truncate(length, slot)

    def reset(self, slot: int = 0) -> None:
        """Forget all positions of a slot, and release the memory of a long conversation."""
        self._decoder.reset(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        self._decoder.copy(source, target, length)

    def save(self, slot: int) -> SavedSlot | None:
        """A copy of a slot."""
        return self._decoder.save(slot)

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy."""
        self._decoder.restore(saved, slot, length)

    def close(self) -> None:
        """Release sessions, cache and buffers."""
        del self._vision, self._decoder
