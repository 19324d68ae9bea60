"""The execution contexts of the decoder: one engine of any size, or static engines for the capacity of the cache.

A context that a CUDA graph has captured must not change. So prefill and drafts have one each, and decoding has one for each group of slots
that are decoded in one call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

from fastvlm_edge.backends.device_memory import Arena, Buffer
from fastvlm_edge.backends.engine_files import DECODE, PREFILL, EngineFiles, static_part
from fastvlm_edge.backends.kv_cache import next_capacity
from fastvlm_edge.model_dir.manifest import DecoderSpec
from fastvlm_edge.nvidia.tensorrt_library import Context, LoadedEngine


@dataclass(frozen=True)
class Calls:
    """A context of the decoder, and the sizes to which its calls are filled up; None if it takes calls of any size."""

    context: Context
    ids: int | None = None
    positions: int | None = None
    rows: int | None = None
    """Rows of image_features. 1 means that there is no id of a picture in these calls."""


class Contexts(Protocol):
    """Which context runs a call of the decoder."""

    chunk: int
    """Most ids per call."""
    most_positions: int
    """Most positions per call whose logits are computed."""
    batch: int
    """Most slots that one call decodes."""
    most_rows: int
    """Most rows of image_features."""
    padded_rows: int
    """Rows to which image_features are filled up; 0 if they are not."""

    def capacity_for(self, needed: int) -> int:
        """The capacity of the cache that holds `needed` positions."""

    def use(self, capacity: int) -> None:
        """Prepare for a cache of this capacity. No graph of `decode` may exist. Raises OutOfDeviceMemory; then nothing is prepared."""

    @property
    def prefill(self) -> Calls:
        """For up to `chunk` ids, of text and pictures."""

    def decode(self, slot: int, rows: int) -> Calls:
        """For one id of text in each of `rows` slots from `slot` on, as a CUDA graph. Raises OutOfDeviceMemory."""

    def short(self, ids: int) -> Calls:
        """For several ids of text, such as a draft."""

    def engines(self) -> dict[str, LoadedEngine]:
        """Part -> engine, of all that are loaded."""

    def release(self) -> None:
        """Close all contexts, and the engines that were loaded here."""


class DynamicContexts:
    """The contexts of `decoder.engine`, which takes calls of any size up to `chunk`."""

    padded_rows = 0

    def __init__(self, engine: LoadedEngine, scratch: Buffer, stream: int) -> None:
        self._engine = engine
        last = engine.profiles - 1
        self.chunk = engine.largest("input_ids")[1]
        self.most_positions = engine.largest("logit_positions")[1]
        self.batch = engine.largest("input_ids", last)[0]
        self.most_rows = engine.largest("image_features")[0]
        self._most_short = engine.largest("input_ids", last)[1] if last else 0

        def calls(profile: int, rows: int | None, *, captured: bool = False) -> Calls:
            return Calls(engine.context(profile, scratch.address, scratch.nbytes, stream, captured=captured), rows=rows)

        self.prefill = calls(0, None)
        self._new_decode = functools.partial(calls, last, 1, captured=True)
        self._decode = {(0, 1): self._new_decode()}
        self._short = calls(last, 1) if last else self.prefill

    def capacity_for(self, needed: int) -> int:
        return next_capacity(needed)

    def use(self, capacity: int) -> None:
        pass

    def decode(self, slot: int, rows: int) -> Calls:
        if (slot, rows) not in self._decode:
            self._decode[slot, rows] = self._new_decode()
        return self._decode[slot, rows]

    def short(self, ids: int) -> Calls:
        return self._short if ids <= self._most_short else self.prefill

    def engines(self) -> dict[str, LoadedEngine]:
        return {"decoder": self._engine}

    def release(self) -> None:
        for calls in (self.prefill, *self._decode.values(), self._short):
            calls.context.close()


class StaticContexts:
    """Two engines of fixed shapes for the capacity of the cache, one for prefill and one for decoding. Each holds all weights.

    Only those of the present capacity are loaded. Drafts run as prefill. Slots are decoded one after the other.
    """

    batch = 1

    def __init__(self, files: EngineFiles, spec: DecoderSpec, arena: Arena, stream: int) -> None:
        self._files, self._stream = files, stream
        self._scratch = arena.buffer(0)
        self._capacity = 0
        self._engines: dict[str, LoadedEngine] = {}
        self._prefill: Calls | None = None
        self._decode: dict[int, Calls] = {}
        self.use(files.capacities[0])
        prefill = self._engines[static_part(PREFILL, files.capacities[0])]
        self.chunk = prefill.largest("input_ids")[1]
        self.most_positions = prefill.largest("logit_positions")[1]
        self.most_rows = self.padded_rows = prefill.largest("image_features")[0]

    @property
    def prefill(self) -> Calls:
        assert self._prefill is not None
        return self._prefill

    def decode(self, slot: int, rows: int) -> Calls:
        if slot not in self._decode:
            self._decode[slot] = self._context(DECODE, captured=True)
        return self._decode[slot]

    def capacity_for(self, needed: int) -> int:
        return next(capacity for capacity in self._files.capacities if capacity >= needed)

    def use(self, capacity: int) -> None:
        if capacity == self._capacity:
            return
        try:
            for part, engine in self._engines.items():
                self._files.save_kernels(part, engine)
        finally:
            self.release()
        try:
            for kind in (PREFILL, DECODE):
                part = static_part(kind, capacity)
                self._engines[part] = self._files.load(part)
            self._scratch.reserve(max(1, *(engine.scratch_bytes for engine in self._engines.values())))
            self._capacity = capacity
            self._prefill = self._context(PREFILL, captured=False)
            self.decode(0, 1)
        except BaseException:
            self.release()
            raise

    def _context(self, kind: str, *, captured: bool) -> Calls:
        engine = self._engines[static_part(kind, self._capacity)]
        context = engine.context(0, self._scratch.address, self._scratch.nbytes, self._stream, captured=captured)
        sizes = (engine.largest("input_ids")[1], engine.largest("logit_positions")[1], engine.largest("image_features")[0])
        return Calls(context, *sizes)

    def short(self, ids: int) -> Calls:
        return self.prefill

    def engines(self) -> dict[str, LoadedEngine]:
        return self._engines

    def release(self) -> None:
        self._capacity = 0
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.context.close()
        while self._decode:
            self._decode.popitem()[1].context.close()
        while self._engines:
            self._engines.popitem()[1].close()
