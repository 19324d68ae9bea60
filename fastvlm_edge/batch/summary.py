"""What a batch has done: rows, errors by kind, speed and energy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastvlm_edge.machine.power import NoSensor, PowerRecorder, Sensor
from fastvlm_edge.progress import clock

_INTERVAL = 60.0
"""Seconds after which a recording of the power ends and the next one begins: it keeps all its samples."""
_NAMED = 5
"""Ids that are named, of those that the input has twice."""


class Summary:
    """Counts the rows of one run."""

    def __init__(self) -> None:
        self.answers = 0
        """Rows that were answered in this run."""
        self.errors: Counter[str] = Counter()
        """Rows of this run that could not be answered, by the kind of error."""
        self.tokens = 0
        """New tokens of all answers."""
        self.done_before = 0
        """Rows that the file had already."""
        self.twice = 0
        """Rows whose id is that of an earlier row of the input. They are not answered."""
        self._twice_ids: list[str] = []
        self._seconds = 0.0
        self._began: float | None = None
        self._energy = _Energy()

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of the results."""
        if "error" in row:
            self.errors[row["error"]["kind"]] += 1
        else:
            self.answers += 1
            self.tokens += row["timings"]["new_tokens"]
        self._energy.look()

    def add_twice(self, id: str) -> None:
        """Count a row of the input whose id is not unique."""
        self.twice += 1
        if len(self._twice_ids) < _NAMED:
            self._twice_ids.append(id)

    @property
    def seconds(self) -> float:
        """Time inside `measuring`."""
        return self._seconds if self._began is None else time.monotonic() - self._began

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        seconds, joules = self.seconds, self._energy.joules
        return {
            "rows": self.answers + self.errors.total(),
            "answers": self.answers,
            "errors": dict(sorted(self.errors.items())),
            "done_before": self.done_before,
            "duplicate_ids": {"count": self.twice, "first": self._twice_ids},
            "seconds": round(seconds, 3),
            "pictures_per_second": round(self.answers / seconds, 3) if seconds else 0.0,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1) if seconds else 0.0,
            "joules": None if joules is None else round(joules, 1),
            "joules_per_picture": None if joules is None or not self.answers else round(joules / self.answers, 2),
            "no_joules_because": self._energy.reason,
        }

    def lines(self) -> list[str]:
        """The same as text."""
        shown = self.to_json()
        lines = []
        if self.answers or self.errors or not self.done_before:
            energy = "" if shown["joules"] is None else f", {shown['joules']:.0f} J"
            speed = f"{shown['pictures_per_second']:.2f} pictures/s, {shown['tokens_per_second']:.1f} tokens/s"
            lines.append(f"{_count(self.answers, 'answer')} in {clock(self.seconds)}: {speed}{energy}")
        if self.done_before:
            lines.append(f"{_count(self.done_before, 'row')} done before")
        if self.errors:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.errors.items()))
            lines.append(f"{_count(self.errors.total(), 'error')}: {kinds}")
        if self.twice:
            names = ", ".join(self._twice_ids) + (", ..." if self.twice > _NAMED else "")
            lines.append(f"{_count(self.twice, 'row')} left out, because an earlier row has the same id: {names}")
        return lines

    @contextmanager
    def measuring(self, sensor: Sensor | NoSensor) -> Iterator[None]:
        """Measure the time and the energy of the block."""
        self._began = time.monotonic()
        self._energy.begin(sensor)
        try:
            yield
        finally:
            self._seconds, self._began = self.seconds, None
            self._energy.end()


class _Energy:
    """The energy of a long time, in short recordings."""

    def __init__(self) -> None:
        self._recorder: PowerRecorder | None = None
        self._until = 0.0
        self.joules: float | None = None
        self.reason: str | None = "nothing was measured"
        """Why there are no joules."""

    def begin(self, sensor: Sensor | NoSensor) -> None:
        self._recorder, self.reason = PowerRecorder(sensor), None
        self._record()

    def look(self) -> None:
        """Begin the next recording when it is time."""
        if self._recorder is not None and time.monotonic() >= self._until:
            self.end()
            self._record()

    def end(self) -> None:
        assert self._recorder is not None
        self._recorder.__exit__(None, None, None)
        figures = self._recorder.figures()
        if isinstance(figures, NoSensor):  # a part of the energy would be taken for all of it
            self.reason, self.joules = figures.reason, None
        elif self.reason is None:
            self.joules = (self.joules or 0.0) + figures.energy_j

    def _record(self) -> None:
        assert self._recorder is not None
        self._until = time.monotonic() + _INTERVAL
        self._recorder.__enter__()


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
