"""Observers: what range of a tensor INT8 should cover. A streaming histogram of magnitudes, and four ways to read a clip value from it.

Symmetric, as TensorRT wants it: integers -127..127 stand for -clip..clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BINS = 4096
LEVELS = 127
"""Steps from zero to the clip value."""
_ENTROPY_BINS, _ENTROPY_LEVELS, _ENTROPY_STRIDE = 2048, 128, 8


class Histogram:
    """Counts of |x| in BINS equal bins from 0 to `limit`, a power of two that doubles for larger values: bounded memory, one pass."""

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
        if not self.limit:  # nothing but zeros so far: they stay in the first bin however far the range grows
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
        """The magnitude in the middle of each bin."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.limit / BINS))

    def state(self) -> dict[str, Any]:
        """Arrays from which `from_state` makes the same histogram."""
        return {"counts": self.counts, "range": np.array([self.limit, self.largest])}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Histogram:
        """The inverse of `state`."""
        histogram = cls()
        histogram.counts = np.asarray(state["counts"], np.int64)
        histogram.limit, histogram.largest = (float(value) for value in state["range"])
        return histogram


class Observer(Protocol):
    """A rule that reads the clip value off a histogram."""

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The magnitude that the last of `levels` steps from zero stands for; 0 where nothing but zeros was seen."""


@dataclass(frozen=True)
class MaxObserver:
    """Clip nothing that was seen (TensorRT's `MinMaxCalibrator`)."""

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The largest magnitude."""
        return histogram.largest


@dataclass(frozen=True)
class PercentileObserver:
    """Clip all but `percent` of the values (Wu et al., "Integer quantization for deep learning", arXiv 2004.09602, section 3.3)."""

    percent: float = 99.99

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The upper border of the bin in which the percentile lies, never beyond the largest value."""
        total = int(histogram.counts.sum())
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(histogram.counts), total * self.percent / 100))
        return min(histogram.largest, (index + 1) * histogram.limit / BINS)


@dataclass(frozen=True)
class EntropyObserver:
    """Least KL divergence between the values clipped and the values clipped and quantised, TensorRT's `EntropyCalibrator`.

    Migacz, "8-bit inference with TensorRT", GTC 2017 S7310: 2048 bins, 128 levels, outliers counted in the last bin kept, empty bins left
    empty. Every eighth of its candidates is tried.
    """

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The upper border of the candidate range that diverges least; always for the 128 levels of the source."""
        counts = histogram.counts.reshape(_ENTROPY_BINS, -1).sum(1).astype(np.float64)
        if not histogram.largest:
            return 0.0
        width = histogram.limit / _ENTROPY_BINS
        last = min(_ENTROPY_BINS, math.ceil(histogram.largest / width))
        tail = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
        best, chosen = math.inf, last
        for stop in (*range(_ENTROPY_LEVELS, last, _ENTROPY_STRIDE), last):
            divergence = _divergence(counts[:stop], tail[stop])
            if divergence < best:
                best, chosen = divergence, stop
        return min(histogram.largest, chosen * width)


def _divergence(kept: NDArray[np.float64], outliers: float) -> float:
    """KL(P || Q) of a range: P is `kept` with the outliers in its last bin, Q is `kept` merged to 128 levels and spread out again."""
    reference = kept.copy()
    reference[-1] += outliers
    level = np.arange(kept.size) * min(_ENTROPY_LEVELS, kept.size) // kept.size
    filled = reference > 0
    mass = np.bincount(level, weights=kept)
    spread = np.bincount(level, weights=filled)
    quantized = np.where(filled, (mass / np.maximum(spread, 1))[level], 0.0)
    if not quantized.sum():
        return math.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    with np.errstate(divide="ignore"):
        terms = p[filled] * np.log(p[filled] / q[filled])
    return float(terms.sum())


@dataclass(frozen=True)
class MSEObserver:
    """Least mean squared error of what INT8 makes of the values (Banner et al., arXiv 1810.05723, by search instead of their formula)."""

    candidates: int = 120

    def clip(self, histogram: Histogram, levels: int = LEVELS) -> float:
        """The best of `candidates` clip values between a fiftieth of the largest value and all of it, spaced evenly in their logarithm."""
        if not histogram.largest:
            return 0.0
        seen = np.flatnonzero(histogram.counts)
        counts, values = histogram.counts[seen].astype(np.float64), np.minimum(histogram.centres[seen], histogram.largest)
        clips = histogram.largest * np.geomspace(1 / 50, 1, self.candidates)
        steps = clips[:, None] / levels
        errors = values - np.minimum(np.rint(values / steps), levels) * steps
        inside = values <= clips[:, None]
        # A bin has a width: where it is no finer than a step, what its values lose is the step's own noise, not the error of the centre.
        width = histogram.limit / BINS
        squares = np.where(inside & (width > steps / 2), np.minimum(steps, width) ** 2 / 12, errors**2)
        return float(clips[int(np.argmin(squares @ counts))])


OBSERVERS: dict[str, Observer] = {
    "max": MaxObserver(),
    "percentile": PercentileObserver(),
    "entropy": EntropyObserver(),
    "mse": MSEObserver(),
}
