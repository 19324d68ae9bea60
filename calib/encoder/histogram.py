"""A histogram of the magnitudes that enter a layer, and the clip value read from it: the range that INT8 should cover.

Symmetric, as TensorRT wants it: integers -127..127 stand for -clip..clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 4096
LEVELS = 127
"""Steps from zero to the clip value."""
CANDIDATES = 120
"""Clip values that `clip_value` tries."""


class Histogram:
    """Counts of |x| in BINS equal bins from 0 to `limit`, a power of two that grows with the values: one pass, bounded memory."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of an array of any shape. Raises ValueError for NaN and infinity."""
        magnitudes = np.abs(values.reshape(-1))
        if not magnitudes.size:
            return
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise ValueError("a NaN or an infinity among the observed values")
        self.largest = max(self.largest, largest)
        if largest > self.limit:
            self._grow(2.0 ** math.ceil(math.log2(largest)))
        index = np.zeros(1, np.int64) if not self.limit else (magnitudes * np.float32(BINS / self.limit)).astype(np.int32)
        if not self.limit:  # only zeros so far: they stay in the first bin when the range grows
            self.counts[0] += magnitudes.size
            return
        self.counts += np.bincount(np.minimum(index, BINS - 1, out=index), minlength=BINS)

    def _grow(self, limit: float) -> None:
        while self.limit and self.limit < limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        self.limit = limit

    @property
    def centres(self) -> NDArray[np.float64]:
        """Magnitude at the centre of each bin."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.limit / BINS))

    def state(self) -> dict[str, Any]:
        """Arrays from which `from_state` restores the histogram."""
        return {"counts": self.counts, "range": np.array([self.limit, self.largest])}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Histogram:
        """The inverse of `state`."""
        histogram = cls()
        histogram.counts = np.asarray(state["counts"], np.int64)
        histogram.limit, histogram.largest = (float(value) for value in state["range"])
        return histogram


def clip_value(histogram: Histogram, levels: int = LEVELS) -> float:
    """The magnitude that the last of `levels` steps from zero stands for, so that INT8 has the least mean squared error.

    The criterion is that of Banner et al., arXiv 1810.05723, by search instead of their formula: CANDIDATES values from a fiftieth of the
    largest magnitude up to all of it, evenly spaced in their logarithm. 0 if only zeros were seen.
    """
    if not histogram.largest:
        return 0.0
    seen = np.flatnonzero(histogram.counts)
    counts, values = histogram.counts[seen].astype(np.float64), np.minimum(histogram.centres[seen], histogram.largest)
    clips = histogram.largest * np.geomspace(1 / 50, 1, CANDIDATES)
    steps = clips[:, None] / levels
    errors = values - np.minimum(np.rint(values / steps), levels) * steps
    inside = values <= clips[:, None]
    # A bin has a width. If that is not below the step, its values lose the noise of the step, not the error of the centre.
    width = histogram.limit / BINS
    squares = np.where(inside & (width > steps / 2), np.minimum(steps, width) ** 2 / 12, errors**2)
    return float(clips[int(np.argmin(squares @ counts))])
