"""Energy of intervals of work, if the machine has a sensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvlm_edge.bench.record import digits
from fastvlm_edge.machine.power import NoSensor, PowerFigures, PowerRecorder, find_sensor


@dataclass
class Energy:
    """Energy of one interval. `joules` is set when the interval ends, and stays None without a sensor."""

    joules: float | None = None


class Meter:
    """Measures intervals one after another, and keeps their figures."""

    def __init__(self, *, card: bool) -> None:
        """`card`: whether the work runs on a GPU, so that the sensor of a graphics card measures it."""
        self._recorder = PowerRecorder(find_sensor(card=card))
        self._seen: list[PowerFigures] = []
        self._reason = "nothing was measured"

    @contextmanager
    def interval(self) -> Iterator[Energy]:
        """Measure the energy of the work inside the `with` block."""
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
        """Sensor, mean and peak watts over all intervals, highest temperature, and whether clocks were lowered."""
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
