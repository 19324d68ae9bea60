"""Conversions of FastVLM for MLX (mlx-vlm), which store convolutions with channels last, and exports that are not whole checkpoints.

The exports are refused with the name of the checkpoint that they were made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.checkpoint.configs import quantised
from fastvlm_edge.convert.checkpoint.entries import Entry, Rows, check_rows
from fastvlm_edge.convert.checkpoint.model_name import made_from
from fastvlm_edge.errors import FastVLMError

VISION = "vision_tower.vision_model."
"""How the names of the encoder begin in a conversion for MLX, and in no other layout."""
QUANTISED = re.compile(r".*\.(scales|weight_scale|weight_scale_inv|qweight|SCB|quant_state\..*)")
"""Scales and packed integers of MLX, GPTQ, AWQ, bitsandbytes and FP8."""
CHANNELS_LAST = {4: (0, 3, 1, 2), 3: (2, 0, 1)}
"""Axes of a convolution [out, height, width, in] and of a layer scale [1, 1, channels], in PyTorch's order."""


@dataclass(frozen=True)
class ChannelsLast(Entry):
    """A tensor of the encoder that is stored with channels last."""

    stored: Entry

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`."""
        axes = CHANNELS_LAST[len(self.shape)]
        if rows is not None:
            check_rows(name, self.shape, rows)
        if axes[0] == 0:
            turned = self.stored.read(name, rows).transpose(axes)
        else:
            turned = self.stored.read(name).transpose(axes)[slice(*rows) if rows else slice(None)]
        array = np.empty(turned.shape, self.dtype)  # PyTorch would take the strides of an axis of size 1 for another memory format
        array[...] = turned
        return array


def is_mlx(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a conversion for MLX."""
    return any(name.startswith(VISION) for name in names)


def channels_first(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a conversion for MLX, those of the encoder in PyTorch's order."""
    return {
        name: _turned(entry) if name.startswith(VISION) and len(entry.shape) in CHANNELS_LAST else entry for name, entry in entries.items()
    }


def _turned(entry: Entry) -> Entry:
    shape = tuple(entry.shape[axis] for axis in CHANNELS_LAST[len(entry.shape)])
    return ChannelsLast(entry.path, shape, entry.kind, entry)


def refuse_exports(directory: Path, names: Iterable[str]) -> None:
    """Raise FastVLMError for quantised weights, and for Apple's export for its app, whose encoder is a CoreML package."""
    names = list(names)
    packages = sorted(path.name for pattern in ("*.mlpackage", "*.mlmodelc") for path in directory.glob(pattern))
    if packages and not any("vision" in name for name in names):
        raise FastVLMError(
            f"{directory} is an export for Apple's app: it holds the LLM only, and the encoder is a CoreML package, {packages[0]}",
            f"give {made_from(directory)}",
        )
    if any(QUANTISED.fullmatch(name) for name in names):
        raise quantised(directory)
