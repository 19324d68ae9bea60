"""`examples/meter_reader/read_meter.py` as a user runs it, with the server and the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
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
