"""The fit of a cascade on constructed answers: what is cheapest, what is safe, and what too few questions do not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastvlm_edge.evaluation import cascade_fit
from fastvlm_edge.evaluation.cascade_fit import (
    QUANTILE,
    Answers,
    fit,
    follow,
    held_out,
    largest_only,
    lost,
    questions_needed,
)
from fastvlm_edge.model_dir.manifest import Cascade

SIZES = [128, 192, 256]
FIRST, WHOLE = [2.0, 20.0, 40.0], [3.0, 25.0, 45.0]


def answers_of(scores: Any, sure: Any, *, sizes: list[int] | None = None, pictures: Any = None, tokens: Any = None) -> Answers:
    """Answers of one token each, unless `tokens` [n, k, longest] is given; `sure` [n, k] is the probability of that token."""
    scores, sure = np.asarray(scores, dtype=float), np.asarray(sure, dtype=float)
    n, k = scores.shape
    tokens = sure[:, :, None] if tokens is None else np.asarray(tokens, dtype=float)
    first, whole = (np.tile(times[:k], (n, 1)) for times in (FIRST, WHOLE))
    return Answers(sizes or SIZES[:k], scores, sure, tokens, first, whole, np.arange(n) if pictures is None else np.asarray(pictures))


def perfect(n: int = 2000, right: float = 0.8) -> Answers:
    """The largest size is always right, the smallest in a share of `right`, and its confidence tells which."""
    small = (np.arange(n) % 100 < 100 * right).astype(float)
    return answers_of(np.stack([small, np.ones(n)], axis=1), np.stack([0.2 + 0.7 * small, np.ones(n)], axis=1))


def test_a_cascade_is_followed_as_at_run_time() -> None:
    """The first question stands at once, the second at the second size, the third at the last."""
    answers = answers_of([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.9, 0.9, 0.9], [0.5, 0.8, 0.9], [0.5, 0.5, 0.1]])
    outcome = follow(answers, Cascade(SIZES, 0.8, "mean"))
    assert outcome.sizes.tolist() == SIZES and outcome.scores.tolist() == [1, 1, 1]
    assert outcome.first_ms.tolist() == [3, 3 + 25, 3 + 25 + 40], "an answer is shown when it stands, and the last one is streamed"
    assert outcome.whole_ms.tolist() == [3, 3 + 25, 3 + 25 + 45]
    alone = follow(answers, Cascade([192], 0.0, "mean"))
    assert alone.first_ms.tolist() == [20] * 3 and alone.scores.tolist() == [0, 1, 0]


def test_an_answer_without_a_token_never_stands() -> None:
    answers = answers_of([[1, 1]], [[-1, 1]], tokens=[[[2.0], [1.0]]])
    for kind in cascade_fit.KINDS:
        assert follow(answers, Cascade([128, 192], 0.0, kind)).sizes.tolist() == [192]


def test_by_the_least_token_an_answer_is_rejected_at_that_token() -> None:
    """Five tokens, the third of which is too unlikely: half of the time between the first token and the end."""
    answers = answers_of([[1, 1]], [[0.8, 0.9]], tokens=[[[0.9, 0.9, 0.3, 0.9, 0.9], [0.9, 2, 2, 2, 2]]])
    assert answers.least.tolist() == [[0.3, 0.9]]
    assert follow(answers, Cascade([128, 192], 0.5, "least")).first_ms.tolist() == [2 + 0.5 * (3 - 2) + 20]
    assert follow(answers, Cascade([128, 192], 0.3, "least")).first_ms.tolist() == [3]
    assert follow(answers, Cascade([128, 192], 0.85, "mean")).first_ms.tolist() == [3 + 20]


def test_confidence_that_tells_right_from_wrong_is_used() -> None:
    answers = perfect()
    cascade = fit(answers, 0.5)
    outcome = follow(answers, cascade)
    assert cascade.sizes == [128, 192] and 0.2 < cascade.threshold < 0.9
    assert outcome.scores.all() and (outcome.sizes == 128).mean() == pytest.approx(0.8)
    assert cascade.confidence == "least", "it is cheaper, because a rejected answer ends at its first token here"
    assert outcome.first_ms.mean() == pytest.approx(0.8 * 3 + 0.2 * (2 + 20))


def test_confidence_that_tells_nothing_is_not_used() -> None:
    random = np.random.default_rng(0)
    small, large = (random.random(2000) < share for share in (0.6, 0.95))
    answers = answers_of(np.stack([small, large], axis=1), random.random((2000, 2)))
    assert fit(answers, 0.5) == largest_only(answers)


@pytest.mark.parametrize("score", [0, 1])
def test_where_no_size_is_better_the_smallest_is_enough(score: int) -> None:
    answers = answers_of(np.full((2000, 3), score), np.random.default_rng(0).random((2000, 3)))
    assert fit(answers, 0.5) == Cascade([128], 0.0, "mean")


def test_a_small_size_that_wins_as_often_as_it_loses_is_no_certainty() -> None:
    """Equal accuracy, but one answer in five differs: 2,000 questions do not show a bound of half a point."""
    small, large = np.zeros(2000), np.zeros(2000)
    small[:200], large[200:400] = 1, 1
    answers = answers_of(np.stack([small, large], axis=1), np.full((2000, 2), 0.5))
    assert fit(answers, 0.5) == largest_only(answers)
    assert fit(answers, 5).sizes == [128]


def test_of_nearly_equal_ways_the_simplest_is_taken() -> None:
    """The second size is nearly free and right about two questions that the first is not: 0.3 % are not worth a third size.

    Both confidences are the same, and so are the times of a rejected answer.
    """
    answers = perfect()
    second = answers.scores[:, 0].copy()
    second[[80, 81]] = 1
    sure = np.where(np.arange(2000) // 2 == 40, 0.95, 0.1)
    three = answers_of(np.insert(answers.scores, 1, second, axis=1), np.insert(answers.mean, 1, sure, axis=1))
    three.first_ms[:, 0], three.whole_ms[:, 1] = three.whole_ms[0, 0], 0.01
    costs = [follow(three, Cascade(sizes, 0.5, "mean")).first_ms.mean() for sizes in ([128, 256], SIZES)]
    assert 0.99 * costs[0] < costs[1] < costs[0]
    cascade = fit(three, 0.5)
    assert (cascade.sizes, cascade.confidence) == ([128, 256], "mean")


def test_a_threshold_behind_one_that_breaks_the_bound_is_not_taken() -> None:
    """100 answers that are sure and lost, then 100 that are less sure and won: together they lose nothing, but that may be luck."""
    small, large, sure = np.zeros(2000), np.ones(2000), np.full(2000, 0.1)
    sure[:100], sure[100:200], small[100:200], large[100:200] = 0.9, 0.5, 1, 0
    answers = answers_of(np.stack([small, large], axis=1), np.stack([sure, np.ones(2000)], axis=1))
    assert lost(answers, follow(answers, Cascade([128, 192], 0.3, "mean"))).high < 4
    assert lost(answers, follow(answers, Cascade([128, 192], 0.7, "mean"))).high > 4
    answers.first_ms[:, 0] = answers.whole_ms[:, 0] = 0.1
    assert fit(answers, 4) == largest_only(answers)


def test_the_mean_may_tell_what_the_least_does_not_and_the_other_way_round() -> None:
    right = np.arange(2000) % 10 < 8
    told, untold = np.where(right, 0.9, 0.4), np.random.default_rng(0).uniform(0.4, 0.9, 2000)
    scores = np.stack([right, np.ones(2000)], axis=1)
    for mean, least, kind in ((told, untold, "mean"), (untold, told, "least")):
        answers = answers_of(scores, np.stack([mean, np.ones(2000)], axis=1), tokens=np.stack([least, np.ones(2000)], axis=1)[:, :, None])
        assert fit(answers, 0.5).confidence == kind


def test_the_bound_of_the_fit_is_that_of_the_interval() -> None:
    """Confidence orders the answers well, but not perfectly: the threshold stops where the end of the interval meets the bound."""
    random = np.random.default_rng(0)
    sure = random.random(4000)
    right = random.random(4000) < 1 - (1 - sure) ** 3
    answers = answers_of(np.stack([right, np.ones(4000)], axis=1), np.stack([sure, np.ones(4000)], axis=1))
    found = {drop: fit(answers, drop) for drop in (0.5, 1, 2, 4)}
    costs = [follow(answers, cascade).first_ms.mean() for cascade in found.values()]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    for drop, cascade in found.items():
        assert 0.6 * drop < lost(answers, follow(answers, cascade)).high <= drop


def test_too_few_questions_show_nothing_and_it_is_said_how_many_would() -> None:
    """Without a single changed answer the interval of n questions ends at about 1.96 times the root of 2, over n."""
    least = math.ceil(QUANTILE * math.sqrt(2) / 0.005)
    all_right = np.ones((100, 2))
    answers = answers_of(all_right, all_right)
    assert fit(answers, 0.5) == largest_only(answers) and questions_needed(answers, 0.5) == pytest.approx(least, abs=1)
    for count, enough in ((least, True), (least - 10, False)):
        more = answers_of(np.ones((count, 2)), np.ones((count, 2)))
        assert (fit(more, 0.5) != largest_only(more)) is enough


def test_as_many_questions_as_it_says_are_enough() -> None:
    few = perfect(300)
    few.scores[:3, 0], few.scores[3:6, 1] = 0, 0  # three lost by a cascade that trusts the small size, and three won
    needed = questions_needed(few, 1.5)
    assert fit(few, 1.5) == largest_only(few) and needed is not None and 300 < needed < 2000
    times = math.ceil(needed / 300)
    more = answers_of(np.tile(few.scores, (times, 1)), np.tile(few.mean, (times, 1)))
    assert follow(more, fit(more, 1.5)).first_ms.mean() == pytest.approx(follow(few, Cascade([128, 192], 0.5, "least")).first_ms.mean())


def test_no_number_of_questions_shows_what_is_not_there() -> None:
    wrong = answers_of(np.tile([0, 1], (500, 1)), np.full((500, 2), 0.5))
    assert questions_needed(wrong, 0.5) is None and questions_needed(perfect(), 0) is None


def test_the_interval_of_paired_answers() -> None:
    """By hand, for 30 lost and 10 won of 1,000: (f - g) / (n + 2) and the root of (p + q - (p - q) ** 2) / (n + 2)."""
    small, large = np.ones(1000), np.ones(1000)
    small[:30], large[30:40] = 0, 0
    answers = answers_of(np.stack([small, large], axis=1), np.ones((1000, 2)))
    found = lost(answers, follow(answers, Cascade([128], 0.0, "mean")))
    p, q = 31 / 1002, 11 / 1002
    half = 1.96 * math.sqrt((p + q - (p - q) ** 2) / 1002)
    assert found.points == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((100 * (p - q - half), 100 * (p - q + half)))


@pytest.mark.parametrize(("loses", "wins"), [(0.001, 0.0), (0.005, 0.002), (0.05, 0.03), (0.2, 0.2)])
def test_the_true_loss_is_seldom_above_the_interval(loses: float, wins: float) -> None:
    random = np.random.default_rng(1)
    above = 0
    for _ in range(2000):
        draw = random.random(1000)
        scores = np.stack([draw >= loses, (draw < loses) | (draw >= loses + wins)], axis=1)
        answers = answers_of(scores, np.ones((1000, 2)))
        above += lost(answers, follow(answers, Cascade([128], 0.0, "mean"))).high < 100 * (loses - wins)
    assert above / 2000 < 0.04  # of an interval of 95 %, a half of the rest is above


def test_questions_about_one_picture_count_less() -> None:
    """Four equal questions about each picture tell as much as one."""
    answers = perfect(500)
    four = answers_of(np.repeat(answers.scores, 4, axis=0), np.repeat(answers.mean, 4, axis=0), pictures=np.repeat(np.arange(500), 4))
    alone = answers_of(four.scores, four.mean)
    small = Cascade([128], 0.0, "mean")
    one, grouped, apart = (lost(each, follow(each, small)) for each in (answers, four, alone))
    assert grouped.high - grouped.low == pytest.approx(one.high - one.low, rel=0.02)
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 2, rel=0.02)


def test_a_part_counts_as_many_questions_as_it_stands_for() -> None:
    whole, half = perfect(1000), perfect(500)
    small = Cascade([128], 0.0, "mean")
    first, second = lost(whole, follow(whole, small)), lost(half, follow(half, small), count=1000)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_no_question_is_judged_by_what_its_picture_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question has a score of its own. The first half that is fitted is given the smallest size, the second the largest."""
    own = np.linspace(0, 1, 1000)
    pictures = np.arange(1000) // 4
    answers = answers_of(np.stack([own, own], axis=1), np.ones((1000, 2)), pictures=pictures)
    seen: list[set[float]] = []

    def fitted(part: Answers, drop: float, *, count: int) -> Cascade:
        assert (drop, count) == (0.5, 1000) and part.pictures.max() < len(set(part.pictures)) == 125
        seen.append(set(part.scores[:, 0].tolist()))
        return Cascade([128 if len(seen) == 1 else 192], 0.0, "mean")

    monkeypatch.setattr(cascade_fit, "fit", fitted)
    outcome, cascades = held_out(answers, 0.5)
    assert [cascade.sizes for cascade in cascades] == [[128], [192]]
    assert seen[0].isdisjoint(seen[1]) and len(seen[0] | seen[1]) == 1000
    for number, size in ((0, 192), (1, 128)):
        mine = np.isin(own, list(seen[number]))
        assert set(outcome.sizes[mine]) == {size}
        assert set(pictures[mine]).isdisjoint(pictures[~mine])
    again, _ = held_out(answers, 0.5)
    assert len(seen) == 4 and seen[2:] == seen[:2], "the halves are the same ones every time"
    assert again.scores.tolist() == outcome.scores.tolist() == own.tolist()


def test_a_fitted_threshold_seldom_loses_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 200 samples of a population whose true loss at each threshold is known: the fit may be wrong in 5 % of them."""
    monkeypatch.setattr(cascade_fit, "STEPS", 40)
    random = np.random.default_rng(2)
    drop, wrong, saved = 2.0, 0, []
    for _ in range(200):
        sure = random.random(1000)
        right = random.random(1000) < 1 - (1 - sure) ** 2
        scores = np.stack([right, random.random(1000) < 0.95], axis=1)
        answers = answers_of(scores, np.stack([sure, np.ones(1000)], axis=1))
        cascade = fit(answers, drop)
        if len(cascade.sizes) == 2:  # the small size answers from the threshold on: loses 95 % less what it has right there
            t = cascade.threshold
            wrong += 100 * (0.95 * (1 - t) - ((1 - t) - (1 - t) ** 3 / 3)) > drop
        saved.append(follow(answers, cascade).first_ms.mean() < 20)
    assert wrong <= 10
    assert np.mean(saved) > 0.5, "a fit that never dares anything would prove nothing"
