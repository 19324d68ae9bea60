"""The histogram grows without losing anything, and the clip value is the one that a brute force search finds."""

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from fastvlm_edge.calib.encoder.histogram import BINS, Histogram, clip_value


def histogram(*parts: ArrayLike) -> Histogram:
    out = Histogram()
    for part in parts:
        out.add(np.asarray(part, np.float32))
    return out


def mean_squared_error(values: NDArray[np.float32], clip: float) -> float:
    scale = clip / 127
    return float(np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2))


def test_values_in_pieces_count_as_values_at_once() -> None:
    values = np.random.default_rng(0).standard_t(3, 50_000).astype(np.float32)
    pieces = histogram(values[:10], values[10:30_000].reshape(2, -1), values[30_000:])
    whole = histogram(values)
    assert pieces.limit == whole.limit and pieces.largest == whole.largest == np.abs(values).max()
    np.testing.assert_array_equal(pieces.counts, whole.counts)


def test_the_range_grows_by_doubling_and_keeps_every_count() -> None:
    grown = histogram([0.0, 0.0], [0.9], [-3.0], [100.0])
    assert grown.limit == 128 and grown.counts.sum() == 5
    filled = np.flatnonzero(grown.counts)
    assert list(filled) == [0, int(0.9 / 128 * BINS), int(3 / 128 * BINS), int(100 / 128 * BINS)]
    assert grown.counts[0] == 2


def test_nothing_and_zeros_alone_have_no_range() -> None:
    for empty in (histogram(), histogram([]), histogram([0.0, -0.0])):
        assert clip_value(empty) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or an infinity"):
        histogram([1.0, bad])


def test_a_histogram_can_be_stored() -> None:
    first = histogram(np.linspace(-2, 5, 1000))
    second = Histogram.from_state(first.state())
    assert (second.limit, second.largest) == (8, 5)
    np.testing.assert_array_equal(second.counts, first.counts)


def test_mse_agrees_with_a_search_over_the_values_themselves() -> None:
    values = np.random.default_rng(1).standard_t(4, 200_000).astype(np.float32)
    found = clip_value(histogram(values))
    best = min(np.geomspace(0.02, 1, 400) * np.abs(values).max(), key=lambda clip: mean_squared_error(values, clip))
    assert mean_squared_error(values, found) < 1.02 * mean_squared_error(values, best)
    assert found < 0.8 * np.abs(values).max()


def test_mse_clips_nothing_of_values_that_lie_evenly() -> None:
    assert clip_value(histogram(np.linspace(-1, 1, 10_000))) == pytest.approx(1, rel=0.04)


def test_mse_looks_below_the_width_of_a_bin() -> None:
    """One value at 1000 and all others below 1: the useful range is a few bins wide."""
    rng = np.random.default_rng(2)
    values = np.append(rng.standard_normal(1_000_000), 200.0).astype(np.float32)
    found = clip_value(histogram(values))
    best = min(np.geomspace(0.02, 1, 400) * 200, key=lambda clip: mean_squared_error(values, clip))
    assert mean_squared_error(values, found) < 1.1 * mean_squared_error(values, best)
