"""One process of a measurement: load, first question, then timed runs. docs/bench.md explains each figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm_edge.backends.kv_cache import next_capacity
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.bench.energy import Meter
from fastvlm_edge.bench.record import DECODE, EACH, TOGETHER, UNDER_LOAD
from fastvlm_edge.bench.timed_backend import TimedBackend
from fastvlm_edge.bench.workload import TEXT_TOKENS, WORDS, Pictures, question_near
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.images import EncodedImage
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.vlm import FastVLM, load_parts
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.peak_memory import DeviceMemory, peak_host_mib
from fastvlm_edge.model_dir.manifest import Manifest

DEPTHS = (512, 1024, 2048)
NEW_TOKENS = 65
"""The first comes from prefill, the others from 64 decode steps."""

Line = dict[str, Any]
"""`{"figure": name, "value": number}`, or `{"facts": {...}}`."""


@dataclass(frozen=True)
class Settings:
    """Options of a measurement, the same for every process."""

    backend: str = "auto"
    threads: int | None = None
    runs: int = 3
    """Timed runs per process, after one warm-up run."""
    text_tokens: int = TEXT_TOKENS
    new_tokens: int = NEW_TOKENS
    depths: tuple[int, ...] | None = None
    """Positions before a reply at which decoding is timed, besides those of the question itself. None means those of DEPTHS that fit."""
    image: str | None = None
    image_size: int | None = None
    """One of the sizes of the model, in pixels of a side. None is its default."""
    slots: tuple[int, ...] = ()
    """Numbers of conversations at once with which to measure, in ascending order."""


@dataclass(frozen=True)
class Plan:
    """What the settings mean for one model."""

    prompt_tokens: int
    """Positions of picture, question and template."""
    depths: tuple[int, ...]
    """In ascending order; the first is `prompt_tokens`."""


def plan_for(manifest: Manifest, tokenizer: TextTokenizer, settings: Settings) -> Plan:
    """Length of the question, and the depths at which decoding is timed. Raises FastVLMError if the context is too small for them."""
    vision = manifest.vision.at(settings.image_size or manifest.vision.image_size)
    length = length_of(manifest, tokenizer, vision.tokens)
    prompt = length(question_near(length, vision.tokens + settings.text_tokens))
    room = manifest.decoder.context - settings.new_tokens
    if prompt > room:
        raise FastVLMError(
            f"picture and question need {prompt} positions and the reply {settings.new_tokens}, more than the context of "
            f"{manifest.decoder.context}",
            "use fewer --new-tokens, or convert with a larger --context",
        )
    if settings.depths is None:
        return Plan(prompt, (prompt, *(depth for depth in DEPTHS if prompt < depth <= room)))
    for depth in settings.depths:
        if not prompt <= depth <= room:
            raise FastVLMError(
                f"decoding cannot be timed at {depth} positions: the question needs {prompt}, and the context of "
                f"{manifest.decoder.context} has room for {room} before a reply of {settings.new_tokens}",
                f"give --depths from {prompt} to {room}",
            )
    return Plan(prompt, tuple(sorted({prompt, *settings.depths})))


def length_of(manifest: Manifest, tokenizer: TextTokenizer, rows: int) -> Callable[[str], int]:
    """A function that returns the number of positions of a question with one picture of so many visual tokens."""
    template = ChatTemplate(tokenizer, manifest)
    return lambda prompt: len(template.opening()) + len(template.turn(prompt, (rows,)))


def measure(directory: Path, settings: Settings) -> Iterator[Line]:
    """Load a model directory and measure it. Yields every figure at once, so that none is lost if the measurement is stopped."""
    memory = _device_memory(settings.backend)
    began = time.perf_counter()
    manifest, tokenizer, backend = load_parts(
        directory,
        settings.backend,
        threads=settings.threads,
        slots=max(settings.slots, default=1),
        image_size=settings.image_size,
        tune_process=True,
    )
    yield _figure("load_ms", (time.perf_counter() - began) * 1e3)
    with closing(backend):
        yield {"facts": {"backend": backend.name, "runs_on": backend.description}}
        yield from measure_backend(backend, manifest, tokenizer, settings, memory)


def measure_backend(
    backend: Backend, manifest: Manifest, tokenizer: TextTokenizer, settings: Settings, memory: DeviceMemory | None = None
) -> Iterator[Line]:
    """Everything after the load. `memory` is only used if the backend computes on a GPU."""
    if backend.name == "ort":
        memory = None
    plan = plan_for(manifest, tokenizer, settings)
    subject = Subject(backend, manifest, tokenizer, settings, plan)
    yield from subject.first_question()
    for _ in subject.run(0):
        pass  # warm-up: buffers, clocks, the captured graph of a GPU
    for number in range(1, settings.runs + 1):
        yield from subject.run(number)
        if memory is not None:
            memory.look()
    yield _figure("peak_memory_mib", peak_host_mib())
    for depth in plan.depths[1:]:
        yield from subject.decode_at(depth, settings.runs)
    if len(plan.depths) > 1:
        yield _figure("peak_memory_deepest_mib", peak_host_mib())
    if memory is not None:
        yield _figure("peak_device_memory_mib", memory.look())
    if settings.slots:
        yield {"facts": {"slots": backend.slots}}
        for number in range(settings.runs + 1):
            yield from subject.known_pictures(number)
        for slots in settings.slots:
            if slots <= backend.slots:
                yield from subject.together(slots, settings.runs)
    yield {"facts": {"power": subject.meter.facts()}}


class Subject:
    """A loaded model that is measured. No token ends its replies, so every reply has the requested length."""

    def __init__(self, backend: Backend, manifest: Manifest, tokenizer: TextTokenizer, settings: Settings, plan: Plan) -> None:
        """The caller still has to close the backend."""
        self._timed = TimedBackend(backend)
        endless = replace(manifest, text=replace(manifest.text, stop_ids=[]))
        whole = next_capacity(manifest.decoder.context) * backend.position_bytes
        engine = Engine(self._timed, manifest.decoder, cache_memory=backend.slots * whole)  # so that no conversation waits for memory
        # Every figure is that of plain work; but a chat still goes on where it was.
        size = settings.image_size
        self._vlm = FastVLM(endless, tokenizer, engine, image_size=size, prefix_cache=False, image_cache=0, speculate=False)
        self._remembering = FastVLM(endless, tokenizer, engine, image_size=size, speculate=False)
        """The same model, as `FastVLM.load` gives it, but for guesses."""
        self._room = manifest.decoder.context - plan.prompt_tokens
        self._length = length_of(manifest, tokenizer, self._vlm.manifest.vision.at(self._vlm.fixed_size()).tokens)
        self._pictures = Pictures(None if settings.image is None else Path(settings.image))
        self._new_tokens = settings.new_tokens
        self._plan = plan
        self._kept: EncodedImage | None = None
        self.meter = Meter(card=backend.name != "ort")

    def first_question(self) -> Iterator[Line]:
        """Measure the first question after the load."""
        reply = self._vlm.generate(self._question(0), self._pictures.new(), max_new_tokens=1)
        yield _figure("ttft_first_question_ms", reply.timings.ttft_ms)

    def run(self, number: int) -> Iterator[Line]:
        """Measure a new picture, a picture whose features are kept, one whose keys and values are in the cache, and decoding."""
        if self._kept is None:
            self._kept = self._vlm.encode_image(self._pictures.new())
        picture = self._pictures.new()
        self._timed.step_seconds = 0.0
        with self.meter.interval() as energy:
            reply = self._vlm.generate(self._question(number), picture, max_new_tokens=1)
        timings = reply.timings
        yield _figure("ttft_cold_ms", timings.ttft_ms)
        yield _figure("preprocess_ms", timings.preprocess_ms)
        yield _figure("vision_ms", timings.vision_ms)
        yield from self._prefill(reply, "prefill_ms", "first_sample_ms")
        yield from _joules("joules_per_picture", energy.joules, 1)

        kept = self._vlm.generate(self._question(number), self._kept, max_new_tokens=1)
        yield _figure("ttft_features_ms", kept.timings.ttft_ms)

        chat = self._vlm.chat()
        self._timed.step_seconds = 0.0
        warm = chat.ask(self._question(number + 1), self._kept, max_new_tokens=1)  # other words, so that only the beginning is shared
        if warm.timings.prefilled_tokens > warm.timings.prompt_tokens - self._kept.rows:
            raise FastVLMError("the picture was not found in the KV cache, which is a bug in fastvlm-edge bench", "please report it")
        yield _figure("ttft_warm_ms", warm.timings.ttft_ms)
        yield from self._prefill(warm, "warm_prefill_ms", "warm_first_sample_ms")
        yield {"facts": {"warm_prefilled_tokens": warm.timings.prefilled_tokens}}

        yield from self.decode_at(self._plan.prompt_tokens, 1)

    def decode_at(self, depth: int, runs: int) -> Iterator[Line]:
        """Measure replies after `depth` positions that are already in the cache. The first reply is not timed."""
        prompt = question_near(self._length, depth)
        chat = self._vlm.chat()
        for number in range(runs + 1):
            chat.reset()
            with self.meter.interval() as energy:
                reply = chat.ask(prompt, self._kept, max_new_tokens=self._new_tokens)
            if number:
                yield _figure(f"{DECODE}@{reply.timings.prompt_tokens}", reply.timings.decode_tokens_per_second)
                if depth == self._plan.prompt_tokens:
                    yield from _joules("joules_per_token", energy.joules, self._new_tokens)

    def known_pictures(self, number: int) -> Iterator[Line]:
        """Measure a new conversation about a picture of an earlier one, and a second turn. The run with number 0 is not timed."""
        picture = self._pictures.new()
        chat = self._remembering.chat()
        chat.ask(self._question(0), picture, max_new_tokens=1)
        follow = chat.ask("b", max_new_tokens=1)
        repeated = self._remembering.generate(self._question(1), picture, max_new_tokens=1)
        if repeated.timings.cached_images != 1 or follow.timings.cached_tokens < self._plan.prompt_tokens:
            raise FastVLMError("the picture was not known any more, which is a bug in fastvlm-edge bench", "please report it")
        if number:
            yield _figure("ttft_repeated_picture_ms", repeated.timings.ttft_ms)
            yield _figure("ttft_follow_up_ms", follow.timings.ttft_ms)

    def together(self, slots: int, runs: int) -> Iterator[Line]:
        """Measure decoding with so many conversations at once, and a new picture while all but one are answered."""
        for number in range(runs + 1):
            with self._answers(slots):
                seconds = self._decode_together(slots)
            with self._answers(slots - 1):
                reply = self._vlm.generate(self._question(number), self._pictures.new(), max_new_tokens=1)
                if self._vlm.counters().running < slots - 1:
                    what = f"{slots - 1} answers of {self._room} tokens ended before the first token of another one"
                    raise FastVLMError(what, "convert with a larger --context, or leave out --slots")
            if number:
                speed = (self._new_tokens - 1) / seconds
                yield _figure(f"{TOGETHER}@{slots}", slots * speed)
                yield _figure(f"{EACH}@{slots}", speed)
                yield _figure(f"{UNDER_LOAD}@{slots}", reply.timings.ttft_ms)

    @contextmanager
    def _answers(self, count: int) -> Iterator[None]:
        """So many answers that are generated meanwhile, each as long as the context allows."""
        streams = [
            self._vlm.chat().stream(self._question(number), self._kept, max_new_tokens=self._room) for number in range(count)
        ]  # of chats, which share what they have in common
        try:
            for stream in streams:
                next(stream, None)
            yield
        finally:
            for stream in streams:
                stream.close()
            while self._vlm.counters().running:
                time.sleep(0.001)

    def _decode_together(self, slots: int) -> float:
        """Seconds that `new_tokens` - 1 steps of all take."""
        # Nobody reads meanwhile: a thread that wakes at every token of one answer costs one conversation more than eight.
        self._timed.decodes.clear()
        while True:
            running = self._vlm.counters().running
            ends = [end for rows, end in list(self._timed.decodes) if rows == slots]
            if len(ends) >= self._new_tokens:
                return ends[self._new_tokens - 1] - ends[0]
            if running < slots:
                what = f"{slots} conversations at once ended before they had {self._new_tokens} tokens"
                raise FastVLMError(what, "use fewer --new-tokens, or convert with a larger --context")
            time.sleep(0.01)

    def _question(self, number: int) -> str:
        return question_near(self._length, self._plan.prompt_tokens, WORDS[number % len(WORDS)])

    def _prefill(self, reply: Reply, decoder: str, sample: str) -> Iterator[Line]:
        """Split the time from the engine to the first token into that of the decoder and that of all else, most of it the sampler."""
        steps = self._timed.step_seconds * 1e3
        yield _figure(decoder, steps)
        yield _figure(sample, max(0.0, reply.timings.queue_ms + reply.timings.prefill_ms - steps))


def _figure(name: str, value: float) -> Line:
    return {"figure": name, "value": value}


def _joules(name: str, joules: float | None, pieces: int) -> Iterator[Line]:
    if joules is not None:
        yield _figure(name, joules / pieces)


def _device_memory(backend: str) -> DeviceMemory | None:
    """Starts from what is free on the GPU before anything is loaded. None without a GPU, or if it is not used."""
    if backend == "ort":
        return None
    from fastvlm_edge.nvidia.drivers import open_cuda

    try:
        return DeviceMemory(open_cuda().free_bytes)
    except FastVLMError:
        return None
