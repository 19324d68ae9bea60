"""The summary of a batch: counts, speeds, and the energy of several recordings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm_edge.batch import summary as module
from fastvlm_edge.batch.summary import Summary
from fastvlm_edge.machine.power import JetsonSensor, NoSensor, find_sensor


def add(summary: Summary, answers: int) -> None:
    for number in range(answers):
        summary.add({"id": str(number), "text": "x", "timings": {"new_tokens": 5}})


def test_counts_and_speeds() -> None:
    summary = Summary()
    with summary.measuring(NoSensor("no sensor here")):
        add(summary, 3)
        summary.add({"id": "e", "error": {"kind": "missing", "message": "gone"}})
        summary.done_before += 7
        for number in range(8):
            summary.add_twice(f"t{number}")
    found = summary.to_json()
    json.dumps(found)
    assert (found["rows"], found["answers"], found["errors"], found["done_before"], found["tokens"]) == (4, 3, {"missing": 1}, 7, 15)
    assert found["duplicate_ids"] == {"count": 8, "first": ["t0", "t1", "t2", "t3", "t4"]}
    assert found["joules"] is None and found["no_joules_because"] == "no sensor here"
    lines = "\n".join(summary.lines())
    assert "3 answers in 0:00" in lines and "1 error: 1 missing" in lines and "7 rows done before" in lines
    assert "8 rows left out" in lines and "t4, ..." in lines and " J" not in lines


def test_nothing_was_done() -> None:
    assert Summary().to_json()["pictures_per_second"] == 0
    assert Summary().lines()[0].startswith("0 answers in 0:00")


@pytest.fixture
def rail(tmp_path: Path) -> Path:
    """The power monitor of a Jetson that always reads 5 V and 2 A."""
    folder = tmp_path / "sys/class/hwmon/hwmon0"
    folder.mkdir(parents=True)
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "2000"}.items():
        (folder / name).write_text(f"{text}\n")
    return tmp_path


def test_the_energy_of_a_long_batch_is_the_sum_of_short_recordings(rail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL", 0.0)  # a new recording for each row
    sensor = find_sensor(rail)
    assert isinstance(sensor, JetsonSensor)
    summary = Summary()
    with summary.measuring(sensor):
        add(summary, 20)
    assert summary.to_json()["joules"] == pytest.approx(10 * summary.seconds, rel=0.2, abs=0.06)
    assert summary.to_json()["no_joules_because"] is None


def test_a_sensor_that_is_lost_gives_no_energy_rather_than_a_part(rail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL", 0.0)
    summary = Summary()
    with summary.measuring(find_sensor(rail)):
        add(summary, 2)
        (rail / "sys/class/hwmon/hwmon0/curr1_input").unlink()
        add(summary, 2)
    found = summary.to_json()
    assert found["joules"] is None and "stopped answering" in str(found["no_joules_because"])
