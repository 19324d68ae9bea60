"""The state of a conversion under way, and what calibration adds to it: the types that the steps in pipeline.py and `calib` share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.fastvithd import FastViTHD
from fastvlm_edge.convert.precision import PrecisionPlan
from fastvlm_edge.convert.weights.decoder import QuantizedMatrices
from fastvlm_edge.convert.weights.vision import VisionIntegers
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress

Float32 = npt.NDArray[np.float32]


@dataclass
class Conversion:
    """One conversion, from the opened checkpoint to the checked graphs.

    The steps of pipeline.py replace `source` (by the same with outlier channels moved), `plan` and `manifest` as they learn more.
    """

    source: Checkpoint
    plan: PrecisionPlan
    """As asked for; after the probe with wider types where the activations need them."""
    manifest: Manifest
    """Filled step by step; `files` and the hashes of the source come last."""
    directory: Path
    """The unfinished model directory. Everything that is left in it when the conversion ends is part of the model."""
    tokenizer: TextTokenizer
    pictures: list[Float32]
    """pixel_values [1, 3, size, size] of the stored pictures that the probe and the final check use, at the default size first."""
    progress: Progress
    cleanup: ExitStack
    """Closed when the conversion ends, even if it fails. Calibration registers its temporary files here."""


@dataclass(frozen=True)
class Calibration:
    """What calibration chose for the plan of a conversion; without one, weights are rounded to nearest."""

    vision: VisionIntegers
    decoder: QuantizedMatrices
    certify: Callable[[Path, Manifest], None] | None
    """Measures what onnxruntime loses on this CPU with the finished graphs; None if no accuracy was asked for. Raises PrecisionRefused."""
    write_report: Callable[[Path, Manifest], None]
    """Writes what was chosen and why into the model directory, when the graphs are checked and the manifest has the parity figures."""


Calibrate = Callable[[Conversion, FastViTHD, nn.Sequential], Calibration]
"""Chooses the integers of a probed conversion, given the encoder (inference form) and the projector in float32."""
