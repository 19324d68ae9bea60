"""Energy of intervals of work, where the machine has a sensor; one recorder for all intervals of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvlm_edge.bench.record import digits
from fastvlm_edge.machine.power import NoSensor, PowerFigures, PowerRecorder, find_sensor


@dataclass
class Energy:
    """Of one interval; `joules` is set when it ends, and stays None where there is no sensor."""

    joules: float | None = None


class Meter:
    """Measures intervals one after another and remembers the extremes."""

    def __init__(self, *, card: bool) -> None:
        """`card`: whether the work runs on a GPU, so that a card's own sensor is of it."""
        self._recorder = PowerRecorder(find_sensor(card=card))
        self._seen: list[PowerFigures] = []
        self._reason = "nothing was measured"

    @contextmanager
    def interval(self) -> Iterator[Energy]:
        """Work whose energy is wanted."""
        energy = Energy()
        with self._recorder:
            yield energy
        figures = self._recorder.figures()
        if isinstance(figures, NoSensor):
            self._reason = figures.reason
            return
        self._seen.append(figures)
        energy.joules = figures.energy_j

    def facts(self) -> dict[str, Any]:
        """Which sensor, mean and peak watts over all intervals, the hottest temperature, whether clocks were lowered."""
        seen = self._seen
        if not seen:
            return {"sensor": None, "reason": self._reason}
        seconds = sum(figures.seconds for figures in seen)
        temperatures = [figures.temperature_c for figures in seen if figures.temperature_c is not None]
        throttled = [figures.throttled for figures in seen if figures.throttled is not None]
        return {
            "sensor": seen[-1].sensor,
            "mean_w": digits(sum(figures.energy_j for figures in seen) / seconds) if seconds else None,
            "peak_w": digits(max(figures.peak_w for figures in seen)),
            "temperature_c": max(temperatures, default=None),
            "throttled": any(throttled) if throttled else None,
        }
