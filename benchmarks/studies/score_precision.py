"""How much of the attention goes to the wrong keys, by the size of the scores and the type that they pass through.

Question: Up to which attention score may the decoder round scores to FP16 or BF16 before the softmax?
Verdict: up to 32 in FP16 and 4 in BF16, where 0.2 % and 0.1 % of the attention are misplaced (convert/precision.py, LARGEST_SCORE). At 2,000
it is 11 % and 60 %; with FP32 scores, 4 % and 39 % remain, from the rounding of keys and queries.
Ran: 2026-11-28, at commit b1e1631 (record: benchmarks/results/score_precision.json).
Command at that commit: python -m benchmarks.studies.score_precision

Qwen2 has large biases on keys: they add nearly the same number to the scores of all keys, and what tells the keys apart is small beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "score_precision.json"
SCORES = (4, 8, 16, 32, 64, 128, 500, 2000)
TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
QUERIES, KEYS, CHANNELS, BIASED = 400, 1024, 64, 16
DEVIATION = 3.0
"""Of the part of the scores that differs from key to key; smaller for the smallest scores."""


def measure(score: float, rng: np.random.Generator) -> dict[str, Any]:
    """Attention misplaced, 0 to 1, for scores whose largest is `score`."""
    spread = min(DEVIATION, score / 4)
    common = score - 3 * spread  # the largest of 1,024 normal values is about three deviations above their mean
    query = np.zeros((QUERIES, CHANNELS))
    key = np.zeros((KEYS, CHANNELS))
    query[:, :BIASED] = key[:, :BIASED] = np.sqrt(common / BIASED)
    key[:, :BIASED] *= 1 + 1e-3 * rng.uniform(-1, 1, (KEYS, BIASED))  # what a slow rotation by the position changes
    query[:, BIASED:] = rng.standard_normal((QUERIES, CHANNELS - BIASED)) * spread / np.sqrt(CHANNELS - BIASED)
    key[:, BIASED:] = rng.standard_normal((KEYS, CHANNELS - BIASED))
    query *= score / np.abs(query @ key.T).max()
    scores = query @ key.T
    exact = softmax(scores)
    row: dict[str, Any] = {"score": score}
    for name, dtype in TYPES.items():
        narrow = softmax(scores.astype(np.float32).astype(dtype).astype(np.float64))
        inputs = softmax(query.astype(dtype).astype(np.float64) @ key.astype(dtype).astype(np.float64).T)
        row[name] = {
            "scores": rounded(misplaced(exact, narrow)),
            "top_kept": rounded(float((exact.argmax(1) == narrow.argmax(1)).mean())),
            "keys_and_queries": rounded(misplaced(exact, inputs)),
        }
    return row


def softmax(scores: Any) -> Any:
    share = np.exp(scores - scores.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def misplaced(exact: Any, found: Any) -> float:
    """Total variation distance, the mean over all queries."""
    return float(np.abs(exact - found).sum(1).mean() / 2)


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    rng = np.random.default_rng(0)
    document = {
        "what": "share of the attention that goes to other keys than in float64, mean over queries",
        "queries": QUERIES,
        "keys": KEYS,
        "deviation": DEVIATION,
        "results": [measure(float(score), rng) for score in SCORES],
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
