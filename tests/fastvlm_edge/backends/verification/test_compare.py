"""The distances, against closed forms and against a plain computation over the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvlm_edge.backends.verification.compare import (
    TOP,
    cache_errors,
    candidates_fault,
    cosines,
    divergence,
    log_sum_exp,
    regret,
    spread,
    top_rows,
)

RANDOM = np.random.default_rng(0)
LOGITS = (4 * RANDOM.standard_normal((3, 2000))).astype(np.float32)


def plain_divergence(found: np.ndarray, expected: np.ndarray) -> float:
    p, q = (np.exp(row - log_sum_exp(row[None])[0]) for row in (expected.astype(np.float64), found.astype(np.float64)))
    return float((p * np.log(p / q)).sum())


def test_the_divergence_of_equal_rows_is_zero() -> None:
    for index, row in enumerate(LOGITS):
        assert divergence(row, top_rows(LOGITS)[index]) < 1e-6


def test_the_divergence_is_a_close_lower_bound_of_the_whole_one() -> None:
    noisy = LOGITS + 0.1 * RANDOM.standard_normal(LOGITS.shape).astype(np.float32)
    for index, row in enumerate(noisy):
        found, whole = divergence(row, top_rows(LOGITS)[index]), plain_divergence(row, LOGITS[index])
        assert 0.5 * whole < found <= whole + 1e-6


def test_a_small_vocabulary_is_kept_whole() -> None:
    small = LOGITS[:, : TOP // 2]
    for index in (1, 2):
        assert divergence(small[0], top_rows(small)[index]) == pytest.approx(plain_divergence(small[0], small[index]), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_value_that_is_no_number_is_infinitely_far(bad: float) -> None:
    row = LOGITS[0].copy()
    row[int(row.argmax())] = bad
    assert not divergence(row, top_rows(LOGITS)[0]) <= 1e9


def test_the_regret_is_what_the_reference_thinks_of_the_choice() -> None:
    expected = top_rows(LOGITS)[0]
    assert regret(LOGITS[0], expected) == 0
    other = LOGITS[0].copy()
    other[expected.ids[0, 2]] += 100
    assert regret(other, expected) == pytest.approx(float(expected.values[0, 0] - expected.values[0, 2]))
    other[int(LOGITS[0].argmin())] += 1000
    assert regret(other, expected) == pytest.approx(float(expected.values[0, 0] - expected.values[0, -1]))


@pytest.mark.parametrize("shift", [-64, 0, 64, 1024])
def test_the_size_of_a_row_does_not_depend_on_where_its_logits_lie(shift: float) -> None:
    whole = np.sort(LOGITS[0])
    assert spread(top_rows(LOGITS[:1] + np.float32(shift))) == pytest.approx(float(whole[-1] - whole[-TOP]), abs=1e-3)


def test_a_flat_row_has_a_size_too() -> None:
    assert spread(top_rows(np.full((1, 2000), 5, np.float32))) == 1


def test_visual_tokens_are_compared_one_by_one_and_without_what_they_share() -> None:
    tokens = (100 + RANDOM.standard_normal((16, 64))).astype(np.float32)
    swapped = tokens.copy()
    swapped[[3, 4]] = tokens[[4, 3]]
    similar = cosines(swapped, tokens)
    assert (similar[[3, 4]] < 0.5).all() and (np.delete(similar, [3, 4]) > 0.999).all()


def test_other_outputs_must_agree_with_the_logits() -> None:
    row, count = LOGITS[0], 64
    ids = np.argsort(-row)[:count]
    values, normalizer = row[ids], float(log_sum_exp(row[None])[0])
    assert candidates_fault(row, values, ids, normalizer) is None
    assert "log_normalizer" in (candidates_fault(row, values, ids, normalizer + 0.1) or "")
    later = np.argsort(-row)[1 : count + 1]
    assert "largest" in (candidates_fault(row, row[later], later, normalizer) or "")
    assert "largest" in (candidates_fault(row, values, np.roll(ids, 1), normalizer) or "")
    assert "twice" in (candidates_fault(row, values, np.full(count, ids[0]), normalizer) or "")


def test_a_lost_position_of_the_cache_is_wholly_wrong() -> None:
    keys_and_values = RANDOM.standard_normal((3, 2, 2, 10, 8)).astype(np.float32)
    found = keys_and_values * 1.001
    found[1, 1, :, 4] = 0
    errors = cache_errors(found, keys_and_values)
    assert errors[4] == pytest.approx(1) and np.delete(errors, 4) == pytest.approx(1e-3, rel=0.1)
