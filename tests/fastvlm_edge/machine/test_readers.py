"""Heat, processor, memory and cache directory, each read in one place for all that ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm_edge.doctor.facts import read_facts
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.machine.description import describe
from fastvlm_edge.machine.heat import HeatSensors, read_heat
from fastvlm_edge.machine.memory import read_memory, total_bytes
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.machine.processor import read_cpuinfo
from fastvlm_edge.machine.state import read_state
from tests.support.boards import lay_out, probe_of
from tests.support.boards.computers import cpu_box
from tests.support.boards.jetsons import orin_nano, thor


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "/home/user/.cache/fastvlm-edge"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fastvlm-edge"),
        ({"XDG_CACHE_HOME": "/xdg", "FASTVLM_EDGE_CACHE": "/ours"}, "/ours"),
        ({"FASTVLM_EDGE_CACHE": ""}, "/home/user/.cache/fastvlm-edge"),
    ],
)
def test_the_cache_directory_follows_the_environment(environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir(environ, Path("/home/user")) == Probe(environ=environ, home=Path("/home/user")).cache() == Path(expected)
    for name in ("XDG_CACHE_HOME", "FASTVLM_EDGE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/user", **environ}.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize("make", [orin_nano, thor, cpu_box])
def test_doctor_and_bench_see_the_same_processor_and_heat(make: object, tmp_path: Path) -> None:
    assert callable(make)
    facts = read_facts(probe_of(make(), tmp_path))
    assert describe(root=tmp_path)["instructions"] == sorted(facts.processor.flags)
    assert read_state(tmp_path).get("temperature_c", {}) == {zone: round(value, 1) for zone, value in facts.heat.zones.items()}


def test_clocks_and_flags_are_those_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "model name\t: X\ncpu MHz\t\t: 2100.5\nflags\t\t: fpu sve avx2\n\ncpu MHz\t\t: 1800.0\ncpu MHz : ?\n"
    )
    info = read_cpuinfo(Probe(tmp_path))
    assert (info.name, info.flags, info.mhz) == ("X", ["avx2", "sve"], [2100.5, 1800.0])
    assert read_state(tmp_path)["cpu_mhz"] == [2100, 1800]


def test_memory_of_this_machine_is_the_same_from_both_sources() -> None:
    assert read_memory(Probe()).total == pytest.approx(total_bytes(), rel=1e-3)


def test_heat_sensors_are_found_once_and_read_again(tmp_path: Path) -> None:
    root = lay_out(orin_nano(), tmp_path)
    sensors = HeatSensors(Probe(root))
    before = sensors.zones()
    (zone,) = (path for path in root.glob("sys/class/thermal/thermal_zone*/type") if path.read_text().strip() == "tj-thermal")
    (zone.parent / "temp").write_text("91000\n")
    assert before["tj-thermal"] < 91
    assert sensors.zones()["tj-thermal"] == 91.0 == read_heat(Probe(root)).zones["tj-thermal"]
    assert sensors.alerts() and not any(on for _, on in sensors.alerts())
