"""The Grafana board on a real Prometheus, set up as `examples/grafana/README.md` says: after some questions every query has a figure."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.server import metrics
from tests.browser.conftest import free_port
from tests.docs.pages import ROOT, blocks, read
from tests.support.serving import DEMO, Served, ask, image, serving, text

pytestmark = pytest.mark.clients
BOARD = ROOT / "examples" / "grafana" / "fastvlm-edge.json"


class Sensor:
    """7.5 W since the server started."""

    name = "VDD_IN"

    def read_watts(self) -> float:
        return 7.5

    def read_joules(self) -> float:
        return 7.5 * time.monotonic()

    def read_temperature(self) -> None:
        return None

    def read_throttled(self) -> bool:
        return False


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Served]:
    """A server with a key, on a board with a power sensor and a thermal zone."""
    zone = tmp_path / "sys" / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("48500\n")
    monkeypatch.setattr(metrics, "find_sensor", lambda **_: Sensor())
    monkeypatch.setattr(metrics, "Probe", lambda: Probe(tmp_path))
    with FastVLM.load(DEMO / "model", "ort") as vlm, serving(vlm, api_keys=("secret",)) as running:
        yield running


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer."""
        with urllib.request.urlopen(f"{self._base}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def figures(self, query: str) -> list[float]:
        """What a query gives now."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def wait_for(self, query: str) -> None:
        """Until a query is true."""
        deadline = time.monotonic() + 60
        while not self._has(query):
            assert time.monotonic() < deadline, query
            time.sleep(0.1)

    def _has(self, query: str) -> bool:
        try:
            return bool(self.figures(query))
        except OSError:  # it still starts
            return False


@contextmanager
def prometheus(folder: Path, address: str) -> Iterator[Prometheus]:
    """Prometheus with the guide's configuration, which reads `address` every second, and also itself, as Debian's configuration does."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed; apt-get install prometheus, or put its program into the PATH")
    port = free_port()
    (guide,) = [block.text for block in blocks(read("examples/grafana/README.md")) if block.language == "yaml"]
    for given, here in (("KEY", "secret"), ("board.local:8000", address), ("scrape_interval: 5s", "scrape_interval: 1s")):
        assert given in guide
        guide = guide.replace(given, here)
    itself = f"  - job_name: prometheus\n    scrape_interval: 1s\n    static_configs:\n      - targets: ['127.0.0.1:{port}']\n"
    config, log = folder / "prometheus.yml", folder / "log"
    config.write_text(f"{guide}\n{itself}", encoding="utf-8")
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_every_query_of_the_board_has_a_figure(served: Served, tmp_path: Path) -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    question = ask(image(DEMO / "meter.jpg"), text("What number is shown?"))
    key = {"authorization": "Bearer secret"}
    with prometheus(tmp_path, f"127.0.0.1:{served.port}") as database:
        database.wait_for("count(process_resident_memory_bytes) == 2")
        for more in ({}, {}, {"structured_outputs": {"choice": ["A long answer, all of which is known in advance."]}}):
            assert served.post({**question, **more}, **key).status == 200
        assert served.post({}, **key).status == 400
        database.wait_for('rate(fastvlm_edge:requests_rejected_total{status="400"}[5m]) > 0')
        chosen = {"__rate_interval": "5m"}
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = re.findall(r"[\w:]+", variable["query"]["query"].removeprefix("label_values"))
                chosen[variable["name"]] = "|".join(database.get(f"label/{label}/values", **{"match[]": metric}))  # all of them
        assert chosen["model"] == "fastvlm-demo" and chosen["instance"] == f"127.0.0.1:{served.port}"
        for panel in board["panels"]:
            for target in panel["targets"]:
                query = re.sub(r"\$(\w+)", lambda name: chosen[name[1]], target["expr"])
                figures = database.figures(query)
                assert figures and all(map(math.isfinite, figures)), (panel["title"], query, figures)
                if "process_resident" in query:
                    server = 'process_resident_memory_bytes{job="fastvlm-edge"}'
                    assert database.figures(f"{query} == on () {server}"), "without Prometheus' own"
