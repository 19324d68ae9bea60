"""Power figures: which rails are read, that the energy is the integral of power, and what a missing or vanishing sensor says."""

from __future__ import annotations

import builtins
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_edge.cli import main
from fastvlm_edge.commands import run
from fastvlm_edge.machine import power
from fastvlm_edge.machine.power import (
    LOST_AFTER,
    JetsonSensor,
    NoSensor,
    NvmlSensor,
    PowerFigures,
    PowerRecorder,
    _integrate,
    find_sensor,
    power_json,
)
from tests.support.boards import lay_out
from tests.support.boards.jetsons import agx_orin, orin_nano, thor


class NVMLError(Exception):
    """As in nvidia-ml-py."""


class Clock:
    """Stands in for `time` where figures are checked exactly: time passes only when `now` is raised, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(power, "time", made)
    return made


class FakeNvml:
    """The calls of nvidia-ml-py that are used; a call in `refused` raises what the driver's refusal raises."""

    NVMLError = NVMLError

    def __init__(
        self, *, watts: float = 120.0, reasons: int = 0, instant: bool = True, refused: tuple[str, ...] = (), clock: Clock | None = None
    ) -> None:
        self.watts, self.reasons, self.instant, self.refused = watts, reasons, instant, refused
        self.counted = watts
        self.clock = clock
        self.asked: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "refused"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        """Ready."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA GeForce RTX 4070"

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        assert fields == [186]
        return [SimpleNamespace(nvmlReturn=0 if self.instant else 3, value=SimpleNamespace(uiVal=int(self.watts * 1000)))]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if self.watts < 0:
            raise NVMLError("Not Supported")
        return int(self.watts * 1000) + 1000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return int((self.clock or time).monotonic() * self.counted * 1000)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == 0
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons


class Ramp:
    """Power that rises by 20 W a second: the trapezoidal rule is exact on it. With a `clock`, 10 to 30 ms pass before each reading."""

    name = "ramp"

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock
        self.read_at: list[float] = []

    def read_watts(self) -> float:
        if self.clock is not None:
            self.clock.now += 0.01 * (1 + len(self.read_at) % 3)
        self.read_at.append((self.clock or time).monotonic())
        return self._power(self.read_at[-1])

    def expected(self) -> float:
        first, last = self.read_at[0], self.read_at[-1]
        return (self._power(first) + self._power(last)) / 2 * (last - first)

    def _power(self, when: float) -> float:
        return 5 + 20 * (when - self.read_at[0])

    def read_joules(self) -> float | None:
        return None

    def read_temperature(self) -> float | None:
        return 40.0

    def read_throttled(self) -> bool | None:
        return None


def no_nvml() -> Any:
    raise ModuleNotFoundError("No module named 'pynvml'")


def measured(recorder: PowerRecorder, seconds: float = 0.15) -> PowerFigures | NoSensor:
    with recorder:
        time.sleep(seconds)
    return recorder.figures()


def test_the_trapezoidal_rule_gives_the_energy_of_a_sine() -> None:
    times = [0.05 * step for step in range(81)]
    watts = [20 + 8 * math.sin(2 * math.pi * when / 1.6) for when in times]
    assert _integrate(times, watts) == pytest.approx(20 * 4 + 8 * 1.6 / (2 * math.pi) * (1 - math.cos(2 * math.pi * 4 / 1.6)), rel=1e-3)


def test_energy_is_the_integral_of_a_known_curve(clock: Clock) -> None:
    ramp = Ramp(clock)
    figures = measured(PowerRecorder(ramp, interval=0.01), 0.3)
    assert isinstance(figures, PowerFigures)
    assert figures.energy_j == pytest.approx(ramp.expected(), rel=1e-9)
    assert figures.seconds == pytest.approx(ramp.read_at[-1] - ramp.read_at[0], rel=1e-9)
    assert figures.mean_w == pytest.approx(figures.energy_j / figures.seconds) and figures.peak_w > figures.mean_w > 5
    assert len(ramp.read_at) > 5 and figures.temperature_c == 40 and figures.throttled is None


def test_an_interval_shorter_than_a_sample_has_figures_too(clock: Clock) -> None:
    ramp = Ramp(clock)
    figures = measured(PowerRecorder(ramp, interval=10), 0.01)
    assert isinstance(figures, PowerFigures) and len(ramp.read_at) == 2
    assert figures.energy_j == pytest.approx(ramp.expected(), rel=1e-9)


def test_a_recorder_measures_one_interval_after_another_and_leaves_no_thread() -> None:
    recorder = PowerRecorder(Ramp(), interval=0.01)
    first, second = measured(recorder, 0.05), measured(recorder, 0.1)
    assert isinstance(first, PowerFigures) and isinstance(second, PowerFigures)
    assert first.seconds >= 0.05 and second.seconds >= 0.1 and second.mean_w > first.mean_w
    assert not any(thread.name == "power" for thread in threading.enumerate())


def test_figures_before_any_interval() -> None:
    assert PowerRecorder(Ramp()).figures() == NoSensor("nothing was measured")


def test_the_rail_of_an_orin_nano_is_the_whole_module(tmp_path: Path) -> None:
    sensor = find_sensor(lay_out(orin_nano(), tmp_path), load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor) and sensor.name == "VDD_IN"
    assert sensor.read_watts() == pytest.approx(5.016 * 2.4) and sensor.read_joules() is None
    assert sensor.read_temperature() == 52.3  # tj; cv0 is off and reads nothing
    assert sensor.read_throttled() is False


def test_an_agx_orin_is_the_sum_of_its_rails_without_the_one_that_another_feeds(tmp_path: Path) -> None:
    sensor = find_sensor(lay_out(agx_orin(), tmp_path), load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor) and sensor.name == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert sensor.read_watts() == pytest.approx(20.0 * 0.25 + 20.0 * 0.06 + 5.0 * 0.84)


def test_thor_is_its_input_and_without_that_monitor_the_sum_of_its_rails(tmp_path: Path) -> None:
    root = lay_out(thor(), tmp_path)
    sensor = find_sensor(root, load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor) and sensor.name == "VIN" and sensor.read_watts() == pytest.approx(23.4)
    for folder in (root / "sys/class/hwmon").iterdir():
        if (folder / "name").read_text().strip() == "ina238":
            (folder / "name").write_text("tmp451\n")
    sensor = find_sensor(root, load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor) and sensor.name == "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0"
    assert sensor.read_watts() == pytest.approx(-0.392 + 6.5 + 6.5)  # the GPU's rail reads a little under 0 at rest


def test_an_over_current_event_within_the_interval_is_throttling_and_one_before_is_not(tmp_path: Path) -> None:
    root = lay_out(orin_nano(), tmp_path)
    counter = next((root / "sys/class/hwmon").glob("*/oc3_event_cnt"))
    sensor = find_sensor(root, load_nvml=no_nvml)
    counter.write_text("37\n")
    figures = measured(PowerRecorder(sensor, interval=0.01), 0.05)
    assert isinstance(figures, PowerFigures) and figures.throttled is False
    recorder = PowerRecorder(sensor, interval=0.01)
    with recorder:
        counter.write_text("38\n")
    figures = recorder.figures()
    assert isinstance(figures, PowerFigures) and figures.throttled is True


def test_a_cooling_device_at_work_is_throttling_and_the_fan_is_not(tmp_path: Path) -> None:
    root = lay_out(orin_nano(), tmp_path)
    sensor = find_sensor(root, load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor)
    kinds = {path.read_text().strip(): path.with_name("cur_state") for path in (root / "sys/class/thermal").glob("cooling_device*/type")}
    kinds["pwm-fan"].write_text("3\n")
    assert sensor.read_throttled() is False
    kinds["gpu-throttle-alert"].write_text("1\n")
    assert sensor.read_throttled() is True


def test_a_sensor_that_vanishes_midway_gives_no_figure_of_half_an_interval(tmp_path: Path) -> None:
    root = lay_out(orin_nano(), tmp_path)
    recorder = PowerRecorder(find_sensor(root, load_nvml=no_nvml), interval=0.005)
    with recorder:
        time.sleep(0.02)
        for path in (root / "sys/class/hwmon").glob("*/curr1_input"):
            path.unlink()
        time.sleep(0.005 * LOST_AFTER * 4)
    figures = recorder.figures()
    assert isinstance(figures, NoSensor) and figures.reason.startswith("VDD_IN stopped answering: ") and "curr1_input" in figures.reason
    assert isinstance(measured(recorder, 0.01), NoSensor)


def test_nvml_reads_watts_temperature_throttling_and_the_energy_counter() -> None:
    nvml = FakeNvml(watts=120, reasons=0x20)
    sensor = find_sensor(Path("/nowhere"), load_nvml=lambda: nvml)
    assert isinstance(sensor, NvmlSensor) and sensor.name == "NVIDIA GeForce RTX 4070" and sensor.read_watts() == 120
    figures = measured(PowerRecorder(sensor, interval=0.01), 0.2)
    assert isinstance(figures, PowerFigures)
    assert figures.energy_j == pytest.approx(120 * figures.seconds)
    assert figures.temperature_c == 61 and figures.throttled is True and figures.peak_w == 120


def test_a_long_interval_has_the_energy_of_the_card_s_own_counter_and_a_short_one_does_not(clock: Clock) -> None:
    nvml = FakeNvml(watts=120, clock=clock)
    nvml.counted = 100  # what the samples missed
    recorder = PowerRecorder(NvmlSensor(nvml, "card"), interval=0.01)
    for seconds, watts in ((0.9, 120), (1.1, 100)):
        with recorder:
            clock.now += seconds
        figures = recorder.figures()
        assert isinstance(figures, PowerFigures)
        assert figures.mean_w == pytest.approx(watts) and figures.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("reasons", "throttled"), [(0x0, False), (0x1, False), (0x2, False), (0x10, False), (0x4, True), (0x40, True)])
def test_an_idle_card_or_a_user_s_own_limit_is_no_throttling(reasons: int, throttled: bool) -> None:
    assert NvmlSensor(FakeNvml(reasons=reasons), "card").read_throttled() is throttled


def test_an_old_card_or_driver_gives_what_it_has() -> None:
    nvml = FakeNvml(instant=False, refused=("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTotalEnergyConsumption"), reasons=0x8)
    sensor = NvmlSensor(nvml, "card")
    assert sensor.read_watts() == 121 and sensor.read_joules() is None and sensor.read_throttled() is True
    nothing = NvmlSensor(
        FakeNvml(refused=("nvmlDeviceGetTemperature", *(f"nvmlDeviceGetCurrentClocks{n}Reasons" for n in ("Event", "Throttle")))), ""
    )
    assert nothing.read_temperature() is None and nothing.read_throttled() is None


def test_the_card_is_the_one_that_cuda_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, asked in (("", 0), ("2,0", 2), ("GPU-1234", "GPU-1234")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvml = FakeNvml()
        find_sensor(Path("/nowhere"), load_nvml=lambda nvml=nvml: nvml)  # type: ignore[misc]
        assert nvml.asked == [asked]


def test_without_a_sensor_it_says_why() -> None:
    nowhere = Path("/nowhere")
    for found, reason in (
        (find_sensor(nowhere, load_nvml=no_nvml), "nvidia-ml-py, which reads an NVIDIA card, is not installed"),
        (find_sensor(nowhere, load_nvml=lambda: FakeNvml(watts=-1, instant=False)), "NVML has no power figures: Not Supported"),
        (find_sensor(nowhere, card=False, load_nvml=FakeNvml), "the work runs on the CPU"),
    ):
        assert isinstance(found, NoSensor) and reason in found.reason
        figures = measured(PowerRecorder(found), 0)
        assert figures == found and power_json(figures, 5) == {"sensor": None, "reason": found.reason}


def test_joules_per_token_is_the_energy_of_the_answer_by_its_tokens() -> None:
    figures = PowerFigures("VDD_IN", 10.0, 14.5, 4.0, 0.4, 52.3, False)
    assert power_json(figures, 16)["joules_per_token"] == 0.25
    assert power_json(figures, 0)["joules_per_token"] is None
    assert set(power_json(figures, 16)) == {
        *("sensor", "mean_w", "peak_w", "energy_j", "joules_per_token", "temperature_c", "throttled"),
    }


def test_run_reports_power_where_there_is_a_sensor(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sensor = find_sensor(lay_out(orin_nano(), tmp_path), load_nvml=no_nvml)
    asked: list[bool] = []

    def found(*, card: bool) -> Any:
        asked.append(card)
        return sensor

    monkeypatch.setattr(run, "find_sensor", found)
    arguments = ["run", str(model_dir), "--prompt", "Hello.", "--max-new-tokens", "8", "--threads", "1"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    power = document["power"]
    assert power["sensor"] == "VDD_IN" and power["temperature_c"] == 52.3 and power["throttled"] is False
    assert power["mean_w"] == pytest.approx(12.038, abs=0.01) and power["energy_j"] > 0
    assert power["joules_per_token"] == pytest.approx(power["energy_j"] / document["timings"]["new_tokens"], abs=1e-4)
    assert main(arguments) == 0
    assert "; ort, fp32, 12.0 W]" in capsys.readouterr().err
    assert asked == [False, False]  # the work runs on the CPU


def test_run_says_that_there_is_no_sensor(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "find_sensor", lambda *, card: find_sensor(Path("/nowhere"), card=card))
    arguments = ["run", str(model_dir), "--prompt", "Hello.", "--max-new-tokens", "4", "--threads", "1"]
    assert main([*arguments, "--json"]) == 0
    power = json.loads(capsys.readouterr().out)["power"]
    assert power["sensor"] is None and "no INA3221 or INA238" in power["reason"]
    assert main(arguments) == 0
    assert "; ort, fp32]" in capsys.readouterr().err


def test_the_thread_ends_when_the_answer_fails(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_sensor", lambda *, card: Ramp())
    monkeypatch.setattr(builtins, "print", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        run.main([str(model_dir), "--prompt", "Hello.", "--max-new-tokens", "4", "--threads", "1"])
    assert not any(thread.name == "power" for thread in threading.enumerate())


def test_a_second_of_recording_costs_little_time_of_the_processor(tmp_path: Path) -> None:
    sensor = find_sensor(lay_out(orin_nano(), tmp_path), load_nvml=no_nvml)
    assert isinstance(sensor, JetsonSensor)
    began = time.thread_time()
    for _ in range(20):  # as often as in one second
        sensor.read_watts()
    assert time.thread_time() - began < 0.05
