"""How many answers a quantised model loses, before any graph is written: PyTorch on the dequantised weights, one reading for all questions.

A greedy answer is the known one exactly when, along the known answer, every position prefers its next id. So one pass over question and
answer decides, and nothing has to be generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.reference.decoder import Passage, Weights, reference_choices

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """Ids of a question about one picture and of its answer."""

    ids: list[int]
    answer: int
    """Where the answer begins in `ids`."""
    known: bool
    """Whether the answer is one that the data gives; otherwise it only carries the comparison along."""

    @property
    def positions(self) -> range:
        """Whose logits choose the answer's ids."""
        return range(self.answer - 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Score:
    """Of one model on all questions."""

    choices: list[npt.NDArray[np.int64]]
    """The preferred id at every position of every question."""
    exact_match: float | None
    """0 to 1, over questions with known answers; None where there are none."""

    def agreement(self, other: Score) -> float:
        """Share of positions where both prefer the same id, 0 to 1."""
        same = [mine == theirs for mine, theirs in zip(self.choices, other.choices, strict=True)]
        return float(np.concatenate(same).mean())


def score(weights: Weights, questions: Sequence[Question], features: Sequence[Float32], advance: Callable[[], None]) -> Score:
    """Ask a model; `features` [tokens, hidden] of each question's picture."""
    passages = [Passage(q.ids, rows, q.positions) for q, rows in zip(questions, features, strict=True)]
    choices = reference_choices(weights, passages, advance)
    right = [bool((chosen == q.ids[q.answer :]).all()) for chosen, q in zip(choices, questions, strict=True) if q.known]
    return Score(choices, float(np.mean(right)) if right else None)


def drop(before: Score, after: Score) -> float:
    """Points lost, of 100: of exact match where the answers are known and the model knows some, else of agreement."""
    if before.exact_match and after.exact_match is not None:
        return 100 * (before.exact_match - after.exact_match)
    return 100 * (1 - before.agreement(after))
