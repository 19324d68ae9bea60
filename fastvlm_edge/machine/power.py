"""Power, energy and heat of an interval of work, from what tegrastats reads on a Jetson, or from NVML on a card of its own.

Standard library only; NVML comes through nvidia-ml-py where that is installed. `run` and `bench` share it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

SAMPLE_SECONDS = 0.05
"""Of the recorder. An INA3221 takes about half a millisecond a register over its I2C bus, so this costs a board little."""
TEMPERATURE_EVERY = 10
"""Samples between two looks at temperature and throttling, which change slowly and cost a call to the board's firmware each."""
COUNTER_SECONDS = 1.0
"""Shortest interval whose energy is taken from a card's counter: how long the steps are in which it moves, NVIDIA does not document."""
LOST_AFTER = 5
"""Failed readings in a row after which the sensor counts as gone."""

TOTALS = ("VDD_IN", "VIN")
"""Rails that carry everything: the module (Orin Nano and Orin NX), the board with its carrier (Thor, INA238)."""
SUMS = (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"))
"""Rails that make up the module where none carries everything: AGX Orin, and Thor on a carrier without an INA238.

AGX Orin's VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and must not be added. Source: Jetson Linux Developer Guide r36.4.3 and r38.4,
"Platform Power and Performance", tables of the power monitors.
"""

NVML_THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""Clock event reasons that lower clocks against the user's will: power cap, hardware slowdown, thermal (software, hardware), power brake.

Source: nvml.h, nvmlClocksEventReason*.
"""
_NVML_POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT: watts now; nvmlDeviceGetPowerUsage is a mean of the last second on Ampere and newer (nvml.h)."""
_NVML_GPU_TEMPERATURE = 0


class Sensor(Protocol):
    """A source of power figures. Every `read_*` but the first gives None for what the sensor does not tell."""

    name: str
    """Rails, or the name of the card."""

    def read_watts(self) -> float:
        """Watts now. Raises OSError where the sensor is gone."""

    def read_joules(self) -> float | None:
        """A counter of joules that only rises. Raises OSError where the sensor is gone."""

    def read_temperature(self) -> float | None:
        """The hottest spot in degrees Celsius."""

    def read_throttled(self) -> bool | None:
        """Whether clocks are lowered for heat or current now, or were at any time since the previous call."""


@dataclass(frozen=True)
class NoSensor:
    """There is nothing to read, and why."""

    reason: str


@dataclass(frozen=True)
class PowerFigures:
    """Of one interval."""

    sensor: str
    """Which rails or card."""
    mean_w: float
    peak_w: float
    energy_j: float
    """The integral of power over the interval, all that the rails feed included, idle power too."""
    seconds: float
    temperature_c: float | None
    """The hottest that was seen."""
    throttled: bool | None
    """Whether heat or current lowered clocks at any time; None where the sensor does not tell."""


@dataclass(frozen=True)
class _Rail:
    label: str
    microwatts: Path | None
    millivolts: Path
    milliamperes: Path

    def read_watts(self) -> float:
        if self.microwatts is not None:
            return _number(self.microwatts) / 1e6
        return _number(self.millivolts) * _number(self.milliamperes) / 1e6


class JetsonSensor:
    """The INA3221 and INA238 power monitors, thermal zones, cooling devices and over-current counters, as Linux shows them."""

    def __init__(self, rails: list[_Rail], root: Path) -> None:
        """`rails` are added up."""
        self._rails = rails
        self.name = " + ".join(rail.label for rail in rails)
        self._zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
        coolers = sorted((root / "sys/class/thermal").glob("cooling_device*/type"))
        # Not the fan, and not devfreq and cpufreq: those stand above 0 whenever a clock is below its maximum.
        self._alerts = [path.with_name("cur_state") for path in coolers if _text(path).endswith("-alert")]
        self._counters = sorted((root / "sys/class/hwmon").glob("*/oc*_event_cnt"))
        self._events = self._count_events()

    def read_watts(self) -> float:
        """Sum of the rails. Raises OSError where one is gone."""
        return sum(rail.read_watts() for rail in self._rails)

    def read_joules(self) -> None:
        """These monitors have no counter."""

    def read_temperature(self) -> float | None:
        """The hottest zone. A zone of a part that is switched off fails to read, or reads 0 or -256."""
        millidegrees = [value for path in self._zones if (value := _number_or_none(path)) is not None and value > 0]
        return max(millidegrees) / 1000 if millidegrees else None

    def read_throttled(self) -> bool | None:
        """Whether a zone's throttle alert is on, or the SoC counted an over-current event since the previous call."""
        states = [value for path in self._alerts if (value := _number_or_none(path)) is not None]
        before, self._events = self._events, self._count_events()
        if not states and not self._events:
            return None
        return any(state > 0 for state in states) or any(count > before.get(path, count) for path, count in self._events.items())

    def _count_events(self) -> dict[Path, float]:
        return {path: value for path in self._counters if (value := _number_or_none(path)) is not None}


class NvmlSensor:
    """A card, through nvidia-ml-py."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        """`nvml` is the module `pynvml`, initialised; `handle` is of the device."""
        self._nvml = nvml
        self._handle = handle
        name = nvml.nvmlDeviceGetName(handle)
        self.name: str = name.decode() if isinstance(name, bytes) else name

    def read_watts(self) -> float:
        """Of the card. Raises OSError where NVML does not tell."""
        try:
            value = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_NVML_POWER_INSTANT])[0]
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1000
        except self._nvml.NVMLError:
            pass
        return float(self._ask("nvmlDeviceGetPowerUsage")) / 1000

    def read_joules(self) -> float | None:
        """The card's own counter, Volta and newer."""
        try:
            return float(self._ask("nvmlDeviceGetTotalEnergyConsumption")) / 1000
        except OSError:
            return None

    def read_temperature(self) -> float | None:
        """Of the GPU."""
        try:
            return float(self._ask("nvmlDeviceGetTemperature", _NVML_GPU_TEMPERATURE))
        except OSError:
            return None

    def read_throttled(self) -> bool | None:
        """As the driver says at this moment."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):  # before CUDA 12.2
            try:
                return bool(self._ask(name) & NVML_THROTTLED)
            except OSError:
                continue
        return None

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError) as error:
            raise OSError(str(error)) from None


def find_sensor(
    root: Path = Path("/"), *, card: bool = True, load_nvml: Callable[[], Any] = lambda: import_module("pynvml")
) -> Sensor | NoSensor:
    """The best sensor of this machine: a Jetson's power monitors under `root`, then NVML.

    `card`: whether the work runs on a card of its own. Where it runs on the CPU, the card's figures would be of something else.
    """
    rails = _find_rails(root)
    for label in TOTALS:
        if label in rails:
            return JetsonSensor([rails[label]], root)
    for labels in SUMS:
        if all(label in rails for label in labels):
            return JetsonSensor([rails[label] for label in labels], root)
    if not card:
        return NoSensor("no INA3221 or INA238 in /sys; NVML reads a card, and the work runs on the CPU")
    return _find_card(load_nvml)


class PowerRecorder:
    """Samples a sensor in a daemon thread while its `with` block runs; may be entered again for another interval."""

    def __init__(self, sensor: Sensor | NoSensor | None = None, *, interval: float = SAMPLE_SECONDS) -> None:
        """`sensor`: None looks for one at the first interval. `interval` is in seconds."""
        self._sensor = sensor
        self._interval = interval
        self._figures: PowerFigures | NoSensor = NoSensor("nothing was measured")
        self._recording: _Recording | None = None

    def __enter__(self) -> PowerRecorder:
        if self._sensor is None:
            self._sensor = find_sensor()
        if not isinstance(self._sensor, NoSensor):
            self._recording = _Recording(self._sensor, self._interval)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(self._sensor, NoSensor):
            self._figures = self._sensor
        elif self._recording is not None:
            self._figures = self._recording.finish()
            self._recording = None

    def figures(self) -> PowerFigures | NoSensor:
        """Of the interval that ended last."""
        return self._figures


class _Recording:
    """One interval. Both ends are sampled by the caller's thread, so that even the shortest interval has an integral."""

    def __init__(self, sensor: Sensor, interval: float) -> None:
        self._sensor = sensor
        self._interval = interval
        self._times: list[float] = []
        self._watts: list[float] = []
        self._temperatures: list[float] = []
        self._throttled: list[bool] = []
        self._failures = 0
        self._error = ""
        self._stop = threading.Event()
        sensor.read_throttled()  # events before this interval are not its own
        self._joules = self._read_joules()
        self._sample(heat=True)
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def finish(self) -> PowerFigures | NoSensor:
        self._stop.set()
        self._thread.join()
        if self._failures < LOST_AFTER:
            self._sample(heat=True)
        joules = self._read_joules()
        if self._failures or len(self._times) < 2:  # the last reading failed: the end of the interval was not seen
            return NoSensor(f"{self._sensor.name} stopped answering: {self._error}")
        seconds = self._times[-1] - self._times[0]
        energy = _integrate(self._times, self._watts)
        if joules is not None and self._joules is not None and seconds >= COUNTER_SECONDS:
            energy = joules - self._joules
        return PowerFigures(
            sensor=self._sensor.name,
            mean_w=energy / seconds if seconds > 0 else self._watts[-1],
            peak_w=max(self._watts),
            energy_j=energy,
            seconds=seconds,
            temperature_c=max(self._temperatures, default=None),
            throttled=any(self._throttled) if self._throttled else None,
        )

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._interval):
            count += 1
            self._sample(heat=count % TEMPERATURE_EVERY == 0)
            if self._failures >= LOST_AFTER:
                return

    def _sample(self, *, heat: bool) -> None:
        try:
            watts = self._sensor.read_watts()
        except (OSError, ValueError) as error:
            self._failures += 1
            self._error = " ".join(str(error).split())
            return
        self._failures = 0
        self._times.append(time.monotonic())
        self._watts.append(watts)
        if not heat:
            return
        temperature = self._sensor.read_temperature()
        if temperature is not None:
            self._temperatures.append(temperature)
        throttled = self._sensor.read_throttled()
        if throttled is not None:
            self._throttled.append(throttled)

    def _read_joules(self) -> float | None:
        try:
            return self._sensor.read_joules()
        except OSError:
            return None


def power_json(figures: PowerFigures | NoSensor, tokens: int) -> dict[str, Any]:
    """The `power` object of `run --json`; `joules_per_token` is the energy of the whole answer by its tokens."""
    if isinstance(figures, NoSensor):
        return {"sensor": None, "reason": figures.reason}
    return {
        "sensor": figures.sensor,
        "mean_w": round(figures.mean_w, 3),
        "peak_w": round(figures.peak_w, 3),
        "energy_j": round(figures.energy_j, 4),
        "joules_per_token": round(figures.energy_j / tokens, 4) if tokens else None,
        "temperature_c": figures.temperature_c,
        "throttled": figures.throttled,
    }


def _find_rails(root: Path) -> dict[str, _Rail]:
    """Label -> rail of every INA3221 and INA238. The labels are the board's device tree's."""
    rails = {}
    folders = [*(root / "sys/class/hwmon").glob("hwmon*"), *(root / "sys/bus/i2c/drivers").glob("ina*/*/hwmon/hwmon*")]
    for folder in folders:
        chip = _text(folder / "name")
        if chip == "ina238":  # its one channel has a label on some kernels only
            label = _text(folder / "in1_label") or "VIN"
            rails[label] = _Rail(label, folder / "power1_input", folder / "in1_input", folder / "curr1_input")
        if chip != "ina3221":
            continue
        for channel in (1, 2, 3):
            label = _text(folder / f"in{channel}_label")
            if label and label != "NC":
                rails[label] = _Rail(label, None, folder / f"in{channel}_input", folder / f"curr{channel}_input")
    return rails


def _find_card(load_nvml: Callable[[], Any]) -> Sensor | NoSensor:
    try:
        nvml = load_nvml()
    except ImportError:
        return NoSensor("no INA3221 or INA238 in /sys, and nvidia-ml-py, which reads an NVIDIA card, is not installed")
    try:
        nvml.nvmlInit()
        sensor = NvmlSensor(nvml, _first_visible(nvml))
        sensor.read_watts()
    except (nvml.NVMLError, OSError) as error:
        return NoSensor(f"no INA3221 or INA238 in /sys, and NVML has no power figures: {error}")
    return sensor


def _first_visible(nvml: Any) -> Any:
    """The card that CUDA calls 0, as far as CUDA_VISIBLE_DEVICES tells; otherwise the first by PCI bus."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _integrate(times: list[float], values: list[float]) -> float:
    """By the trapezoidal rule."""
    pairs = zip(times, times[1:], values, values[1:], strict=False)
    return sum((end - start) * (before + after) / 2 for start, end, before, after in pairs)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))


def _number_or_none(path: Path) -> float | None:
    try:
        return _number(path)
    except (OSError, ValueError):
        return None
