"""The document of a calibrated conversion: what was decided, and why. Written by write.py, shown by page.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

JSON_NAME = "quantization.json"
SCHEMA = 1

Decision = Literal["int8", "int8 weights", "wide"]
"""INT8 weights and inputs; INT8 weights that are dequantised before use; the float type of the precision plan."""


@dataclass(frozen=True)
class CalibrationData:
    """The data: `used` examples of `source`, and the skipped ones, each with its reason."""

    source: str
    used: int
    skipped: list[str]
    seconds: float


@dataclass(frozen=True)
class LayerReport:
    """One convolution or matrix of the encoder. `macs` are per picture; `observed_max` and `clip` are magnitudes of its input."""

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
    """Layers with one decision. Losses are those of the image features when only this group is INT8; 0 if it was not tried."""

    name: str
    stage: str
    kind: str
    macs: int
    weight_bytes: int
    cosine_loss: float
    """1 - cosine."""
    relative_error: float
    """Squared error over the squares of the features."""
    decision: Decision
    reason: str
    layers: list[LayerReport]


@dataclass(frozen=True)
class VisionReport:
    """The encoder and projector, groups in the order of the network."""

    observer: str
    bound: float | None
    """Largest accepted 1 - cosine of the image features, for the whole plan."""
    predicted: float
    """Relative squared error of the whole plan, predicted from its groups."""
    measured_cosine: float
    measured_relative: float
    groups: list[GroupReport]


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of the decoder. Errors are relative errors of its outputs: with weights rounded to nearest, and as chosen."""

    name: str
    bits: int
    block: int
    """Inputs that share a scale; 0 for one scale per output channel."""
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
    """Accepted loss in percentage points (`--accuracy-drop`)."""
    vision: VisionReport | None
    decoder: DecoderReport | None
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    """Part -> type of computation -> multiply-accumulates (`Placement.macs`): per picture, or per token."""
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    """`node`, `op`, `reason` and `macs` of each `Fallback`."""
    bytes: dict[str, int] = field(default_factory=dict)
    """File of the model directory -> size."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Figure -> number, or -> {"before": number, "after": number}, or two figures NAME_before and NAME_after; may be nested. The summary
    shows the first pair, and `points_lost`."""
    schema: int = SCHEMA
