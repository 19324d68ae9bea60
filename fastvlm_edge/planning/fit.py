"""Efficiencies from published rows: milliseconds = slope * ideal milliseconds + constant, by least squares of the relative error."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastvlm_edge.planning.boards import BOARDS
from fastvlm_edge.planning.published import MEMORY, MEMORY_POSITIONS, MODELS, ROWS, Row, Stage
from fastvlm_edge.planning.workload import FP16, INT4

THOR = "thor"


@dataclass(frozen=True)
class Efficiency:
    """Of one stage. `slope` of 1 is the board's own limit."""

    slope: float
    constant_ms: float

    def milliseconds(self, ideal_ms: float) -> float:
        """The prediction for work that takes `ideal_ms` at the limit."""
        return self.slope * ideal_ms + self.constant_ms


def ideal_ms(row: Row) -> float:
    """At the board's bandwidth, or its dense FP16 rate."""
    board = BOARDS[row.board]
    mode = board.mode(row.mode)
    return row.work / mode.bandwidth * 1e3 if row.stage == "decode" else 2 * row.work / board.fp16_rate(mode) * 1e3


def rows_of(stage: Stage, board: str | None = None) -> list[Row]:
    """The published rows that predict a stage on `board`. Prefill on Thor, which reaches far less of the rate, is fitted by itself."""
    rows = [row for row in ROWS if row.stage == stage]
    if stage != "prefill" or board is None:
        return rows
    return [row for row in rows if (row.board == THOR) == (board == THOR)]


def fit(rows: Sequence[Row]) -> Efficiency:
    """Both numbers, neither below zero, so that slope * ideal / measured + constant / measured is nearest to 1."""
    ideal = np.array([ideal_ms(row) for row in rows])
    measured = np.array([row.milliseconds for row in rows])
    matrix = np.stack([ideal / measured, 1 / measured], axis=1)
    (slope, constant), *_ = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)
    if constant < 0:
        share = ideal / measured
        slope, constant = float(share.sum() / (share @ share)), 0.0
    return Efficiency(float(slope), float(constant))


@dataclass(frozen=True)
class HeldOut:
    """A row, and what the fit to all rows of other models says of it."""

    row: Row
    predicted_ms: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted_ms / self.row.milliseconds - 1


def hold_out(stage: Stage, by: Literal["model", "board"] = "model") -> list[HeldOut]:
    """Every row of a stage predicted without any row of its model (of its encoder, where two models share one), or of its board."""
    held = []
    for row in rows_of(stage):
        rows = rows_of(stage, row.board)
        others = [other for other in rows if _group(other, by) != _group(row, by)]
        if others:  # Thor's prefill has no other board
            held.append(HeldOut(row, fit(others).milliseconds(ideal_ms(row))))
    return held


def _group(row: Row, by: Literal["model", "board"]) -> object:
    if by == "board":
        return row.board
    return row.work if row.stage == "vision" else MODELS[row.model]


def median_error(held: Iterable[HeldOut]) -> float:
    """Median of the absolute relative errors."""
    return statistics.median(abs(each.error) for each in held)


def spread(held: Iterable[HeldOut]) -> float:
    """The absolute relative error that four of five rows stay within."""
    return float(np.percentile([abs(each.error) for each in held], 80))


def runtime_bytes() -> float:
    """What a process takes beside weights and cache: the median of the published rows' remainders."""
    rest = []
    for model, _, used, encoder in MEMORY:
        text = MODELS[model]
        weights = text.body * INT4 + 2 * text.head * FP16 + encoder * FP16
        rest.append(used - weights - text.cache_bytes(MEMORY_POSITIONS))
    return statistics.median(rest)
