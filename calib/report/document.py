"""What a calibrated conversion decided and why, in the model directory: `quantization.json` for programs, `quantization.html` for people.

The page is one file that loads nothing, works without JavaScript, and draws its own SVG: horizontal coordinates are percentages and
vertical ones pixels, so that pictures narrow to a phone while their text keeps its size. Every text from outside goes through `_e`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import from_json

JSON_NAME = "quantization.json"
HTML_NAME = "quantization.html"
SCHEMA = 1

Decision = Literal["int8", "int8 weights", "wide"]
"""Weights and input in INT8; weights that are dequantised before use; floats as the precision plan has them."""


@dataclass(frozen=True)
class CalibrationData:
    """What was looked at: `used` examples of `source`, and those that could not be, each with its reason."""

    source: str
    used: int
    skipped: list[str]
    seconds: float


@dataclass(frozen=True)
class LayerReport:
    """One convolution or matrix of the encoder. MACs are those of one picture; `observed_max` and `clip` are of its input."""

    name: str
    kind: str
    macs: int
    weight_bytes: int
    observed_max: float | None
    clip: float | None
    decision: Decision
    reason: str


@dataclass(frozen=True)
class GroupReport:
    """Layers that are decided on together. Losses are of the image features when this group alone is INT8; 0 where it was not tried."""

    name: str
    stage: str
    kind: str
    macs: int
    weight_bytes: int
    cosine_loss: float
    """1 - cosine."""
    relative_error: float
    """Squared error over squared features."""
    decision: Decision
    reason: str
    layers: list[LayerReport]


@dataclass(frozen=True)
class VisionReport:
    """The encoder and projector, groups in the order of the network."""

    observer: str
    bound: float | None
    """Of 1 - cosine of the image features, for the whole plan."""
    predicted: float
    """Relative squared error of the whole plan, from its groups."""
    measured_cosine: float
    measured_relative: float
    groups: list[GroupReport]


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of the decoder. Errors are of its outputs, relative to them: weights rounded to nearest, and as they were chosen."""

    name: str
    bits: int
    block: int
    """Inputs that share a scale; 0 for one scale an output channel."""
    bytes: int
    error_rounded: float
    error: float


@dataclass(frozen=True)
class DecoderReport:
    """The LLM."""

    method: str
    matrices: list[MatrixReport]


@dataclass(frozen=True)
class QuantizationReport:
    """The whole document."""

    model: str
    precision: str
    toolkit_version: str
    date: str
    calibration: CalibrationData
    accuracy_drop: float | None
    """Points of 100 that were allowed to be lost (`--accuracy-drop`)."""
    vision: VisionReport | None
    decoder: DecoderReport | None
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    """Part -> computing type -> multiply-accumulates (`Placement.macs`): of one picture, or of one token."""
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    """`node`, `op`, `reason` and `macs` of each (`Fallback`)."""
    bytes: dict[str, int] = field(default_factory=dict)
    """File of the model directory -> its size."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Figure -> number, or -> {"before": number, "after": number}, or two figures NAME_before and NAME_after; may be nested. The summary
    tells the first pair, and `points_lost`."""
    schema: int = SCHEMA


# Files ----------------------------------------------------------------------------------------------------------------------------


def write_report(directory: Path, document: QuantizationReport) -> None:
    """Write `quantization.json` and `quantization.html` into `directory`."""
    text = json.dumps(_finite(dataclasses.asdict(document)), indent=1, allow_nan=False)
    (directory / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    from fastvlm_edge.calib.report.page import render  # it reads this module

    (directory / HTML_NAME).write_text(render(document), encoding="utf-8")


def read_report(directory: Path) -> QuantizationReport:
    """Read and check `quantization.json`. Raises FastVLMError where there is none, or this version cannot read it."""
    path = directory / JSON_NAME
    again = "convert the checkpoint again with --calib DATA"
    if not path.is_file():
        raise FastVLMError(f"{directory} has no {JSON_NAME}: it was not calibrated; {again}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise FastVLMError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    if schema != SCHEMA:
        raise FastVLMError(f"{path} has schema {schema!r}, this toolkit reads {SCHEMA}; {again}")
    try:
        report: QuantizationReport = from_json(QuantizationReport, document)
    except ValueError as error:
        raise FastVLMError(f"{path} is damaged ({error}); {again}") from None
    return report


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, which is read as NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
