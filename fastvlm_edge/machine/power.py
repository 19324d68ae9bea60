"""Power, energy and heat of an interval of work: from the sensors that tegrastats reads on a Jetson, or from NVML on a graphics card.

Standard library only; NVML needs nvidia-ml-py. `run` and `bench` use it.
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

from fastvlm_edge.errors import one_line
from fastvlm_edge.machine.heat import HeatSensors
from fastvlm_edge.machine.probe import Probe

SAMPLE_SECONDS = 0.05
"""Interval between samples. Reading a register of an INA3221 over I2C takes about half a millisecond, so this costs a board little."""
TEMPERATURE_EVERY = 10
"""Samples between two readings of temperature and throttling. They change slowly, and each reading is a call to the board's firmware."""
COUNTER_SECONDS = 1.0
"""Shortest interval whose energy is taken from a card's counter. NVIDIA does not document how often the counter is updated."""
LOST_AFTER = 5
"""Failed readings in a row after which the sensor is given up."""

TOTALS = ("VDD_IN", "VIN")
"""Rails that carry all power: of the module (Orin Nano and Orin NX), or of module and carrier board (Thor, INA238)."""
SUMS = (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"))
"""Rails that together carry the power of the module, if no rail carries all of it: AGX Orin, and Thor on a carrier without an INA238.

AGX Orin's VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and must not be added. Source: Jetson Linux Developer Guide r36.4.3 and r38.4,
"Platform Power and Performance", tables of the power monitors.
"""

NVML_THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""Clock event reasons that count as throttling: power cap, hardware slowdown, thermal (software, hardware), power brake.

Source: nvml.h, nvmlClocksEventReason*.
"""
_NVML_POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT: watts now. On Ampere and newer nvmlDeviceGetPowerUsage is the mean of the last second (nvml.h)."""
_NVML_GPU_TEMPERATURE = 0


class Sensor(Protocol):
    """A source of power figures. Every `read_*` but the first returns None for what the sensor does not report."""

    name: str
    """Names of the rails, or name of the card."""

    def read_watts(self) -> float:
        """Watts now. Raises OSError if the sensor does not answer."""

    def read_joules(self) -> float | None:
        """A counter of joules that only rises. Raises OSError if the sensor does not answer."""

    def read_temperature(self) -> float | None:
        """Degrees Celsius of the hottest spot."""

    def read_throttled(self) -> bool | None:
        """Whether heat or current lowers the clocks now, or did at any time since the previous call."""


@dataclass(frozen=True)
class NoSensor:
    """There is no sensor, or it failed; `reason` says why."""

    reason: str


@dataclass(frozen=True)
class PowerFigures:
    """Figures of one interval."""

    sensor: str
    """Names of the rails, or name of the card."""
    mean_w: float
    peak_w: float
    energy_j: float
    """Integral of power over the interval. It includes idle power and everything else that the rails feed."""
    seconds: float
    temperature_c: float | None
    """Highest temperature that was read; None if the sensor does not report any."""
    throttled: bool | None
    """Whether heat or current lowered clocks at any time; None if the sensor does not report it."""


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
    """Power monitors INA3221 and INA238, thermal zones, throttle alerts and over-current counters of a Jetson."""

    def __init__(self, rails: list[_Rail], root: Path) -> None:
        """The power is the sum of `rails`; heat is read below `root`."""
        self._rails = rails
        self.name = " + ".join(rail.label for rail in rails)
        self._heat = HeatSensors(Probe(root))
        self._events = self._heat.over_current()

    def read_watts(self) -> float:
        """Sum of the rails. Raises OSError if one cannot be read."""
        return sum(rail.read_watts() for rail in self._rails)

    def read_joules(self) -> None:
        """None: these monitors have no energy counter."""

    def read_temperature(self) -> float | None:
        """Degrees Celsius of the hottest zone; None if no zone can be read."""
        return max(self._heat.zones().values(), default=None)

    def read_throttled(self) -> bool | None:
        """Whether a throttle alert is on, or the SoC counted an over-current event since the previous call."""
        alerts = self._heat.alerts()
        before, self._events = self._events, self._heat.over_current()
        if not alerts and not self._events:
            return None
        return any(on for _, on in alerts) or any(count > before.get(path, count) for path, count in self._events.items())


class NvmlSensor:
    """A graphics card, through nvidia-ml-py."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        """`nvml` is the module `pynvml`, initialised; `handle` is its handle of the card."""
        self._nvml = nvml
        self._handle = handle
        name = nvml.nvmlDeviceGetName(handle)
        self.name: str = name.decode() if isinstance(name, bytes) else name

    def read_watts(self) -> float:
        """Watts of the card. Raises OSError if NVML does not report them."""
        try:
            value = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_NVML_POWER_INSTANT])[0]
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1000
        except self._nvml.NVMLError:
            pass
        return float(self._ask("nvmlDeviceGetPowerUsage")) / 1000

    def read_joules(self) -> float | None:
        """Energy counter of the card; None before Volta."""
        try:
            return float(self._ask("nvmlDeviceGetTotalEnergyConsumption")) / 1000
        except OSError:
            return None

    def read_temperature(self) -> float | None:
        """Degrees Celsius of the GPU."""
        try:
            return float(self._ask("nvmlDeviceGetTemperature", _NVML_GPU_TEMPERATURE))
        except OSError:
            return None

    def read_throttled(self) -> bool | None:
        """Whether the driver throttles the card at this moment."""
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

    `card`: whether the work runs on a graphics card. If it runs on the CPU, figures of the card would not be about it.
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
        """Without a `sensor` it looks for one at the first interval. `interval` is the time between samples, in seconds."""
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
        """Figures of the interval that ended last."""
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
        sensor.read_throttled()  # events before this interval do not count
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
        if self._failures or len(self._times) < 2:  # the last reading failed, so the end of the interval is missing
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
    """The `power` object of `run --json`; `joules_per_token` is the energy of the whole answer, divided by its tokens."""
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
    """Label -> rail of every INA3221 and INA238. The labels come from the board's device tree."""
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
    except ModuleNotFoundError:
        return NoSensor("no INA3221 or INA238 in /sys, and nvidia-ml-py, which reads an NVIDIA card, is not installed")
    except Exception as error:  # a package that is broken may raise anything
        return NoSensor(f"no INA3221 or INA238 in /sys, and nvidia-ml-py, for NVIDIA cards, cannot be loaded ({one_line(error)})")
    try:
        nvml.nvmlInit()
        sensor = NvmlSensor(nvml, _first_visible(nvml))
        sensor.read_watts()
    except (nvml.NVMLError, OSError) as error:
        return NoSensor(f"no INA3221 or INA238 in /sys, and NVML has no power figures: {error}")
    return sensor


def _first_visible(nvml: Any) -> Any:
    """The card that CUDA calls 0, if CUDA_VISIBLE_DEVICES says which; otherwise the first by PCI bus."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _integrate(times: list[float], values: list[float]) -> float:
    """Integral of `values` over `times`, by the trapezoidal rule."""
    pairs = zip(times, times[1:], values, values[1:], strict=False)
    return sum((end - start) * (before + after) / 2 for start, end, before, after in pairs)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))
