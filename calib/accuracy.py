"""How much accuracy a quantised model loses: by the arithmetic of a GPU, before any graph is written, and by onnxruntime on this CPU.

Greedy decoding gives the known answer exactly if every position along that answer prefers its next id. So one pass over question and answer
is enough, nothing is generated, and PyTorch reads the weights once for all questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.convert.reference.decoder import EXACT, Arithmetic, Passage, Weights, reference_choices

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """The ids of a question about one picture, followed by those of its answer."""

    ids: list[int]
    answer: int
    """Index in `ids` where the answer begins."""
    known: bool
    """Whether the answer comes from the data. A stock answer only serves to compare two models along it."""

    @property
    def positions(self) -> range:
        """The positions whose logits choose the ids of the answer."""
        return range(self.answer - 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Score:
    """The result of one model on all questions."""

    choices: list[npt.NDArray[np.int64]]
    """For every question, the preferred id at each of its `positions`."""
    exact_match: float | None
    """Share of the known answers that greedy decoding gives, 0 to 1; None if no answer is known."""

    def agreement(self, other: Score) -> float:
        """Share of positions where both models prefer the same id, 0 to 1."""
        same = [mine == theirs for mine, theirs in zip(self.choices, other.choices, strict=True)]
        return float(np.concatenate(same).mean())


def score(
    weights: Weights,
    questions: Sequence[Question],
    features: Sequence[Float32],
    advance: Callable[[], None],
    arithmetic: Arithmetic = EXACT,
) -> Score:
    """Run the decoder `weights` on all questions. `features` are the image features [tokens, hidden] of each question's picture.

    `advance` is called once for each layer.
    """
    passages = [Passage(q.ids, rows, q.positions) for q, rows in zip(questions, features, strict=True)]
    return _score(reference_choices(weights, passages, advance, arithmetic), questions)


def score_backend(backend: OrtBackend, questions: Sequence[Question], pictures: Sequence[Float32], advance: Callable[[], None]) -> Score:
    """Ask a backend all questions as a user would: the question as a prefill, the ids of the answer one by one.

    `pictures` are the pixel_values [1, 3, size, size] of each question. `advance` is called once for each question.
    """
    choices = []
    for question, pixels in zip(questions, pictures, strict=True):
        features = (backend.encode(pixels),)
        backend.reset()
        chosen = [backend.step(question.ids[: question.answer], features).top_ids[-1, 0]]
        chosen += [backend.step([token], features).top_ids[-1, 0] for token in question.ids[question.answer : -1]]
        choices.append(np.array(chosen, np.int64))
        advance()
    backend.reset()
    return _score(choices, questions)


def _score(choices: list[npt.NDArray[np.int64]], questions: Sequence[Question]) -> Score:
    right = [bool((chosen == q.ids[q.answer :]).all()) for chosen, q in zip(choices, questions, strict=True) if q.known]
    return Score(choices, float(np.mean(right)) if right else None)


def points_lost(before: Score, after: Score) -> float:
    """Percentage points that `after` loses: of exact match if the data has answers and `before` gives some, otherwise of agreement."""
    if before.exact_match and after.exact_match is not None:
        return 100 * (before.exact_match - after.exact_match)
    return 100 * (1 - before.agreement(after))
