"""Writes the report of a calibrated conversion: `quantization.json` for programs, `quantization.html` for people."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastvlm_edge.calib.report.document import JSON_NAME, QuantizationReport
from fastvlm_edge.calib.report.page import render

HTML_NAME = "quantization.html"


def write_report(directory: Path, document: QuantizationReport) -> None:
    """Write `quantization.json` and `quantization.html` into `directory`."""
    text = json.dumps(_finite(dataclasses.asdict(document)), indent=1, allow_nan=False)
    (directory / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (directory / HTML_NAME).write_text(render(document), encoding="utf-8")


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
