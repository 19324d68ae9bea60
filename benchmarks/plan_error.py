"""How far `fastvlm-edge plan` is from published measurements of models that it was not fitted to.

    python -m benchmarks.plan_error [--out benchmarks/results/plan_error.json]

Prints the constants for fastvlm_edge/planning/predict.py. Pure arithmetic: the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks.plan.fit import HeldOut, fit, hold_out, ideal_ms, median_error, rows_of, runtime_bytes, spread
from benchmarks.plan.published import CONTRADICTING, Stage


def record() -> dict[str, Any]:
    """The fits to all published rows, and each row predicted from the rows of other models and of other boards."""
    stages: dict[str, Any] = {}
    for stage in get_args(Stage):
        by_model, by_board = hold_out(stage), hold_out(stage, "board")
        fits = {"all": fit(rows_of(stage))} if stage != "prefill" else {name: fit(rows_of(stage, name)) for name in ("orin", "thor")}
        stages[stage] = {
            "fit": {name: {key: round(value, 4) for key, value in asdict(found).items()} for name, found in fits.items()},
            "median_error": round(median_error(by_model), 3),
            "four_of_five_within": round(spread(by_model), 3),
            "median_error_by_board": round(median_error(by_board), 3),
            "rows": [_row(each) for each in by_model],
        }
    contradicting = [HeldOut(row, fit(rows_of(row.stage, row.board)).milliseconds(ideal_ms(row))) for row in CONTRADICTING]
    return {
        "what": "published rows, each predicted from the rows of all other models (for vision: of all other encoders)",
        "stages": stages,
        "contradicting": [{"stage": each.row.stage, **_row(each)} for each in contradicting],
        "runtime_bytes": round(runtime_bytes(), -5),
    }


def _row(each: HeldOut) -> dict[str, Any]:
    return {
        "model": each.row.model,
        "board": each.row.board,
        "mode": each.row.mode,
        "measured_ms": round(each.row.milliseconds, 2),
        "predicted_ms": round(each.predicted_ms, 2),
        "error": round(each.error, 3),
        "source": each.row.source,
    }


def main() -> int:
    """Write the record and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_error.json")
    options = parser.parse_args()
    document = record()
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for stage, figures in document["stages"].items():
        print(
            f"{stage}: {figures['fit']}, held out: median {figures['median_error']}, four of five within {figures['four_of_five_within']}"
        )
    print(f"runtime: {document['runtime_bytes']:.4g} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
