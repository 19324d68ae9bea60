"""Sampling against a plain implementation over the whole row, as transformers defines it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.generation.sampling import Sampler, SamplingParams

VOCAB, COUNT = 300, 290


def row(seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def candidates(logits: Any) -> tuple[Any, Any]:
    ids = np.argsort(-logits, kind="stable")[:64]
    return logits[ids], ids


def probabilities(logits: Any, *, temperature: float, top_k: int, top_p: float) -> Any:
    """Temperature, then top-k, then top-p, each on the whole row (the order of transformers)."""
    scores = logits[:COUNT].astype(np.float64) / temperature
    scores[scores < np.sort(scores)[-top_k]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("seed", range(20))
def test_greedy_takes_the_largest_that_is_a_token(seed: int) -> None:
    logits = row(seed)
    logits[COUNT:] += 5 * (seed % 2)
    assert Sampler(SamplingParams(), COUNT).next(*candidates(logits)) == int(logits[:COUNT].argmax())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 64, 1.0), (0.7, 5, 1.0), (1.5, 64, 0.6), (1.0, 20, 0.9), (1.0, 1, 1.0), (2.0, 64, 0.01)]
)
def test_the_distribution_is_that_of_the_whole_row(temperature: float, top_k: int, top_p: float) -> None:
    logits = row(3)
    logits[:COUNT] *= 1.5  # nothing of weight lies beyond 64 candidates
    expected = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=1), COUNT)
    values, ids = candidates(logits)
    draws = 8000
    counts = np.bincount([sampler.next(values, ids) for _ in range(draws)], minlength=COUNT)
    assert not counts[expected == 0].any()
    assert np.abs(counts / draws - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_a_seed_repeats_and_another_differs() -> None:
    values, ids = candidates(row(1) / 3)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), COUNT)
        return [sampler.next(values, ids) for _ in range(50)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    values, ids = candidates(row(1))
    with np.errstate(over="raise", invalid="raise"):
        assert Sampler(SamplingParams(temperature=1e-6, seed=0), COUNT).next(values, ids) == int(ids[ids < COUNT][0])


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.8])
def test_repetition_penalty_is_exact_over_the_whole_row(penalty: float) -> None:
    for seed in range(20):
        logits = row(seed)
        prompt = np.random.default_rng(seed + 99).integers(0, VOCAB + 50, 150).tolist()  # some are picture ids
        sampler = Sampler(SamplingParams(repetition_penalty=penalty), COUNT, prompt)
        said = {i for i in prompt if i < COUNT}
        for _ in range(5):
            scores = logits[:COUNT].copy()
            for token_id in said:
                scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
            chosen = sampler.next(*candidates(logits), logits)
            assert chosen == int(scores.argmax())
            said.add(chosen)


def test_padding_rows_are_never_drawn() -> None:
    logits = row(0)
    logits[COUNT:] = 50
    values, ids = candidates(logits)
    for penalty in (1.0, 1.5):
        sampler = Sampler(SamplingParams(temperature=3.0, seed=0, repetition_penalty=penalty), COUNT)
        assert max(sampler.next(values, ids, logits) for _ in range(300)) < COUNT


def test_output_that_cannot_be_sampled() -> None:
    ids = np.arange(64)
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingParams(temperature=temperature), COUNT)
        with pytest.raises(FastVLMError, match="not finite"):
            sampler.next(np.full(64, np.nan, np.float32), ids)
        with pytest.raises(FastVLMError, match="none of the candidates is a token"):
            sampler.next(np.zeros(64, np.float32), ids + COUNT)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; give a number that is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0; give an integer"),
        ({"top_k": 65}, "top_k is 65, but the model gives only 64 candidates; give at most 64"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324"),
        ({"repetition_penalty": 1e30}, r"repetition_penalty is 1e\+30"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"stop": [""]}, "stop string ''"),
        ({"stop": [3]}, "stop string 3"),
        ({"stop": "a" * 1025}, "stop string has 1025 characters"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(FastVLMError, match=says):
        SamplingParams(**values)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
