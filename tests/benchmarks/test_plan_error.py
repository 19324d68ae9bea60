"""The record of `plan`'s error is what its script gives today: it is arithmetic, the same on every machine."""

from __future__ import annotations

import json

from benchmarks.plan_error import record
from benchmarks.tables import RESULTS


def test_the_record_is_what_the_script_gives() -> None:
    """The median error is under a quarter for decoding and prefill; for vision only across boards, since two encoders are all there is."""
    recorded = json.loads((RESULTS / "plan_error.json").read_text(encoding="utf-8"))
    assert recorded == json.loads(json.dumps(record()))
    stages = recorded["stages"]
    assert stages["decode"]["median_error"] < 0.25 and stages["prefill"]["median_error"] < 0.25
    assert all(figures["median_error_by_board"] < 0.25 for figures in stages.values())
