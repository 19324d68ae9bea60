"""Which cascade over image sizes is the cheapest that keeps a bound of accuracy? Arithmetic on answers at every size.

`evaluation/image_sizes.py` asks the questions. docs/eval.md explains the rule, and why it is that one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.evaluation.metrics import Floats
from fastvlm_edge.model_dir.manifest import Cascade

Kind: TypeAlias = Literal["mean", "least"]
KINDS: tuple[Kind, ...] = ("mean", "least")
QUANTILE = 1.96
"""Of the normal distribution, for a two-sided interval of 95 %."""
STEPS = 200
"""Most thresholds that are tried for one way to ask."""
SAME_COST = 0.01
"""Mean times that differ by less than this share are equal, and the simpler cascade is taken."""


@dataclass(frozen=True)
class Answers:
    """The answers to n questions at each of k sizes. The arrays are [n, k], the largest size in the last column."""

    sizes: list[int]
    scores: Floats
    """0 to 1."""
    mean: Floats
    """`Confidence.mean`. An answer without a token, which never stands, has -1."""
    tokens: Floats
    """[n, k, longest], the probability of each token, and 2 where an answer has no token any more."""
    first_ms: Floats
    """From the question to the first token, preprocessing and vision encoder included."""
    whole_ms: Floats
    """The same to the end of the answer."""
    pictures: NDArray[np.int64]
    """[n], the number of each question's picture, counted from 0. Questions about one picture are not independent."""

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def least(self) -> Floats:
        """`Confidence.least`, or -1."""
        least = self.tokens.min(axis=2, initial=2)
        return np.where(least <= 1, least, -1)

    def confidence(self, kind: Kind) -> Floats:
        """One of the two of `Confidence`."""
        return self.mean if kind == "mean" else self.least

    def rejected_ms(self, column: int, cascade: Cascade) -> Floats:
        """[n], what an answer takes that does not stand. With `least`, it ends at the first token that is too unlikely."""
        first, whole = self.first_ms[:, column], self.whole_ms[:, column]
        if cascade.confidence == "mean":
            return whole
        tokens = self.tokens[:, column]
        place, last = (tokens < cascade.threshold).argmax(axis=1), (tokens <= 1).sum(axis=1) - 1
        return np.asarray(first + (whole - first) * place / np.maximum(last, 1))

    def part(self, rows: NDArray[np.bool_]) -> Answers:
        """Those of some questions."""
        scores, mean, tokens, first, whole = (each[rows] for each in (self.scores, self.mean, self.tokens, self.first_ms, self.whole_ms))
        return Answers(self.sizes, scores, mean, tokens, first, whole, np.unique(self.pictures[rows], return_inverse=True)[1])


@dataclass(frozen=True)
class Outcome:
    """What a cascade makes of n questions: [n] each."""

    scores: Floats
    first_ms: Floats
    """To the first text that is shown. A cascade shows an answer when it stands, so a rejected one costs all of its time, and one that
    stands at any size but the last is shown at its end."""
    whole_ms: Floats
    sizes: NDArray[np.int64]
    """The size of the answer that stands."""

    def part(self, rows: NDArray[np.bool_]) -> Outcome:
        """That of some questions."""
        return Outcome(self.scores[rows], self.first_ms[rows], self.whole_ms[rows], self.sizes[rows])


@dataclass(frozen=True)
class Lost:
    """By how many points a cascade scores below the largest size: the estimate, and the ends of its 95 % interval."""

    points: float
    low: float
    high: float


def follow(answers: Answers, cascade: Cascade) -> Outcome:
    """Answer all questions by a cascade, as `FastVLM` does with `image_size="auto"`."""
    *tries, last = (answers.sizes.index(size) for size in cascade.sizes)
    confidence = answers.confidence(cascade.confidence)
    chosen = np.full(len(answers), last)
    waiting, waited = np.ones(len(answers), dtype=bool), np.zeros(len(answers))
    for column in tries:
        stands = waiting & (confidence[:, column] >= cascade.threshold)
        waiting &= ~stands
        waited += np.where(stands, answers.whole_ms[:, column], np.where(waiting, answers.rejected_ms(column, cascade), 0))
        chosen[stands] = column
    first, whole = (waited + np.where(waiting, times[:, last], 0) for times in (answers.first_ms, answers.whole_ms))
    scores = answers.scores[np.arange(len(answers)), chosen]
    return Outcome(scores, first, whole, np.array(answers.sizes, dtype=np.int64)[chosen])


def lost(answers: Answers, outcome: Outcome, *, count: int | None = None) -> Lost:
    """The points that an outcome loses to the largest size.

    The interval is the one for paired proportions of Bonett and Price (J. Educ. Behav. Stat. 37, 2012, 479-488): a normal one after one
    question lost and one won are added, so that it has a width where no answer changed. The differences are summed by picture first. With
    `count`, it is as wide as it would be with that many questions of this kind.
    """
    differences = answers.scores[:, -1] - outcome.scores
    share = 1.0 if count is None else count / len(answers)
    total = share * len(answers) + 2
    middle = share * float(differences.sum()) / total
    by_picture = np.bincount(answers.pictures, differences - middle)
    variance = (share * float(by_picture @ by_picture) + 2 + 2 * middle**2) / total**2
    half = QUANTILE * math.sqrt(variance)
    return Lost(100 * float(differences.mean()), 100 * (middle - half), 100 * (middle + half))


def fit(answers: Answers, drop: float, *, count: int | None = None) -> Cascade:
    """The cascade with the least mean time to the first token whose interval of lost points ends at `drop` or below.

    For each way to ask (which sizes, which confidence) the thresholds are tried from the highest down, and the first that breaks the bound
    is the end, so that none is taken because it was lucky (fixed-sequence testing; Angelopoulos et al., arXiv 2110.01052, section 2.3).
    The largest size alone always keeps the bound. `count` is that of `lost`.
    """
    kept = [(largest_only(answers), float(answers.first_ms[:, -1].mean()))]
    for way in _ways(answers):
        for cascade in way:
            outcome = follow(answers, cascade)
            if lost(answers, outcome, count=count).high > drop:
                break
            kept.append((cascade, float(outcome.first_ms.mean())))
    least = min(cost for _, cost in kept)
    cheap = [(cascade, cost) for cascade, cost in kept if cost <= (1 + SAME_COST) * least]
    return min(cheap, key=lambda each: (len(each[0].sizes), KINDS.index(each[0].confidence), each[1]))[0]


def largest_only(answers: Answers) -> Cascade:
    """The cascade that is none: every question at the largest size."""
    return Cascade(answers.sizes[-1:], 0.0, "mean")


def held_out(answers: Answers, drop: float, *, seed: int = 0) -> tuple[Outcome, list[Cascade]]:
    """Every question answered by the cascade that was fitted to the half without its picture, and the two cascades.

    The halves are chosen at random. Each is fitted as if it had as many questions as both, so that the cascades are about as bold as that
    of all questions, which they stand for.
    """
    second = (np.random.default_rng(seed).permutation(int(answers.pictures.max()) + 1) % 2 == 1)[answers.pictures]
    cascades = [fit(answers.part(half), drop, count=len(answers)) for half in (~second, second)]
    by_first, by_second = (follow(answers, cascade) for cascade in cascades)
    outcome = Outcome(
        np.where(second, by_first.scores, by_second.scores),
        np.where(second, by_first.first_ms, by_second.first_ms),
        np.where(second, by_first.whole_ms, by_second.whole_ms),
        np.where(second, by_first.sizes, by_second.sizes),
    )
    return outcome, cascades


def questions_needed(answers: Answers, drop: float) -> int | None:
    """About how many questions of this kind would show the bound for a useful cascade, if what is seen here is true.

    Useful is the cheapest one that loses at most half of `drop` here and costs less than the largest size. None if there is no such one.
    """
    cheapest, found = float(answers.first_ms[:, -1].mean()), None
    for way in _ways(answers):
        for cascade in way:
            outcome = follow(answers, cascade)
            if outcome.first_ms.mean() < cheapest and 100 * float((answers.scores[:, -1] - outcome.scores).mean()) <= drop / 2:
                cheapest, found = float(outcome.first_ms.mean()), outcome
    if found is None or not (room := drop / 100 - float((answers.scores[:, -1] - found.scores).mean())) > 0:
        return None
    differences = answers.scores[:, -1] - found.scores
    by_picture = np.bincount(answers.pictures, differences - differences.mean())
    variance, wanted = float(by_picture @ by_picture) / len(answers), (room / QUANTILE) ** 2
    return math.ceil((variance + math.sqrt(variance**2 + 8 * wanted)) / (2 * wanted))  # wanted = variance / n + 2 / n ** 2


def _ways(answers: Answers) -> Iterator[Iterator[Cascade]]:
    """For each choice of sizes and confidence, the cascades from the highest threshold down."""
    for number in range(1, len(answers.sizes) + 1):
        for sizes in combinations(answers.sizes, number):
            for kind in KINDS if number > 1 else KINDS[:1]:
                yield (Cascade(list(sizes), threshold, kind) for threshold in _thresholds(answers, sizes[:-1], kind))


def _thresholds(answers: Answers, tries: Sequence[int], kind: Kind) -> list[float]:
    """Values between those that occur, so that a small difference of arithmetic on another device changes no answer; 0 is the last."""
    if not tries:
        return [0.0]
    seen = np.unique(answers.confidence(kind)[:, [answers.sizes.index(size) for size in tries]])
    between = (seen[1:] + seen[:-1]) / 2
    if len(between) > STEPS:
        between = between[np.linspace(0, len(between) - 1, STEPS).round().astype(int)]
    return [*(float(each) for each in between[::-1] if each > 0), 0.0]
