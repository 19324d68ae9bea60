"""GET /metrics: valid Prometheus text with vLLM's names, whose figures are those of the model and of the machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from skimage import data
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fastvlm_edge import AsyncFastVLM, FastVLM
from fastvlm_edge.machine.power import NoSensor
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.server import metrics
from fastvlm_edge.server.metrics import Metrics
from fastvlm_edge.server.settings import Settings
from tests.fastvlm_edge.server.serving import PROMPT, picture_url, serving

BOARD = Path(__file__).resolve().parents[3] / "examples" / "grafana" / "fastvlm-edge.json"
VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "request_prompt_tokens",
    "request_generation_tokens",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
]


class Meter:
    """A sensor of 7.5 W, with a counter or without."""

    name = "VDD_IN"

    def __init__(self, joules: list[float] | None = None) -> None:
        self.joules, self.works = joules, True

    def read_watts(self) -> float:
        if not self.works:
            raise OSError
        return 7.5

    def read_joules(self) -> float | None:
        return None if self.joules is None else self.joules.pop(0)

    def read_temperature(self) -> float | None:
        return 61.0

    def read_throttled(self) -> bool | None:
        return True


@pytest.fixture
def vlm(model_dir: Path) -> Iterator[FastVLM]:
    with FastVLM.load(model_dir, "ort", threads=1, slots=2) as vlm:
        yield vlm


def made(vlm: FastVLM, *, sensor: Any = None, root: Path | None = None, **settings: Any) -> Metrics:
    chosen = Settings(**{"model_name": "demo", **settings})
    return Metrics(AsyncFastVLM(vlm), chosen, sensor=sensor or NoSensor("none"), probe=Probe(root or Path("/nowhere")))


def values(metrics: Metrics) -> dict[str, float]:
    """`name{labels without model_name}` -> value."""
    return parsed(metrics.render().decode())


def parsed(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            if not sample.name.startswith(("process_", "python_")):
                assert sample.labels["model_name"] == "demo", sample
            shown = ",".join(f"{name}={value}" for name, value in labels.items())
            found[sample.name + (f"{{{shown}}}" if shown else "")] = sample.value
    return found


def test_the_figures_of_a_request(vlm: FastVLM) -> None:
    metrics = made(vlm)
    metrics.queued()
    assert values(metrics)["fastvlm_edge:num_requests_waiting"] == 1
    metrics.started()
    assert values(metrics)["fastvlm_edge:num_requests_waiting"] == 0
    metrics.queued()
    metrics.started()
    assert values(metrics)["fastvlm_edge:num_requests_running"] == 2
    for _ in range(2):
        reply = vlm.generate("What does the meter read?", data.coffee(), max_new_tokens=5)
        metrics.first_token(0.3)
        metrics.token_gap(0.02)
        metrics.finished(reply.stop_reason, reply, 1.5, 0.25)
    found = values(metrics)
    assert found["fastvlm_edge:num_requests_running"] == found["fastvlm_edge:num_requests_waiting"] == 0
    timings = reply.timings
    assert timings.cached_tokens > 0
    assert found["fastvlm_edge:prompt_tokens_total"] == found["fastvlm_edge:prefix_cache_queries_total"] == 2 * timings.prompt_tokens
    assert found["fastvlm_edge:prefix_cache_hits_total"] == timings.cached_tokens
    assert found["fastvlm_edge:generation_tokens_total"] == 2 * timings.new_tokens == found["fastvlm_edge:request_generation_tokens_sum"]
    assert (found["fastvlm_edge:image_cache_queries_total"], found["fastvlm_edge:image_cache_hits_total"]) == (2, 1)
    assert found["fastvlm_edge:image_cache_bytes"] == vlm._images.nbytes > 0
    assert found["fastvlm_edge:request_success_total{finished_reason=length}"] == 2
    assert found["fastvlm_edge:time_to_first_token_seconds_bucket{le=0.5}"] == 2
    assert found["fastvlm_edge:time_to_first_token_seconds_bucket{le=0.25}"] == 0
    assert found["fastvlm_edge:inter_token_latency_seconds_sum"] == pytest.approx(0.04)
    assert found["fastvlm_edge:e2e_request_latency_seconds_sum"] == 3
    assert found["fastvlm_edge:request_queue_time_seconds_sum"] == 0.5
    assert found["fastvlm_edge:request_decode_time_seconds_count"] == 2
    assert 0 <= found["fastvlm_edge:kv_cache_usage_perc"] <= 1


def test_pictures_that_were_encoded(vlm: FastVLM) -> None:
    metrics = made(vlm)
    metrics.pictures(0.02, 0.5)
    metrics.pictures(0.01, 0.0)
    found = values(metrics)
    assert (found["fastvlm_edge:vision_seconds_count"], found["fastvlm_edge:vision_seconds_sum"]) == (1, 0.5)
    assert (found["fastvlm_edge:preprocess_seconds_count"], found["fastvlm_edge:preprocess_seconds_sum"]) == (1, 0.02)


def test_how_requests_end(vlm: FastVLM) -> None:
    metrics = made(vlm)
    assert values(metrics)["fastvlm_edge:requests_rejected_total{status=429}"] == 0, "there from the start, so that its first rise is seen"
    for reason in ("stop", "context", "cancelled", "error", "unheard of"):
        metrics.finished(reason, None, 1.0, 0.0)
    metrics.rejected(429)
    found = values(metrics)
    by = {
        reason: found[f"fastvlm_edge:request_success_total{{finished_reason={reason}}}"] for reason in ("stop", "length", "abort", "error")
    }
    assert by == {"stop": 1, "length": 1, "abort": 1, "error": 2}
    assert found["fastvlm_edge:requests_rejected_total{status=429}"] == 1
    assert found["fastvlm_edge:e2e_request_latency_seconds_count"] == 0, "only of whole replies"


def test_running_requests_take_cache(vlm: FastVLM) -> None:
    metrics = made(vlm)
    stream = vlm.stream("Count.", max_new_tokens=1900)
    next(stream)
    found = values(metrics)
    stream.close()
    assert 0 < found["fastvlm_edge:kv_cache_usage_perc"] <= 1


@pytest.mark.parametrize("alias", [None, "vllm"])
def test_every_name_of_vllm(vlm: FastVLM, alias: str | None) -> None:
    prefix = alias or "fastvlm_edge"
    names = {re.sub(r"_bucket|\{.*", "", name) for name in values(made(vlm, metrics_alias=alias))}
    assert {f"{prefix}:{name}" for name in VLLM} <= names
    assert {name.partition(":")[0] for name in names if ":" in name} == {prefix}
    assert not any(name.endswith("_created") for name in names)


def test_power_by_a_counter(vlm: FastVLM) -> None:
    metrics = made(vlm, sensor=Meter([1000.0, 1012.5]))
    found = values(metrics)
    assert found["fastvlm_edge:joules_total"] == 12.5
    assert found["fastvlm_edge:power_watts"] == 7.5
    assert found["fastvlm_edge:throttled"] == 1
    assert found["fastvlm_edge:temperature_celsius{zone=gpu}"] == 61


def test_power_without_a_counter(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "POWER_SECONDS", 0.01)
    meter = Meter()
    began = time.monotonic()
    measured = made(vlm, sensor=meter)
    time.sleep(0.3)
    joules = values(measured)["fastvlm_edge:joules_total"]
    assert 0 < joules <= 7.5 * (time.monotonic() - began)
    meter.works = False
    assert "fastvlm_edge:power_watts" not in values(measured)
    meter.works = True
    time.sleep(0.1)
    assert values(measured)["fastvlm_edge:joules_total"] > joules, "the thread survives a sensor that fails for a while"
    measured.close()


def test_what_cannot_be_read_is_left_out(vlm: FastVLM) -> None:
    names = set(values(made(vlm)))
    assert not any(word in name for name in names for word in ("joules", "watts", "throttled", "celsius"))


def test_temperatures_by_zone(vlm: FastVLM, tmp_path: Path) -> None:
    for number, (kind, temp) in enumerate([("cpu-thermal", "45500"), ("tj-thermal", "50000")]):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind)
        (zone / "temp").write_text(temp)
    found = values(made(vlm, root=tmp_path))
    assert found["fastvlm_edge:temperature_celsius{zone=cpu-thermal}"] == 45.5
    assert found["fastvlm_edge:temperature_celsius{zone=tj-thermal}"] == 50


def test_the_route(vlm: FastVLM) -> None:
    answer = TestClient(Starlette(routes=metrics.routes(made(vlm)))).get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "fastvlm_edge:num_requests_running" in answer.text


def test_served_requests_are_counted(vlm: FastVLM) -> None:
    picture = {"type": "image_url", "image_url": {"url": picture_url()}}
    body = {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": PROMPT}]}], "max_tokens": 4}
    with serving(vlm) as client:
        for more in ({}, {"stream": True}):
            assert client.post("/v1/chat/completions", json={**body, **more}).status_code == 200
        assert client.post("/v1/responses", json={"input": PROMPT, "max_output_tokens": 4}).status_code == 200
        assert client.post("/v1/responses", json={}).status_code == 400
        found = parsed(client.get("/metrics").text)
    assert found["fastvlm_edge:vision_seconds_count"] == 1, "the picture was known the second time"
    assert (found["fastvlm_edge:image_cache_queries_total"], found["fastvlm_edge:image_cache_hits_total"]) == (2, 1)
    assert found["fastvlm_edge:generation_tokens_total"] == 12, "without those of the first run"
    assert found["fastvlm_edge:prompt_tokens_total"] == found["fastvlm_edge:request_prompt_tokens_sum"]
    assert found["fastvlm_edge:request_success_total{finished_reason=length}"] == 3
    assert found["fastvlm_edge:request_generation_tokens_sum"] == 12
    assert found["fastvlm_edge:time_to_first_token_seconds_count"] == found["fastvlm_edge:request_queue_time_seconds_count"] == 3
    assert 0 < found["fastvlm_edge:inter_token_latency_seconds_count"] <= 9
    assert found["fastvlm_edge:requests_rejected_total{status=400}"] == 1
    assert (found["fastvlm_edge:num_requests_running"], found["fastvlm_edge:num_requests_waiting"]) == (0, 0)


def test_every_metric_of_the_grafana_board_exists(vlm: FastVLM, tmp_path: Path) -> None:
    measured = made(vlm, sensor=Meter([0.0, 1.0]))
    measured.rejected(429)
    found = values(measured)
    names = {name.partition("{")[0] for name in found}
    labels = {label for name in found for label in re.findall(r"(\w+)=", name)} | {"model_name", "instance"}
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(targets) > 30
    for expression in [*targets, *(query["query"]["query"] for query in board["templating"]["list"] if query["type"] == "query")]:
        used = set(re.findall(r"(?:fastvlm_edge:|process_)\w+", expression))
        assert used, expression
        assert used <= names, expression
        assert {label for pair in re.findall(r"by \((\w+)\)|(\w+)=~", expression) for label in pair if label} <= labels, expression
        assert expression.count("(") == expression.count(")")
