"""Distances between what two programs compute for the same input: whole arrays, rows of logits, and visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TOP = 256
"""Number of logits of a row that are kept, the largest ones: 2 KB instead of the 600 KB of the whole row."""
SMALLEST_SHARE = 1e-7
"""Shares of the softmax below this are rounding errors of float32."""
NORMALIZER_ERROR = 0.01
"""Accepted error of log_normalizer in nats."""


@dataclass(frozen=True)
class Difference:
    """Difference between two arrays, `found` and `expected`."""

    cosine: float
    """Cosine similarity."""
    largest: float
    """Largest absolute difference."""
    relative: float
    """Norm of the difference divided by the norm of the expected values."""


def compare(found: Float32, expected: Float32) -> Difference:
    """Compare two arrays of the same shape, in double precision."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    difference = a - b
    return Difference(
        cosine=float(a @ b) / norms if norms else float(not difference.any()),
        largest=float(np.abs(difference).max()),
        relative=float(np.linalg.norm(difference) / max(float(np.linalg.norm(b)), 1e-30)),
    )


@dataclass(frozen=True)
class Rows:
    """Rows of logits, as far as a comparison needs them."""

    ids: NDArray[np.int32]
    """[rows, TOP]: the ids of the largest logits, in descending order of these."""
    values: Float32
    """[rows, TOP]: their logits."""
    normalizer: Float32
    """[rows]: log(sum(exp(logits))) of the whole row."""

    def __getitem__(self, index: int) -> Rows:
        """One row, as an object with one row."""
        part = slice(index, index + 1)
        return Rows(self.ids[part], self.values[part], self.normalizer[part])


def top_rows(logits: Float32) -> Rows:
    """The rows of logits [rows, vocab], or of a smaller vocabulary the whole rows."""
    count = min(TOP, logits.shape[1])
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(logits, ids, 1)
    return Rows(ids.astype(np.int32), values.astype(np.float32), log_sum_exp(logits).astype(np.float32))


def log_sum_exp(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """log(sum(exp(logits))) of each row [rows, vocab], in double precision."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # of infinities
        normalizer: NDArray[np.float64] = np.log(np.exp(wide - largest).sum(axis=1)) + largest[:, 0]
    return normalizer


def divergence(found: Float32, expected: Rows) -> float:
    """KL divergence in nats from the softmax of the single row `expected` to that of logits [vocab].

    All ids beyond the TOP of the expected row count as one, which gives a lower bound of the divergence.
    """
    log_p = (expected.values[0] - expected.normalizer[0]).astype(np.float64)
    log_q = found[expected.ids[0]].astype(np.float64) - log_sum_exp(found[None])[0]
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = (max(1.0 - float(shares.sum()), SMALLEST_SHARE) for shares in (p, q))
    return max(float((p * (log_p - log_q)).sum()) + rest_p * math.log(rest_p / rest_q), 0.0) if np.isfinite(log_q).all() else math.inf


def regret(found: Float32, expected: Rows) -> float:
    """By how much the expected row prefers its own largest logit to that of logits [vocab]; 0 if both are the same id."""
    ids, values = expected.ids[0], expected.values[0]
    where = np.flatnonzero(ids == int(found.argmax()))
    return float(values[0] - values[where[0] if len(where) else -1])


def in_steps(difference: float, row: Rows, step: float) -> float:
    """A difference of logits in steps of a float type at the size of the single row; `step` is that of the type near 1."""
    return difference / (step * 2.0 ** math.floor(math.log2(spread(row))))


def spread(row: Rows) -> float:
    """Size of the single row of logits, for its rounding errors: the largest logit that is kept less the smallest, at least 1.

    A shift of the whole row, which the softmax ignores, does not change it.
    """
    return max(float(row.values[0, 0] - row.values[0, -1]), 1.0)


def cache_errors(found: Float32, expected: Float32) -> Float32:
    """How far the keys and values of each position [layers, 2, kv_heads, positions, head_dim] are from those expected: [positions].

    For each layer, and for keys and values apart: the norm of the difference, divided by the larger norm of both. Of these the largest,
    which is 1 where one of both is empty.
    """
    size = np.maximum(*(np.square(array).sum(axis=(2, 4)) for array in (found, expected)))
    error = np.square(found - expected).sum(axis=(2, 4)) / np.maximum(size, 1e-30)
    worst: Float32 = np.sqrt(error.max(axis=(0, 1)))
    return worst


def cosines(found: Float32, expected: Float32) -> NDArray[np.float64]:
    """Cosine similarity of each visual token [tokens, hidden] after subtracting the mean of the expected tokens.

    All tokens of a picture have much in common; without the mean, two of them would be similar.
    """
    a, b = found.astype(np.float64), expected.astype(np.float64)
    mean = b.mean(axis=0)
    a, b = a - mean, b - mean
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    similar: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return similar


def candidates_fault(logits: Float32, top_values: Float32, top_ids: NDArray[np.int64], log_normalizer: float) -> str | None:
    """What is wrong with the outputs that a graph derives from its logits [vocab], as a clause; None if they agree with them."""
    count = len(top_ids)
    if len(set(top_ids.tolist())) < count or not ((top_ids >= 0) & (top_ids < len(logits))).all():
        return "top_ids has an id twice, or one outside the vocabulary"
    largest = np.partition(logits, -count)[-count:]
    if not np.array_equal(logits[top_ids], top_values) or not np.array_equal(np.sort(largest)[::-1], top_values):
        return f"top_values are not the {count} largest logits"
    wanted = float(log_sum_exp(logits[None])[0])
    if not abs(log_normalizer - wanted) <= NORMALIZER_ERROR:
        return f"log_normalizer is {log_normalizer:.4f}, but its logits give {wanted:.4f}"
    return None
