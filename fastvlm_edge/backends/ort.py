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
from fastvlm_edge.backends.kv_cache import KVCache
from fastvlm_edge.backends.ort_session import DTYPES, Setup, check_shapes, check_tensors, on_device, ort_value, run
from fastvlm_edge.backends.protocol import Decoder, ImageFeatures, StepOutput, check_context, check_pixels, same_pictures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import DecoderSpec, Manifest
from fastvlm_edge.progress import Progress, SilentProgress

_KEPT_SEQ = 16
"""Bindings for calls of up to this many ids (decoding, drafts) are kept. Those of a prefill chunk are used once."""


@dataclass(frozen=True, eq=False)
class HostFeatures:
    """Image features of one picture in host memory, in the type of the decoder."""

    data: NDArray[Any]
    dtype: str

    @property
    def rows(self) -> int:
        """Number of visual tokens."""
        return int(self.data.shape[0])

    def numpy(self) -> NDArray[np.float32]:
        """A copy as float32: [rows, hidden]."""
        return np.array(to_float32(self.data, self.dtype))


@dataclass(eq=False)
class _Call:
    """A binding of the decoder for one pair (seq, m), with the buffers that it reads and writes."""

    binding: Any
    input_ids: NDArray[np.int64]  # [1, seq]
    position_ids: NDArray[np.int64]  # [1, seq]
    logit_positions: NDArray[np.int64]  # [1, m]
    kv_new: NDArray[Any] | None  # [layers, 2, 1, kv_heads, seq, head_dim]; None where the graph appends to the cache itself
    top_values: NDArray[Any]  # [1, m, candidates]
    top_ids: NDArray[np.int64]  # [1, m, candidates]
    log_normalizer: NDArray[Any]  # [1, m]
    logits: NDArray[Any] | None  # [1, m, vocab]


class OrtVision:
    """`vision.onnx`: pixel_values -> image_features."""

    def __init__(self, setup: Setup) -> None:
        """Load the graph. Raises FastVLMError if onnxruntime refuses it or it does not match the manifest."""
        path, self._session = setup.load("vision")
        self._manifest = setup.manifest
        check_tensors(path, self._session.get_inputs(), {"pixel_values": "float32"})
        check_tensors(path, self._session.get_outputs(), {"image_features": setup.manifest.decoder.dtype})
        vision = setup.manifest.vision
        check_shapes(path, self._session.get_inputs(), {"pixel_values": (None, 3, vision.image_size, vision.image_size)})
        check_shapes(path, self._session.get_outputs(), {"image_features": (None, vision.tokens, vision.hidden)})

    def encode(self, pixel_values: NDArray[np.float32]) -> HostFeatures:
        """pixel_values [1, 3, S, S] -> features [tokens, hidden]."""
        vision, dtype = self._manifest.vision, self._manifest.decoder.dtype
        check_pixels(pixel_values, vision)
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
        self.cache = KVCache(layers=spec.layers, kv_heads=spec.kv_heads, head_dim=spec.head_dim, context=spec.context, dtype=spec.dtype)
        self._image_features: tuple[ImageFeatures, ...] = ()
        self._features = join_features((), spec)
        self._shared_inputs: list[tuple[str, Any]] | None = None
        self._calls: dict[tuple[int, int, bool], _Call] = {}

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to the cache; see `Backend.step`."""
        seq, start = len(input_ids), self.cache.length
        check_context(start + seq, self.cache.context)
        positions = (seq - 1,) if logit_positions is None else logit_positions
        self._set_image_features(image_features)
        if self._appends and self.cache.reserve(start + seq):
            self._forget_bindings()
        call = self._call(seq, len(positions), want_logits)
        call.input_ids[0] = input_ids
        call.position_ids[0] = range(start, start + seq) if seq < _KEPT_SEQ else np.arange(start, start + seq)
        call.logit_positions[0] = positions
        run(self._session, call.binding, "the decoder graph")
        if call.kv_new is None:
            self.cache.extend(start + seq)
        elif self.cache.append(call.kv_new, start):
            self._forget_bindings()
        types = self._output_types
        return StepOutput(
            top_values=to_float32(call.top_values[0], types["top_values"]),
            top_ids=call.top_ids[0],
            log_normalizer=to_float32(call.log_normalizer[0], types["log_normalizer"]),
            logits=None if call.logits is None else to_float32(call.logits[0], types["logits"]),
        )

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""
        stored: NDArray[Any] = self.cache.buffer[:, :, 0, :, first:length]
        return np.array(to_float32(stored, self._spec.dtype))

    def reset(self) -> None:
        """Forget all positions, and release the memory of a long conversation."""
        if self.cache.reset():
            self._forget_bindings()

    def _set_image_features(self, image_features: tuple[ImageFeatures, ...]) -> None:
        """Concatenate `image_features` into the graph input of that name, unless it holds them already."""
        if same_pictures(image_features, self._image_features):
            return
        self._features = join_features(image_features, self._spec)
        self._image_features = image_features
        self._forget_bindings()

    def _forget_bindings(self) -> None:
        self._calls.clear()
        self._shared_inputs = None

    def _call(self, seq: int, m: int, want_logits: bool) -> _Call:
        key = (seq, m, want_logits)
        call = self._calls.get(key)
        if call is None:
            call = self._bind(seq, m, want_logits)
            if seq <= _KEPT_SEQ:
                self._calls[key] = call
        return call

    def _bind(self, seq: int, m: int, want_logits: bool) -> _Call:
        spec, types = self._spec, self._output_types
        if self._shared_inputs is None:
            views = [*self.cache.views(), ("image_features", self._features)]
            self._shared_inputs = [(name, ort_value(view, spec.dtype)) for name, view in views]
        call = _Call(
            binding=self._session.io_binding(),
            input_ids=np.empty((1, seq), np.int64),
            position_ids=np.empty((1, seq), np.int64),
            logit_positions=np.empty((1, m), np.int64),
            kv_new=None if self._appends else np.empty((spec.layers, 2, 1, spec.kv_heads, seq, spec.head_dim), storage(spec.dtype)),
            top_values=np.empty((1, m, spec.candidates), storage(types["top_values"])),
            top_ids=np.empty((1, m, spec.candidates), np.int64),
            log_normalizer=np.empty((1, m), storage(types["log_normalizer"])),
            logits=np.empty((1, m, spec.vocab), storage(types["logits"])) if want_logits else None,
        )
        for name, value in self._shared_inputs:
            call.binding.bind_ortvalue_input(name, value)
        for name in ("input_ids", "position_ids", "logit_positions"):
            call.binding.bind_ortvalue_input(name, ort_value(getattr(call, name), "int64"))
        given = ("top_values", "top_ids", "log_normalizer", *(() if self._appends else ("kv_new",)), *(("logits",) if want_logits else ()))
        for name in given:
            call.binding.bind_ortvalue_output(name, ort_value(getattr(call, name), types[name]))
        if self._appends:
            for name, value in self._shared_inputs[:-1]:  # all but image_features
                call.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        return call


class Cache(Protocol):
    """How much of the cache is valid."""

    length: int
    revision: int

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""


class CachingDecoder(Decoder, Protocol):
    """A decoder with its cache, on the host or on a device; see OrtDecoder."""

    @property
    def cache(self) -> Cache: ...

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]: ...


class OrtBackend:
    """Implements `backends.protocol.Backend` with onnxruntime."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        cuda: bool = False,
        load_decoder: Callable[[Setup], CachingDecoder] = OrtDecoder,
    ) -> None:
        """Load both graphs in parallel. `cuda` needs a decoder on the device. Raises FastVLMError if onnxruntime refuses a graph."""
        progress = progress or SilentProgress()
        setup = on_device(directory, manifest, cuda=cuda, threads=threads)
        self.name = "ort-cuda" if cuda else "ort"
        self.description = setup.description
        self._dtype = setup.manifest.decoder.dtype
        progress.stage(f"loading {manifest.name} ({manifest.precision})", 2)
        with ThreadPoolExecutor(2) as pool:
            vision, decoder = pool.submit(OrtVision, setup), pool.submit(load_decoder, setup)
            self._vision = vision.result()
            progress.advance()
            self._decoder = decoder.result()
            progress.advance()
        progress.done()

    @property
    def length(self) -> int:
        """Number of positions in the cache."""
        return self._decoder.cache.length

    @property
    def revision(self) -> int:
        """Differs after every change of the cache."""
        return self._decoder.cache.revision

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
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to the cache; see `Backend.step`."""
        return self._decoder.step(input_ids, image_features, logit_positions=logit_positions, want_logits=want_logits)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self._decoder.cache.truncate(length)

    def reset(self) -> None:
        """Forget all positions, and release the memory of a long conversation."""
        self._decoder.reset()

    def close(self) -> None:
        """Release sessions, cache and buffers."""
        del self._vision, self._decoder
