"""`examples/meter_reader/read_meter.py` as a user runs it, with the server and the demo model."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from tests.docs.pages import blocks, read
from tests.support.serving import DEMO, Served, serving

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "meter_reader" / "read_meter.py"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with FastVLM.load(DEMO / "model", "ort") as vlm, serving(vlm, api_keys=("secret",)) as running:
        yield running


def run(*arguments: str | Path, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTVLM_EDGE_API_KEY": key}
    return subprocess.run([sys.executable, "-I", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_it_prints_the_number(served: Served) -> None:
    done = run(f"http://127.0.0.1:{served.port}/", DEMO / "meter.jpg", key="secret")
    assert (done.returncode, done.stdout) == (0, "17\n"), done.stderr


def test_faults_are_one_line(served: Served, tmp_path: Path) -> None:
    for server, picture, said in (
        (f"http://127.0.0.1:{served.port}", DEMO / "meter.jpg", "401"),
        (f"http://127.0.0.1:{served.port}", tmp_path / "none.jpg", "none.jpg"),
        ("http://127.0.0.1:9", DEMO / "meter.jpg", "refused"),
    ):
        done = run(server, picture, key="wrong")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert run().stderr == "usage: read_meter.py SERVER PICTURE\n"


def test_the_command_that_the_guide_gives_home_assistant(served: Served) -> None:
    """The sensor reads the picture that the automation saves, and its command, run as Home Assistant runs it, prints the number."""
    yaml = pytest.importorskip("yaml")
    (guide,) = [yaml.safe_load(block.text) for block in blocks(read("docs/meter_reader.md")) if block.language == "yaml"]
    assert set(guide) == {"command_line", "automation water_meter"}, "a plain `automation` would replace those made in the interface"
    sensor, (automation,) = guide["command_line"][0]["sensor"], guide["automation water_meter"]
    snapshot, update = automation["actions"]
    picture = snapshot["data"]["filename"]
    assert picture.startswith("/media/"), "elsewhere Home Assistant writes no pictures, or shows them to everybody"
    assert update["data"]["entity_id"] == "sensor." + sensor["name"].lower().replace(" ", "_")
    here = {"a-long-secret": "secret", "http://BOARD:8000": f"http://127.0.0.1:{served.port}", picture: str(DEMO / "meter.jpg")}
    here |= {"python3": shlex.quote(sys.executable), "/config/read_meter.py": str(SCRIPT)}
    command = sensor["command"]
    for given, instead in here.items():
        assert given in command
        command = command.replace(given, instead)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "17\n"), done.stderr
