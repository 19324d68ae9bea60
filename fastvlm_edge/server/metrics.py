"""GET /metrics: figures for Prometheus, under the names of vLLM with our prefix, so that its dashboards need one replacement.

Histograms and counts of requests are filled by the handlers. All others are read when they are asked for: from the counters of the
model, from the power sensor and from the thermal zones of the machine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.engine import Counters
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.machine.heat import HeatSensors
from fastvlm_edge.machine.power import JetsonSensor, NoSensor, Sensor, find_sensor
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.server.settings import Settings

PREFIX = "fastvlm_edge"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
POWER_SECONDS = 1.0
"""Between two readings of a sensor that has no counter of energy."""
FINISHED = {"stop": "stop", "length": "length", "context": "length", "cancelled": "abort", "error": "error"}
"""How a request ended -> vLLM's name for it."""
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
"""HTTP statuses of refusals. All are shown from the start: Prometheus does not see the rise of a counter that was not there before."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_GAPS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


class Metrics:
    """The figures of one server. Of each reply, `queued`, `started` and `finished` are called once, in this order."""

    def __init__(
        self, vlm: AsyncFastVLM, settings: Settings, *, sensor: Sensor | NoSensor | None = None, probe: Probe | None = None
    ) -> None:
        """Without a `sensor` the best of this machine is taken. `probe` is where thermal zones are read."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series for each, which nobody asked for
        self._vlm = vlm.vlm
        self._prefix = settings.metrics_alias or PREFIX
        self._labels = {"model_name": settings.model_name or vlm.vlm.manifest.name}
        self._registry = CollectorRegistry()
        self._first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", _SECONDS)
        self._token_gap = self._histogram("inter_token_latency_seconds", "Time between two pieces of a streamed reply.", _GAPS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to the end of its reply.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a slot.", _SECONDS)
        self._preprocess = self._histogram("preprocess_seconds", "Decoding and resizing the pictures of a request.", _GAPS)
        self._vision = self._histogram("vision_seconds", "Running the vision encoder for a request.", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "From the slot to the first token.", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last one.", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Positions of a conversation before the reply.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens of a reply.", _TOKENS)
        self._lock = threading.Lock()
        self.waiting = self.running = 0
        self.ended = Counter[str]()
        """By reason."""
        self.refused = Counter[int]()
        """By HTTP status."""
        self.sizes = Counter[int]()
        """Replies about pictures, by the size of those."""
        self._first = Counters()
        """Those of the model before the first request."""
        self._machine = _Machine(sensor, probe or Probe(), card=vlm.vlm.backend.name != "ort")
        self._registry.register(_Read(self))
        ProcessCollector(registry=self._registry)

    def begin(self) -> None:
        """The first run of the model, which nobody asked for, is over: its tokens do not count."""
        self._first = self._vlm.counters()

    def queued(self) -> None:
        """A reply was asked for."""
        with self._lock:
            self.waiting += 1

    def started(self) -> None:
        """It has a place, or its client went away before."""
        with self._lock:
            self.waiting -= 1
            self.running += 1

    def finished(self, reason: str, reply: Reply | None, seconds: float, queue_seconds: float) -> None:
        """It ended, `seconds` after the request came. `reason` is the stop reason of the reply, or `error`."""
        with self._lock:
            self.running -= 1
            self.ended[reason] += 1
        self._queue.observe(queue_seconds)
        if reply is None:
            return
        if reply.image_size is not None:
            with self._lock:
                self.sizes[reply.image_size] += 1
        timings = reply.timings
        self._whole.observe(seconds)
        self._prompt.observe(timings.prompt_tokens)
        self._generation.observe(timings.new_tokens)
        self._prefill.observe(timings.prefill_ms / 1e3)
        if timings.decode_tokens_per_second:
            self._decode.observe((timings.new_tokens - 1) / timings.decode_tokens_per_second)

    def pictures(self, preprocess_seconds: float, vision_seconds: float) -> None:
        """The pictures of a request were encoded. Nothing is counted where all were known."""
        if vision_seconds:
            self._preprocess.observe(preprocess_seconds)
            self._vision.observe(vision_seconds)

    def first_token(self, seconds: float) -> None:
        """The first text of a reply came, `seconds` after the request."""
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        """The next piece of a streamed reply came, `seconds` after the one before."""
        self._token_gap.observe(seconds)

    def rejected(self, status: int) -> None:
        """A request was refused with this HTTP status."""
        with self._lock:
            self.refused[status] += 1

    def render(self) -> bytes:
        """All figures in Prometheus' text format. It reads sensors, which may take milliseconds: call it in a thread."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Stop reading the power sensor."""
        self._machine.close()

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(f"{self._prefix}:{name}", what, list(self._labels), registry=self._registry, buckets=buckets)
        return whole.labels(**self._labels)

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for."""
        counters = self._vlm.counters().since(self._first)
        with self._lock:
            waiting, running, ended, refused = self.waiting, self.running, dict(self.ended), dict.fromkeys(REFUSALS, 0) | self.refused
            sizes = dict.fromkeys(self._vlm.manifest.vision.sizes, 0) | self.sizes
        finished = dict.fromkeys(FINISHED.values(), 0)
        for reason, number in ended.items():
            finished[FINISHED.get(reason, "error")] += number
        gauge, count = self._gauge, self._count
        yield gauge("num_requests_running", "Replies that are being generated, and those whose pictures are read.", running)
        yield gauge("num_requests_waiting", "Replies that wait for a place.", waiting)
        yield gauge("kv_cache_usage_perc", "Memory of keys and values in use; 1 is all that it may take.", counters.cache_usage)
        yield count("prefix_cache_queries", "Positions of conversations that were looked up in the cache.", counters.prompt_tokens)
        yield count("prefix_cache_hits", "How many of them were found.", counters.cached_tokens)
        yield count("prompt_tokens", "Positions of conversations before the replies.", counters.prompt_tokens)
        yield count("generation_tokens", "Tokens of replies.", counters.new_tokens)
        yield count("image_cache_queries", "Pictures that were looked up among the encoded ones.", counters.images)
        yield count("image_cache_hits", "How many of them were found.", counters.cached_images)
        yield gauge("image_cache_bytes", "Memory of the encoded pictures that are kept.", counters.image_bytes)
        yield count("spec_decode_num_draft_tokens", "Tokens that were guessed and verified.", counters.drafted_tokens)
        yield count("spec_decode_num_accepted_tokens", "How many of them were right.", counters.accepted_tokens)
        yield self._by("request_success", "Requests that ended, by how.", "finished_reason", finished)
        yield self._by("replies_by_image_size", "Replies about pictures, by the size at which the model saw them.", "image_size", sizes)
        yield self._by("requests_rejected", "Requests that were refused, by HTTP status.", "status", refused)
        watts, joules, throttled = self._machine.power()
        if watts is not None:
            yield gauge("power_watts", f"Power now: {self._machine.name}.", watts)
        if joules is not None:
            yield count("joules", f"Energy since the server started: {self._machine.name}.", joules)
        if throttled is not None:
            yield gauge("throttled", "1 if heat or current lowered the clocks since the last time this was read.", throttled)
        zones = GaugeMetricFamily(f"{self._prefix}:temperature_celsius", "Temperature by zone.", labels=["model_name", "zone"])
        for zone, celsius in self._machine.temperatures().items():
            zones.add_metric([self._labels["model_name"], zone], celsius)
        yield zones

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", what, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _count(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", what, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _by(self, name: str, what: str, label: str, values: Mapping[Any, int]) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", what, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), str(key)], value)
        return family


class _Read(Collector):
    """What the registry asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()

    def describe(self) -> list[Metric]:
        return []  # otherwise the registry would read all sensors to learn the names


class _Machine:
    """Power and heat. A sensor without a counter of energy is read every POWER_SECONDS, in a daemon thread."""

    def __init__(self, sensor: Sensor | NoSensor | None, probe: Probe, *, card: bool) -> None:
        self._sensor = find_sensor(card=card) if sensor is None else sensor
        self._heat = HeatSensors(probe)
        self._joules = 0.0
        self._stop = threading.Event()
        self._start = self._read_joules()
        if not isinstance(self._sensor, NoSensor) and self._start is None:
            threading.Thread(target=self._integrate, args=(self._sensor,), name="fastvlm-power", daemon=True).start()

    @property
    def name(self) -> str:
        """Of the sensor."""
        return self._sensor.reason if isinstance(self._sensor, NoSensor) else self._sensor.name

    def power(self) -> tuple[float | None, float | None, bool | None]:
        """Watts now, joules since the start, and whether clocks were lowered. None where it cannot be read."""
        if isinstance(self._sensor, NoSensor):
            return None, None, None
        watts = None
        with suppress(OSError, ValueError):
            watts = self._sensor.read_watts()
        joules = self._joules if self._start is None else self._read_joules()
        throttled = None
        with suppress(OSError, ValueError):
            throttled = self._sensor.read_throttled()
        return watts, joules if self._start is None or joules is None else joules - self._start, throttled

    def temperatures(self) -> dict[str, float]:
        """Degrees Celsius by zone; a graphics card is the zone `gpu`."""
        zones = self._heat.zones()
        if not isinstance(self._sensor, (NoSensor, JetsonSensor)) and (celsius := self._sensor.read_temperature()) is not None:
            zones["gpu"] = celsius
        return zones

    def close(self) -> None:
        self._stop.set()

    def _read_joules(self) -> float | None:
        with suppress(OSError, ValueError):
            return None if isinstance(self._sensor, NoSensor) else self._sensor.read_joules()
        return None

    def _integrate(self, sensor: Sensor) -> None:
        before, watts = time.monotonic(), None
        while True:
            now, last = time.monotonic(), watts
            with suppress(OSError, ValueError):
                watts = sensor.read_watts()
                if last is not None:
                    self._joules += (watts + last) / 2 * (now - before)
                before = now
            if self._stop.wait(POWER_SECONDS):
                return


def routes(metrics: Metrics) -> list[Route]:
    """GET /metrics."""

    async def render(request: Request) -> Response:
        return Response(await asyncio.to_thread(metrics.render), media_type=CONTENT_TYPE)

    return [Route("/metrics", render, methods=["GET"])]
