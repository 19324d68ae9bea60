"""Whether a frame differs from the one that was asked about last."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
THRESHOLD = 1.0
"""By default, frames with a smaller distance are the same."""


def small_grey(image: Image.Image) -> NDArray[np.float32]:
    """The mean brightness of each field of a grid: [SIDE, SIDE] float32, 0 to 255. Averages hold hardly any noise of a sensor."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("L"), np.float32)


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean absolute difference, 0 to 255."""
    return float(np.abs(one - other).mean())
