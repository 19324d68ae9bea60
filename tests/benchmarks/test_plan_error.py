"""The constants of `plan` are fitted to the published rows, and the record of its error is what the script gives today."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.plan import fit as fitting
from benchmarks.plan.fit import fit, hold_out, ideal_ms, median_error, rows_of, runtime_bytes, spread
from benchmarks.plan.published import MODELS, ROWS, Row, Stage
from benchmarks.plan_error import record
from benchmarks.tables import RESULTS
from fastvlm_edge.planning import predict
from fastvlm_edge.planning.predict import Efficiency


def test_the_record_is_what_the_script_gives() -> None:
    """The median error is under a quarter for decoding and prefill; for vision only across boards, since two encoders are all there is."""
    recorded = json.loads((RESULTS / "plan_error.json").read_text(encoding="utf-8"))
    assert recorded == json.loads(json.dumps(record()))
    stages = recorded["stages"]
    assert stages["decode"]["median_error"] < 0.25 and stages["prefill"]["median_error"] < 0.25
    assert all(figures["median_error_by_board"] < 0.25 for figures in stages.values())


def test_the_constants_are_what_the_published_rows_give() -> None:
    expected: tuple[tuple[Stage, str, Efficiency], ...] = (
        ("decode", "orin", predict.DECODE),
        ("prefill", "orin", predict.PREFILL),
        ("prefill", "thor", predict.PREFILL_ON_THOR),
        ("vision", "orin", predict.VISION),
    )
    for stage, board, constant in expected:
        found = fit(rows_of(stage, board))
        assert (constant.slope, constant.constant_ms) == pytest.approx((found.slope, found.constant_ms), abs=5e-5)
        assert predict.MEDIAN_ERROR[stage] == pytest.approx(median_error(hold_out(stage)), abs=5e-4)
        assert predict.SPREAD[stage] == pytest.approx(spread(hold_out(stage)), abs=5e-4)
    assert pytest.approx(runtime_bytes(), rel=1e-4) == predict.RUNTIME_BYTES


@pytest.mark.parametrize("stage", ["decode", "prefill", "vision"])
def test_no_row_is_predicted_from_a_row_of_its_own_model_or_encoder(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    seen: list[list[Row]] = []
    real = fitting.fit

    def spy(rows: list[Row]) -> Efficiency:
        seen.append(list(rows))
        return real(rows)

    monkeypatch.setattr(fitting, "fit", spy)
    held = hold_out(stage)
    assert len(held) == len(rows_of(stage)) == len(seen)
    for each, used in zip(held, seen, strict=True):
        assert all(MODELS[row.model] != MODELS[each.row.model] for row in used)
        assert stage != "vision" or all(row.work != each.row.work for row in used)


def test_a_fit_finds_a_line_and_no_constant_below_zero() -> None:
    rows = [replace(row, milliseconds=1.5 * ideal_ms(row) + 4) for row in rows_of("decode")]
    found = fit(rows)
    assert (found.slope, found.constant_ms) == pytest.approx((1.5, 4.0))
    rows = [replace(row, milliseconds=max(1.5 * ideal_ms(row) - 4, 1)) for row in rows_of("decode")]
    assert fit(rows).constant_ms == 0.0


def test_nothing_published_is_faster_than_its_board() -> None:
    for row in ROWS:
        assert ideal_ms(row) < row.milliseconds, row
