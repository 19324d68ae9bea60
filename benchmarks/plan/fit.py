"""Efficiencies from published rows: milliseconds = slope * ideal milliseconds + constant, by least squares on the relative error."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.plan.published import MEMORY, MEMORY_POSITIONS, MODELS, ROWS, Row, Stage
from fastvlm_edge.machine.boards.rates import BOARDS
from fastvlm_edge.planning.predict import THOR, Efficiency
from fastvlm_edge.planning.workload import FP16, INT4


def ideal_ms(row: Row) -> float:
    """Time of the work at the bandwidth of the board (decoding), or at its dense FP16 rate (prefill, vision)."""
    board = BOARDS[row.board]
    mode = board.mode(row.mode)
    return row.work / mode.bandwidth * 1e3 if row.stage == "decode" else 2 * row.work / board.fp16_rate(mode) * 1e3


def rows_of(stage: Stage, board: str | None = None) -> list[Row]:
    """The published rows that predict a stage on `board`. Prefill on Thor reaches far less of the rate, so it is fitted separately."""
    rows = [row for row in ROWS if row.stage == stage]
    if stage != "prefill" or board is None:
        return rows
    return [row for row in rows if (row.board == THOR) == (board == THOR)]


def fit(rows: Sequence[Row]) -> Efficiency:
    """Slope and constant, neither below zero, for which slope * ideal / measured + constant / measured is nearest to 1."""
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
    """A row, and its prediction by a fit to the rows of all other models, or of all other boards."""

    row: Row
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative error: predicted over measured, minus 1."""
        return self.predicted_ms / self.row.milliseconds - 1


def hold_out(stage: Stage, by: Literal["model", "board"] = "model") -> list[HeldOut]:
    """Predict every row of a stage without the rows of its model (of its encoder, if two models share one), or of its board."""
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
    """The absolute relative error that 80 % of the rows stay within."""
    return float(np.percentile([abs(each.error) for each in held], 80))


def runtime_bytes() -> float:
    """Memory of a process beside weights and cache: what the published rows leave over, as the median."""
    rest = []
    for model, _, used, encoder in MEMORY:
        text = MODELS[model]
        weights = text.body * INT4 + 2 * text.head * FP16 + encoder * FP16
        rest.append(used - weights - text.cache_bytes(MEMORY_POSITIONS))
    return statistics.median(rest)
