"""The engine: the only user of a backend. It answers many requests at once, as many as there are slots.

Callers hand in `Work`, from any thread. A thread of the engine, which lives while there is any, takes turns: a chunk of the prefill of
one request, then one decode step of all that are generating. So no running answer waits longer than one chunk. Requests begin in the order
of their arrival; one for which there is no slot or no memory waits, and so do those behind it. Slots that generate are the first ones,
0 to n-1, so that one call decodes them all; the one in prefill is next to them.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastvlm_edge.backends.kv_cache import next_capacity
from fastvlm_edge.backends.protocol import Backend, StepOutput
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.draft import StepCosts
from fastvlm_edge.generation.images import EncodedImage
from fastvlm_edge.generation.slots import Slots
from fastvlm_edge.machine.memory import read_memory
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.manifest import DecoderSpec


@dataclass(frozen=True)
class Part:
    """A call of prefill."""

    ids: Sequence[int]
    logit_positions: Sequence[int] | None
    want_logits: bool
    last: bool
    """Whether its output is for `Work.push`."""


class Work(ABC):
    """What a caller wants from the model. The engine's thread calls the methods; `cancel` may be called from any thread."""

    wants_logits = False
    """Whether `push` needs the logits of all tokens."""

    def __init__(self, ids: Sequence[int], images: tuple[EncodedImage, ...], *, positions: int, most_kept: int) -> None:
        """`positions` is how many it needs in the cache at most, `most_kept` how many of the first `ids` need not be computed again."""
        self.ids, self.images = list(ids), images
        self.features = tuple(image.image_features for image in images)
        self.positions, self.most_kept = positions, most_kept
        self.kept = 0
        """How many of the first `ids` were in the cache already."""
        self.token_ids: list[int] = []
        """Ids of the reply so far, without the one that ended it."""
        self.next_id: int | None = None
        """The id that the next decode step appends."""
        self.cancelled = False
        self.error: BaseException | None = None

    def cancel(self) -> None:
        """Stop before the next chunk or step."""
        self.cancelled = True

    def begin(self, kept: int) -> None:
        """It has a slot, which holds the first `kept` of its ids."""
        self.kept = kept

    @abstractmethod
    def part(self, at: int) -> Part:
        """The next call of prefill, after `at` positions."""

    @abstractmethod
    def push(self, output: StepOutput, row: int) -> int | None:
        """Take one row of an output. Returns the id to append, or None at the end."""

    def draft(self, costs: StepCosts) -> list[int]:
        """Ids that may follow `next_id`, to be verified in the same step."""
        return []

    @abstractmethod
    def end(self) -> None:
        """Nothing more comes: it is finished, cancelled, or has an `error`."""


LINGER = 1.0
"""Seconds that the engine's thread waits for more work before it ends. Starting one takes as long as a step of a small model."""


@dataclass(frozen=True)
class Counters:
    """What an engine has done since the model was loaded."""

    requests: int = 0
    """Requests that got a slot."""
    prompt_tokens: int = 0
    """Positions of their conversations before the reply."""
    cached_tokens: int = 0
    """How many of them were in the cache already."""
    new_tokens: int = 0
    """Tokens of replies."""
    images: int = 0
    """Pictures that were asked about and not encoded by the caller before, once for each size that was tried."""
    cached_images: int = 0
    """How many of them were in the cache of pictures."""
    drafted_tokens: int = 0
    """Tokens that were guessed and verified."""
    accepted_tokens: int = 0
    """How many of them were right."""
    running: int = 0
    """Requests that have a slot now."""
    waiting: int = 0
    """Requests that wait for one."""
    saved_bytes: int = 0
    """Memory of conversations that are kept outside the slots."""
    cache_usage: float = 0.0
    """The part of `cache_memory` that running requests may need and kept conversations take, 0 to 1."""
    image_bytes: int = 0
    """Memory of the encoded pictures that are kept."""

    def since(self, first: Counters) -> Counters:
        """What was counted after `first`. What is now, as `running` and the memory, stays."""
        return replace(self, **{name: getattr(self, name) - getattr(first, name) for name in _COUNTED})


_COUNTED = ("requests", "prompt_tokens", "cached_tokens", "new_tokens", "images", "cached_images", "drafted_tokens", "accepted_tokens")
"""Fields of Counters that only grow."""


class Engine:
    """Runs all work on one backend."""

    def __init__(self, backend: Backend, spec: DecoderSpec, *, cache_memory: int | None = None) -> None:
        """Take the backend over. `cache_memory` bounds the keys and values of all conversations in bytes.

        None means those of full slots, but at most a quarter of the memory that is available, and at least one whole context.
        Raises FastVLMError if it is too small for one context.
        """
        self.backend = backend
        self._slots = Slots(backend, vocab=spec.vocab)
        least = next_capacity(spec.context) * backend.position_bytes
        if cache_memory is None:
            cache_memory = max(least, min(backend.slots * least, read_memory(Probe()).available // 4))
        if cache_memory < least:
            what = f"cache_memory is {cache_memory:,} bytes, but one conversation of {spec.context} positions takes {least:,}"
            raise FastVLMError(what, "give more, or convert with a smaller --context")
        self._cache_memory = cache_memory
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: deque[Work] = deque()
        self._running: list[Work] = []  # slot i generates for the i-th
        self._prefilling: Work | None = None  # in the slot after them
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process = os.getpid()
        self._counters = Counters()
        self._costs = StepCosts()

    def submit(self, work: Work) -> None:
        """Hand in work. Raises FastVLMError if the engine is closed, or belongs to another process."""
        self.check_open()
        with self._lock:
            if self._closed:
                raise was_closed()
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fastvlm-engine", daemon=True)
                self._thread.start()
            else:
                self._wake.notify()

    def check_open(self) -> None:
        """Raise FastVLMError if the engine cannot be used."""
        if self._closed:
            raise was_closed()
        if os.getpid() != self._process:
            what = "this model was loaded before the process forked, and the threads that run it do not exist here"
            raise FastVLMError(what, "load it in the process that uses it, or start processes with spawn")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def counters(self) -> Counters:
        """What was done so far."""
        with self._lock:
            running = len(self._running) + (self._prefilling is not None)
            saved = self._slots.saved_bytes
            usage = min(1.0, (self._needed(self._prefilling) + saved) / self._cache_memory)
            return replace(self._counters, running=running, waiting=len(self._waiting), saved_bytes=saved, cache_usage=usage)

    def running(self) -> list[Work]:
        """The work that is generating now."""
        return list(self._running)

    def count(self, **more: int) -> None:
        """Add to counters."""
        with self._lock:
            self._counters = replace(self._counters, **{name: getattr(self._counters, name) + value for name, value in more.items()})

    def close(self) -> None:
        """End all work with an error, and close the backend. May be called twice, and from any thread."""
        if os.getpid() != self._process:  # nothing here may touch what the other process uses
            self._closed = True
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._slots.clear()
        self.backend.close()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    self._end_all(was_closed())
                    for work in self._waiting:
                        work.error = was_closed()
                        work.end()
                    self._waiting.clear()
                    self._thread = None
                    return
                self._drop_cancelled_waiting()
                if not (self._waiting or self._running or self._prefilling):
                    self._wake.wait(LINGER)
                    if self._waiting or self._closed:  # also if they came just after the time was over
                        continue
                    self._thread = None
                    return
            try:
                self._turn()
            except BaseException as error:  # in the bookkeeping, or where a slot is copied: what the slots hold is not known
                with self._lock:
                    self._end_all(error)
                self._slots.forget_all()

    def _end_all(self, error: BaseException) -> None:
        """End everything that has a slot with an error."""
        for work in (*self._running, self._prefilling):
            if work is not None:
                work.error = work.error or error
                work.end()
        self._running, self._prefilling = [], None

    def _drop_cancelled_waiting(self) -> None:
        for work in [work for work in self._waiting if work.cancelled]:
            self._waiting.remove(work)
            work.end()

    def _turn(self) -> None:
        for work in [work for work in (*self._running, self._prefilling) if work is not None and work.cancelled]:
            self._leave(work)
        if self._prefilling is None:
            self._admit()
        if self._prefilling is not None:
            self._prefill(self._prefilling)
        if self._running:
            self._decode()

    def _admit(self) -> None:
        """Give the slot after the running ones to the work that has waited longest, if there is a slot and memory."""
        with self._lock:
            if not self._waiting or len(self._running) >= self.backend.slots or not self._fits(self._waiting[0]):
                return
            work = self._prefilling = self._waiting.popleft()
        try:
            kept = self._slots.take(
                len(self._running), work.ids, work.images, most=work.most_kept, saved_bytes=self._cache_memory - self._needed(work)
            )
        except BaseException as error:
            self._fail(work, error)
            return
        work.begin(kept)
        self.count(requests=1, prompt_tokens=len(work.ids), cached_tokens=kept)

    def _needed(self, work: Work | None = None) -> int:
        """Memory that the slots may take before the running work and this one are finished."""
        together = [*self._running, *([work] if work else [])]
        capacity = next_capacity(max((each.positions for each in together), default=1))
        return len(together) * capacity * self.backend.position_bytes

    def _fits(self, work: Work) -> bool:
        return not self._running or self._needed(work) <= self._cache_memory

    def _prefill(self, work: Work) -> None:
        slot = len(self._running)
        part = work.part(self._slots.length(slot))
        try:
            output = self.backend.step(
                part.ids, work.features, slot=slot, logit_positions=part.logit_positions, want_logits=part.want_logits
            )
            self._slots.append(slot, part.ids)
            if not part.last:
                return
            work.next_id = work.push(output, 0)
        except BaseException as error:
            self._fail(work, error)
            return
        if work.next_id is None:
            self._leave(work)
        else:
            self._prefilling = None
            self._running.append(work)

    def _decode(self) -> None:
        """One step of all running work."""
        running = list(self._running)
        ids = [self._next_id(work) for work in running]
        if len(running) == 1 and self._verify(running[0]):
            return
        began = time.perf_counter()
        try:
            output = self.backend.decode(ids, want_logits=any(work.wants_logits for work in running))
        except BaseException as error:
            if len(running) == 1:
                self._fail(running[0], error)
            else:
                self._decode_one_by_one(running)
            return
        if len(ids) == 1:
            self._costs.add(1, time.perf_counter() - began)
        for slot, token_id in enumerate(ids):
            self._slots.append(slot, [token_id])
        for row, work in enumerate(running):
            self._push(work, output, row)

    def _verify(self, work: Work) -> bool:
        """One step of the only running work, with the id that it appends and a draft of those after it. False if there is no draft."""
        try:
            ids = [self._next_id(work), *work.draft(self._costs)]
            if len(ids) == 1:
                return False
            start, began = self._slots.length(0), time.perf_counter()
            output = self.backend.step(ids, slot=0, logit_positions=range(len(ids)), want_logits=work.wants_logits)
            self._costs.add(len(ids), time.perf_counter() - began)
            self._slots.append(0, ids)
            for row in range(len(ids)):
                work.next_id = work.push(output, row)
                if row + 1 == len(ids) or work.next_id != ids[row + 1]:
                    break
            self._slots.truncate(0, start + row + 1)
        except BaseException as error:
            self._fail(work, error)
            return True
        self.count(drafted_tokens=len(ids) - 1, accepted_tokens=row)
        if work.next_id is None:
            self._leave(work)
        return True

    def _decode_one_by_one(self, running: list[Work]) -> None:
        """After a step that failed for all, so that only those end for which it is to blame."""
        self._slots.recover()
        for work in running:
            slot, token_id = self._running.index(work), self._next_id(work)
            try:
                output = self.backend.step([token_id], slot=slot, want_logits=work.wants_logits)
            except BaseException as error:
                self._fail(work, error)
            else:
                self._slots.append(slot, [token_id])
                self._push(work, output, 0)

    def _push(self, work: Work, output: StepOutput, row: int) -> None:
        try:
            work.next_id = work.push(output, row)
        except BaseException as error:
            self._fail(work, error)
            return
        if work.next_id is None:
            self._leave(work)

    @staticmethod
    def _next_id(work: Work) -> int:
        assert work.next_id is not None
        return work.next_id

    def _fail(self, work: Work, error: BaseException) -> None:
        work.error = error
        self._slots.recover()
        self._leave(work)

    def _leave(self, work: Work) -> None:
        """Free the slot of work that is finished, and close the gap. What it holds is kept where it is, or saved if its slot is needed."""
        if work is self._prefilling:
            self._prefilling = None
        else:
            slot = self._running.index(work)
            last = len(self._running) - 1
            follows = self._prefilling is not None
            if slot < last or follows:
                self._slots.save(slot, self._cache_memory - self._needed())
            if slot < last:
                self._slots.move(last, slot)
                self._running[slot] = self._running[last]
            del self._running[last]
            if follows:
                self._slots.move(last + 1, last)
        self.count(new_tokens=len(work.token_ids))
        work.end()


def was_closed() -> FastVLMError:
    """The error for every use after `close`."""
    return FastVLMError("this model was closed", "load it again with FastVLM.load")
