"""Temperatures, throttle alerts and over-current counters, from /sys."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvlm_edge.machine.probe import Probe


@dataclass(frozen=True)
class Heat:
    """Thermal zones in degrees Celsius, what throttles now, and over-current events since the board started."""

    zones: dict[str, float] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    over_current: dict[str, int] = field(default_factory=dict)

    @property
    def hottest(self) -> str | None:
        """Name of the hottest zone."""
        return max(self.zones, key=self.zones.__getitem__, default=None)


class HeatSensors:
    """The sensors of a machine. They are found once, so that reading them again and again costs little."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._zones = [(folder, probe.text(f"{folder}/type")) for folder in probe.find("sys/class/thermal/thermal_zone*")]
        coolers = [(folder, probe.text(f"{folder}/type") or "") for folder in probe.find("sys/class/thermal/cooling_device*")]
        # Not the fan, and not devfreq and cpufreq: those are above 0 whenever a clock is below its maximum.
        self._alerts = [(folder, kind) for folder, kind in coolers if kind.endswith("-alert")]
        self._counters = list(probe.find("sys/class/hwmon/*/oc*_event_cnt"))

    def zones(self) -> dict[str, float]:
        """Degrees Celsius of each zone. A zone of a part that is switched off cannot be read, or reads 0 or -256, and is left out."""
        zones: dict[str, float] = {}
        for folder, kind in self._zones:
            millidegrees = self._probe.number(f"{folder}/temp")
            if millidegrees is not None and millidegrees > 0:
                name = kind or folder.rpartition("/")[2]
                zones[name] = max(millidegrees / 1000, zones.get(name, 0))
        return zones

    def alerts(self) -> list[tuple[str, bool]]:
        """Every throttle alert that can be read, and whether it is on."""
        states = [(kind, self._probe.number(f"{folder}/cur_state")) for folder, kind in self._alerts]
        return [(kind, state > 0) for kind, state in states if state is not None]

    def over_current(self) -> dict[str, int]:
        """File of each over-current counter that can be read -> events since the board started."""
        counts = {path: self._probe.number(path) for path in self._counters}
        return {path: int(count) for path, count in counts.items() if count is not None}


def read_heat(probe: Probe) -> Heat:
    """Find the sensors and read all of them once."""
    sensors = HeatSensors(probe)
    events = {path.rpartition("/")[2].partition("_")[0]: count for path, count in sensors.over_current().items()}
    return Heat(sensors.zones(), [kind for kind, on in sensors.alerts() if on], events)
