"""TensorRT backend: two engines on a GPU, with the KV cache and image features in device memory.

A call copies ids to the device and 64 candidates per requested position back, and appends to the cache with strided copies. Decoding one
id of each slot and encoding a picture have fixed shapes, so they become CUDA graphs: the first call with a shape runs normally, the second
is captured. TensorRT for RTX makes its graphs itself.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.decoder_contexts import Calls, Contexts, DynamicContexts, StaticContexts
from fastvlm_edge.backends.device_memory import (
    Arena,
    Buffer,
    DeviceCache,
    DeviceFeatures,
    DeviceSlot,
    FeatureStore,
    HeldMemory,
    aligned,
    cache_addresses,
)
from fastvlm_edge.backends.dtypes import storage
from fastvlm_edge.backends.engine_files import EngineFiles
from fastvlm_edge.backends.protocol import ImageFeatures, SavedSlot, StepOutput, check_context, check_pixels, position_bytes, same_pictures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import gpu_extra, install_advice
from fastvlm_edge.model_dir.engine_record import EngineRecord
from fastvlm_edge.model_dir.manifest import DecoderSpec, Manifest, VisionSpec
from fastvlm_edge.nvidia.cuda import Cuda, OutOfDeviceMemory
from fastvlm_edge.nvidia.tensorrt_library import LoadedEngine
from fastvlm_edge.progress import Progress, SilentProgress

_INT64, _FLOAT32 = 8, 4


@dataclass(frozen=True)
class Platform:
    """A GPU and a TensorRT library, which engines run on."""

    cuda: Cuda
    library: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    load: Callable[[Path], LoadedEngine]
    """Loads an engine file onto the GPU."""


class _Graph:
    """Work with fixed shapes and addresses: the first call runs it, the second captures it as a CUDA graph, later calls launch the graph.

    TensorRT does not promise that all of its work can be captured. If it cannot, the work runs normally, and `note` gets one warning.
    """

    def __init__(self, cuda: Cuda, stream: int, work: Callable[[], None], note: Callable[[str], None], *, capture: bool) -> None:
        """Without `capture` the work always runs normally, because the library makes graphs itself."""
        self._cuda, self._stream, self._work, self._note = cuda, stream, work, note
        self._recordable = capture and cuda.supports_graphs
        self._ran = False
        self._graph: int | None = None

    def run(self) -> None:
        """Enqueue the work."""
        if self._graph is None and self._recordable and self._ran:  # TensorRT may initialise itself in the first call
            try:
                self._graph = self._cuda.capture(self._stream, self._work)
            except FastVLMError as error:
                self._recordable = False
                self._note(f"warning: running without CUDA graphs, which is slower: {error}")
        if self._graph is None:
            self._work()
            self._ran = True
        else:
            self._cuda.launch(self._graph, self._stream)

    def forget(self) -> None:
        """Drop the graph, because shapes or addresses change."""
        self._ran = False
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.destroy_graph(graph)


class _Vision:
    """`vision.engine` for one size of pictures: pixel_values [1, 3, S, S] -> image_features [1, tokens, hidden], each in its own buffer."""

    def __init__(
        self,
        cuda: Cuda,
        arena: Arena,
        stream: int,
        engine: LoadedEngine,
        profile: int,
        spec: VisionSpec,
        dtype: str,
        scratch: Buffer,
        note: Callable[[str], None],
    ) -> None:
        self._cuda, self._stream, self.tokens = cuda, stream, spec.tokens
        shape = (1, 3, spec.image_size, spec.image_size)
        self._nbytes = 4 * 3 * spec.image_size**2
        self.feature_bytes = spec.tokens * spec.hidden * storage(dtype).itemsize
        self._pinned = arena.pinned(self._nbytes)
        self._pixels = self._pinned.view(shape, np.float32)
        self._device, self.features = arena.buffer(self._nbytes), arena.buffer(self.feature_bytes)
        self._context = engine.context(profile, scratch.address, scratch.nbytes, stream, captured=True)
        self._context.set_shape("pixel_values", shape)
        self._context.set_address("pixel_values", self._device.address)
        self._context.set_address("image_features", self.features.address)
        self._graph = _Graph(cuda, stream, self._work, note, capture=not engine.captures_itself)

    def enqueue(self, pixel_values: NDArray[np.float32]) -> None:
        """Enqueue the encoding of a picture; its result is in `features`."""
        np.copyto(self._pixels, pixel_values)
        self._graph.run()

    def release(self) -> None:
        """Release the context and its graph."""
        self._graph.forget()
        self._context.close()

    def _work(self) -> None:
        self._cuda.copy(self._device.address, self._pinned.address, self._nbytes, self._stream)
        self._context.enqueue(self._stream)


class _Decoder:
    """The decoder and its KV cache. All inputs are in one block and all outputs in another, so that each takes one copy."""

    def __init__(
        self,
        cuda: Cuda,
        arena: Arena,
        stream: int,
        contexts: Contexts,
        spec: DecoderSpec,
        note: Callable[[str], None],
        *,
        slots: int,
        capture: bool,
    ) -> None:
        self._cuda, self._stream, self._spec, self._contexts = cuda, stream, spec, contexts
        self.chunk, self.most_positions, self.batch = contexts.chunk, contexts.most_positions, min(contexts.batch, slots)
        self.cache = DeviceCache(cuda, spec, stream, contexts.capacity_for, slots)
        arena.own(self.cache)
        ids, m, k = max(self.chunk, self.batch), max(self.most_positions, self.batch), spec.candidates

        self._ids_at, self._positions_at = 0, aligned(ids * _INT64)
        self._logit_positions_at = 2 * self._positions_at
        self._input_bytes = self._logit_positions_at + aligned(m * _INT64)
        self._values_at, self._top_ids_at = 0, aligned(m * k * _FLOAT32)
        self._normalizer_at = self._top_ids_at + aligned(m * k * _INT64)
        self._output_bytes = self._normalizer_at + aligned(m * _FLOAT32)
        logit_bytes = m * spec.vocab * _FLOAT32
        self._host_in, self._host_out, self._host_logits = map(arena.pinned, (self._input_bytes, self._output_bytes, logit_bytes))
        ints = self._host_in.view(self._input_bytes // _INT64, np.int64)
        self._ids, self._positions, self._logit_positions = (
            ints[at // _INT64 :] for at in (self._ids_at, self._positions_at, self._logit_positions_at)
        )
        outputs = self._host_out.view(self._output_bytes, np.uint8)
        self._top_values = outputs[: m * k * _FLOAT32].view(np.float32).reshape(m, k)
        self._top_ids = outputs[self._top_ids_at :][: m * k * _INT64].view(np.int64).reshape(m, k)
        self._log_normalizer = outputs[self._normalizer_at :][: m * _FLOAT32].view(np.float32)
        self._logits = self._host_logits.view((m, spec.vocab), np.float32)

        self._row_bytes = spec.hidden * storage(spec.dtype).itemsize
        sizes = (self._input_bytes, self._output_bytes, logit_bytes, self.cache.bytes_at(ids), self._row_bytes)
        self._in, self._out, self._device_logits, self._kv_new, self._no_features = map(arena.buffer, sizes)
        self._features = arena.buffer(contexts.padded_rows * self._row_bytes)
        for buffer in (self._no_features, self._features):
            if buffer.nbytes:
                cuda.zero(buffer.address, buffer.nbytes, stream)
        cuda.synchronize(stream)
        self._image_features: tuple[ImageFeatures, ...] = ()
        self._rows = 0
        self._note, self._capture = note, capture
        self._graphs: dict[tuple[int, int], _Graph] = {}
        """First slot and number of slots -> their decoding, whose context has its shapes and addresses."""
        self._prepared = False
        """Whether the last call found its engines loaded, or could load them."""

    def run(self, slot: int, ids: NDArray[np.int64], positions: Sequence[int], want_logits: bool) -> StepOutput:
        """Call an engine once for the slots from `slot` on, and wait for the result: [n * m, ...].

        ids [n, seq]: one slot with at most `chunk` ids and `most_positions` positions, or at most `batch` slots with one id of text each.
        """
        contexts, cache, (rows, seq), m = self._contexts, self.cache, ids.shape, len(positions)
        starts = cache.lengths[slot : slot + rows]
        end = max(starts) + seq
        self._prepare()
        self._reserve(slot + rows - 1, 0)
        text = int(ids.max()) < self._spec.vocab
        decoding = text and seq == 1 and m == 1
        calls = contexts.decode(slot, rows) if decoding else contexts.short(seq) if text else contexts.prefill
        width, asked = calls.ids or seq, calls.positions or m  # calls that are filled up are of one row
        self._ids[: rows * width] = 0  # an id that no other sees, where a call is filled up
        self._ids[: rows * width].reshape(rows, width)[:, :seq] = ids
        for row, start in enumerate(starts):
            self._positions[row * width : (row + 1) * width] = np.minimum(np.arange(start, start + width), self._spec.context - 1)
        self._logit_positions[: rows * asked] = 0
        self._logit_positions[: rows * asked].reshape(rows, asked)[:, :m] = positions
        if decoding:
            self._graph(calls, slot, rows, width, asked).run()
        else:
            self._bind(calls, slot, rows, width, asked)
            self._work(calls)
        count = rows * m
        if want_logits:
            self._cuda.copy(self._host_logits.address, self._device_logits.address, count * self._spec.vocab * _FLOAT32, self._stream)
        self._reserve(slot + rows - 1, end)
        cache.append(self._kv_new.address, slot, rows, seq, width)
        self._cuda.synchronize(self._stream)
        logits = self._logits[:count] if want_logits else None
        return StepOutput(self._top_values[:count], self._top_ids[:count], self._log_normalizer[:count], logits)

    def set_image_features(self, image_features: tuple[ImageFeatures, ...], store: FeatureStore) -> None:
        """Concatenate `image_features` into the engine's input of that name, unless it holds them already."""
        if same_pictures(image_features, self._image_features):
            return
        own = [picture for picture in image_features if isinstance(picture, DeviceFeatures) and store.holds(picture)]
        if len(own) < len(image_features):
            raise FastVLMError("the image features come from another model or backend", "encode the picture again with this one")
        rows = sum(picture.rows for picture in own)
        if rows > self._contexts.most_rows:
            what = f"{len(own)} pictures have {rows} visual tokens, more than the context of {self._spec.context}"
            raise FastVLMError(what, "use fewer pictures")
        self._image_features, self._rows = (), 0  # in case the allocation fails
        self._features.reserve(rows * self._row_bytes)
        at = self._features.address
        for picture in own:
            self._cuda.copy(at, picture.address, picture.rows * self._row_bytes, self._stream)
            at += picture.rows * self._row_bytes
        self._image_features, self._rows = image_features, rows

    def reset(self, slot: int) -> None:
        """Forget a slot, and keep only the capacity that the slots needed before; see `TensorRTBackend.reset`."""
        positions = max(self.cache.lengths) if self._prepared else 0
        self.cache.truncate(0, slot)
        with contextlib.suppress(OutOfDeviceMemory):  # the old buffer is larger than needed, but works
            self._fit(positions, copies=False)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        self._reserve(target, 0)
        self.cache.copy(source, target, length)

    def restore(self, saved: DeviceSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy."""
        self._reserve(slot, min(length, saved.length))
        self.cache.restore(saved, slot, length)

    def shrink(self) -> None:
        """Forget all positions, and take the first capacity."""
        for slot in range(len(self.cache.lengths)):
            self.cache.truncate(0, slot)
        self._fit(0)

    def release(self) -> None:
        """Release the graphs. The contexts can be closed after that."""
        self._unbind()

    def _prepare(self) -> None:
        """Load the engines for the capacity. If they do not fit on the GPU, go back to the capacity that the cached positions need."""
        self._prepared = False
        try:
            self._contexts.use(self.cache.capacity)
        except OutOfDeviceMemory:
            if not self._fit(0):
                raise
            self._contexts.use(self.cache.capacity)
        self._prepared = True

    def _fit(self, positions: int, *, copies: bool = True) -> bool:
        """Release the memory beyond the capacity for `positions`, at least those in the cache. Returns whether any was released.

        Without `copies`, slots that are in use are only moved to a buffer of at most half the capacity.
        """
        cache = self.cache
        needed = self._contexts.capacity_for(max(positions, 1, *cache.lengths))
        if needed >= cache.capacity or (not copies and any(cache.lengths) and cache.capacity < 2 * needed):
            return False
        self._unbind()
        cache.resize(1, needed)
        return True

    def _reserve(self, slot: int, positions: int) -> None:
        """Make room for `positions` in a slot and those before it. If it raises OutOfDeviceMemory, the cache is unchanged."""
        cache = self.cache
        if slot >= cache.rows or positions > cache.capacity:
            self._unbind()
            cache.resize(slot + 1, max(positions, cache.capacity))

    def _unbind(self) -> None:
        """Call this before the decode contexts, or an address that they are bound to, change."""
        while self._graphs:
            self._graphs.popitem()[1].forget()

    def _graph(self, calls: Calls, slot: int, rows: int, width: int, asked: int) -> _Graph:
        """The decoding of the slots from `slot` on. There are at most two for each slot: alone, and with those before it in one call."""
        if (slot, rows) not in self._graphs:
            self._bind(calls, slot, rows, width, asked)
            work = functools.partial(self._work, calls)
            self._graphs[slot, rows] = _Graph(self._cuda, self._stream, work, self._warn_once, capture=self._capture)
        return self._graphs[slot, rows]

    def _warn_once(self, text: str) -> None:
        """Pass on the warning that decoding cannot be captured, and capture nothing more."""
        if self._capture:
            self._capture = False
            self._note(text)

    def _bind(self, calls: Calls, slot: int, n: int, width: int, asked: int) -> None:
        """Set the shapes and addresses of every input and output, for `n` slots with `width` ids and `asked` positions each."""
        spec, cache, context = self._spec, self.cache, calls.context
        block, rows, features = self._in.address, 1, self._no_features
        if calls.rows != 1 and (self._rows or calls.rows):
            rows, features = calls.rows or self._rows, self._features
        for name, shape, address in (
            ("input_ids", (n, width), block + self._ids_at),
            ("position_ids", (n, width), block + self._positions_at),
            ("logit_positions", (n, asked), block + self._logit_positions_at),
            ("image_features", (rows, spec.hidden), features.address),
        ):
            context.set_shape(name, shape)
            context.set_address(name, address)
        for name, address in cache_addresses(cache, spec.layers, slot):
            context.set_shape(name, (n, spec.kv_heads, cache.capacity, spec.head_dim))
            context.set_address(name, address)
        context.set_address("top_values", self._out.address + self._values_at)
        context.set_address("top_ids", self._out.address + self._top_ids_at)
        context.set_address("log_normalizer", self._out.address + self._normalizer_at)
        context.set_address("logits", self._device_logits.address)
        context.set_address("kv_new", self._kv_new.address)

    def _work(self, calls: Calls) -> None:
        self._cuda.copy(self._in.address, self._host_in.address, self._input_bytes, self._stream)
        calls.context.enqueue(self._stream)
        self._cuda.copy(self._host_out.address, self._out.address, self._output_bytes, self._stream)


class TensorRTBackend:
    """Implements `backends.protocol.Backend` with TensorRT engines."""

    name = "tensorrt"
    engines: EngineRecord | None = None
    """Their record, which `load_engines` has read."""

    def __init__(
        self, directory: Path, manifest: Manifest, platform: Platform, *, slots: int = 1, progress: Progress | None = None
    ) -> None:
        """Load the engines of `directory` and allocate the memory that they need.

        The cache has `slots`. Engines decode as many of them in one call as they were built for, and the others in further calls.
        Takes over `platform.cuda` and closes it. Raises FastVLMError if TensorRT refuses an engine or if memory is short.
        """
        progress = progress or SilentProgress()
        self._manifest, self._cuda, self.slots = manifest, platform.cuda, slots
        self._files = EngineFiles(directory, manifest, platform.cuda, platform.load)
        self.position_bytes = position_bytes(manifest.decoder)
        self._lock = threading.RLock()
        self._closed = False
        self._undo = contextlib.ExitStack()
        weakref.finalize(self, self._undo.close).atexit = False  # for callers that forget to close; at exit the driver cleans up
        device = platform.cuda.device
        self.description = f"{platform.library} {platform.version}, {device.name}"
        if not platform.cuda.supports_graphs:
            self.description += ", no CUDA graphs"
            what = f"{platform.cuda.binding} has no CUDA graphs, so the host launches hundreds of kernels per token, which is slower"
            progress.note(f"warning: {what}; cuda-python has them; {install_advice(gpu_extra())}")
        progress.stage(f"loading {manifest.name} ({manifest.precision})", 3)
        try:
            self._load(platform, progress)
        except OutOfDeviceMemory as error:
            self._undo.close()
            size = f"engines of {self._files.largest_bytes() >> 20:,} MiB"
            more = f"loading its {size} ran out of memory" if error.free is None else f"in addition to its {size}, {error.what}"
            what = f"{manifest.name} does not fit on {device.name}: {more}"
            raise FastVLMError(what, error.mend) from None
        except BaseException:
            self._undo.close()
            raise
        progress.done()

    def _load(self, platform: Platform, progress: Progress) -> None:
        cuda, undo, manifest = platform.cuda, self._undo, self._manifest
        undo.callback(cuda.close)
        stream = self._stream = cuda.create_stream()
        undo.callback(cuda.destroy_stream, stream)
        arena = Arena(cuda)
        undo.callback(arena.free)
        undo.callback(cuda.synchronize, stream)  # before anything is freed
        spec, files = manifest.decoder, self._files
        self._memory = HeldMemory(cuda)
        arena.own(self._memory)
        self._store = FeatureStore(cuda, self._memory, spec, stream, self._lock)
        self._vision_engine = vision = files.load("vision")
        undo.callback(vision.close)
        progress.advance()
        contexts: Contexts
        if files.capacities:
            scratch = arena.buffer(max(vision.scratch_bytes, 1))
            contexts = StaticContexts(files, spec, arena, stream)
        else:
            decoder = files.load("decoder")
            undo.callback(decoder.close)
            # The engines run one after the other, so they share it.
            scratch = arena.buffer(max(vision.scratch_bytes, decoder.scratch_bytes, 1))
            contexts = DynamicContexts(decoder, scratch, stream)
        self._contexts = contexts
        undo.callback(contexts.release)
        progress.advance()
        capture = not vision.captures_itself
        self._decoder = _Decoder(cuda, arena, stream, contexts, spec, progress.note, slots=self.slots, capture=capture)
        undo.callback(self._decoder.release)
        self._scratch, self._note = scratch, progress.note
        self._visions: dict[int, _Vision] = {}
        self._vision(manifest.vision.image_size)
        progress.advance()

    def _vision(self, size: int) -> _Vision:
        """The encoder for pictures of a size. Its context and buffers are made when it is first used, all or nothing."""
        if size not in self._visions:
            cuda, stream, spec = self._cuda, self._stream, self._manifest.vision
            with contextlib.ExitStack() as undo:
                arena = Arena(cuda)
                undo.callback(arena.free)
                undo.callback(cuda.synchronize, stream)
                profile, dtype = spec.every_size.index(size), self._manifest.decoder.dtype
                vision = _Vision(cuda, arena, stream, self._vision_engine, profile, spec.at(size), dtype, self._scratch, self._note)
                undo.callback(vision.release)
                self._undo.push(undo.pop_all())
            self._visions[size] = vision
        return self._visions[size]

    @property
    def lengths(self) -> Sequence[int]:
        """Number of positions in each slot."""
        return self._decoder.cache.lengths

    def save_kernels(self) -> None:
        """Save the kernels that TensorRT for RTX has compiled for this GPU. TensorRT itself compiles at build time and has none."""
        for part, engine in {"vision": self._vision_engine, **self._contexts.engines()}.items():
            self._files.save_kernels(part, engine)

    def encode(self, pixel_values: NDArray[np.float32]) -> DeviceFeatures:
        """pixel_values [1, 3, S, S] -> features [tokens, hidden], which stay on the device."""
        size = check_pixels(pixel_values, self._manifest.vision)
        with self._working():
            vision = self._vision(size)
            features = self._store.new(vision.tokens)
            vision.enqueue(pixel_values)
            self._cuda.copy(features.address, vision.features.address, vision.feature_bytes, self._stream)
            self._cuda.synchronize(self._stream)
            return features

    def upload(self, features: NDArray[np.float32]) -> DeviceFeatures:
        """Image features [rows, hidden] that were computed elsewhere, on the device."""
        with self._working():
            stored = self._store.new(len(features))
            self._store.write(stored, features)
            return stored

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
        decoder = self._decoder
        seq, start = len(input_ids), decoder.cache.lengths[slot]
        check_context(start + seq, decoder.cache.context)
        positions = [seq - 1] if logit_positions is None else list(logit_positions)
        if not 0 < len(positions) <= decoder.most_positions:
            raise FastVLMError(f"logits of {len(positions)} positions were requested; the engine computes 1 to {decoder.most_positions}")
        with self._working():
            decoder.set_image_features(image_features, self._store)
            try:
                return self._in_chunks(slot, input_ids, positions, want_logits)
            except BaseException:
                decoder.cache.truncate(start, slot)
                raise

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Append one text token to each of the slots 0 to n-1; see `Backend.decode`."""
        decoder, ids = self._decoder, np.array(input_ids, np.int64)[:, None]
        starts = decoder.cache.lengths[: len(ids)]
        check_context(max(starts) + 1, decoder.cache.context)
        with self._working():
            try:
                calls = range(0, len(ids), decoder.batch)
                if len(calls) == 1:
                    return decoder.run(0, ids, (0,), want_logits)
                return _join([_copy(decoder.run(first, ids[first : first + decoder.batch], (0,), want_logits)) for first in calls])
            except BaseException:
                for slot, start in enumerate(starts):
                    decoder.cache.truncate(start, slot)
                raise

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions of a slot from `length` on."""
        self._decoder.cache.truncate(length, slot)

    def reset(self, slot: int = 0) -> None:
        """Forget a slot, and release the memory of a longer conversation.

        The capacity becomes the one that the slots needed until now. So a conversation like the last one needs no new memory, CUDA graph
        or engines, and a long one slows only the next. If the engines of that capacity could not be loaded, it becomes the one that the
        other slots need.
        """
        with self._working():
            self._decoder.reset(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        with self._working():
            self._decoder.copy(source, target, length)

    def save(self, slot: int) -> DeviceSlot | None:
        """A copy of a slot on the device, or None if there is no memory for it."""
        with self._working():
            try:
                return self._decoder.cache.save(slot, self._memory)
            except OutOfDeviceMemory:
                return None

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy."""
        with self._working():
            if not (isinstance(saved, DeviceSlot) and saved.memory is self._memory):
                raise ValueError("the copy of a slot comes from another backend")
            self._decoder.restore(saved, slot, length)

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""
        with self._working():
            return self._decoder.cache.read(length, first)

    def shrink(self) -> None:
        """Forget all positions, and take the first capacity."""
        with self._working():
            self._decoder.shrink()

    def close(self) -> None:
        """Save the kernels compiled since the load, and release engines and memory. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with self._undo, contextlib.suppress(FastVLMError):
                    self.save_kernels()

    def _in_chunks(self, slot: int, input_ids: Sequence[int], positions: list[int], want_logits: bool) -> StepOutput:
        """Call the engine with at most `chunk` ids at a time, and join the outputs of all calls."""
        chunk, ids = self._decoder.chunk, np.array([input_ids], np.int64)
        if len(input_ids) <= chunk:
            return self._decoder.run(slot, ids, positions, want_logits)
        parts: list[tuple[list[int], StepOutput]] = []
        for first in range(0, len(input_ids), chunk):
            part = ids[:, first : first + chunk]
            end = first + part.shape[1]
            inside = [index for index, position in enumerate(positions) if first <= position < end]
            asked = [positions[index] - first for index in inside] or [part.shape[1] - 1]
            output = self._decoder.run(slot, part, asked, want_logits and bool(inside))
            if inside:
                parts.append((inside, _copy(output)))
        return _join([output for _, output in parts], np.argsort([index for inside, _ in parts for index in inside]))

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Run one call at a time. After an interrupted one, wait for what it enqueued before anything else uses its buffers."""
        with self._lock:
            if self._closed:
                raise FastVLMError("this model was closed", "load it again with FastVLM.load")
            self._memory.sweep()
            try:
                yield
            except BaseException:
                with contextlib.suppress(FastVLMError):  # the first error is the one to report
                    self._cuda.synchronize(self._stream)
                raise


def _copy(output: StepOutput) -> StepOutput:
    """Outputs that the next call does not overwrite."""
    logits = None if output.logits is None else output.logits.copy()
    return StepOutput(output.top_values.copy(), output.top_ids.copy(), output.log_normalizer.copy(), logits)


def _join(outputs: Sequence[StepOutput], order: NDArray[np.intp] | slice = slice(None)) -> StepOutput:
    """The rows of several calls, in another order if one is given."""

    def joined(name: str) -> Any:
        return np.concatenate([getattr(output, name) for output in outputs])[order]

    logits = None if outputs[0].logits is None else joined("logits")
    return StepOutput(joined("top_values"), joined("top_ids"), joined("log_normalizer"), logits)
