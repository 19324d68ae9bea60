"""Chooses the next id from the candidates of one position: greedy, or with temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer_format import AnswerFormat

MAX_TOP_K = 64
"""The decoder graph outputs this many candidates (`top_values`, `top_ids`); sampling chooses among them."""
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
"""Beyond these, logits times or divided by the penalty may leave float32."""
MAX_STOP_CHARACTERS = 1024
"""Of a stop string. Every piece of a reply is compared with all beginnings of it."""
MAX_LOGPROBS = 20
"""Most alternatives of each token in a reply, as in the OpenAI API."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a reply are chosen, where it ends and what it shows. Raises FastVLMError if a value is out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 always takes the most likely token (greedy)."""
    top_k: int | None = None
    """Sample from the k most likely tokens. The maximum is 64, and None means 64."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to p (nucleus sampling)."""
    seed: int | None = None
    """The same seed gives the same reply; None takes a random one."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens less likely that are in the prompt or the reply already (arXiv 1909.05858, section 4.1)."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these strings."""
    special_tokens: bool = False
    """Read special tokens in the prompt, such as `<loc_12>` of a fine-tune, as tokens, and show those in the reply.

    Otherwise a prompt holds their characters, so that text of others can never give control tokens, and a reply leaves them out.
    """
    logprobs: int | None = None
    """Let the reply have the log probability of each token, and this many of the most likely tokens at its place, 0 to 20."""
    format: AnswerFormat | None = None
    """What the reply must look like."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", stop_strings(self.stop))
        check_integer("max_new_tokens", self.max_new_tokens, least=1)
        _check_number("temperature", self.temperature, "that is 0 (greedy) or larger", lambda value: value >= 0)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, least=1)
            if self.top_k > MAX_TOP_K:
                raise FastVLMError(f"top_k is {self.top_k}, but the model gives only {MAX_TOP_K} candidates", f"give at most {MAX_TOP_K}")
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        if self.seed is not None:
            check_integer("seed", self.seed, least=0)
        if not isinstance(self.special_tokens, bool):
            raise FastVLMError(f"special_tokens is {self.special_tokens!r}", "give True or False")
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, least=0)
            if self.logprobs > MAX_LOGPROBS:
                raise FastVLMError(f"logprobs is {self.logprobs}", f"give at most {MAX_LOGPROBS}")
        if not isinstance(self.format, (AnswerFormat, type(None))):
            raise FastVLMError(f"format is a {type(self.format).__name__}", "give one that answer_format made, or None")
        _check_number(
            "repetition_penalty",
            self.repetition_penalty,
            f"from {LEAST_PENALTY:g} to {MOST_PENALTY:g} (1 means no penalty)",
            lambda value: LEAST_PENALTY <= value <= MOST_PENALTY,
        )

    @property
    def wants_logits(self) -> bool:
        """Whether sampling needs the logits of all tokens: a penalty can move other tokens among the 64 most likely."""
        return self.repetition_penalty != 1


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The strings before which a reply ends, from what a caller may give: one, several, or None for no stop.

    Raises FastVLMError for anything else.
    """
    strings = () if stop is None else (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise FastVLMError(f"the stop string {string!r} is not a string of at least one character")
        if len(string) > MAX_STOP_CHARACTERS:
            raise FastVLMError(f"a stop string has {len(string)} characters", f"give at most {MAX_STOP_CHARACTERS}")
    return strings


def check_integer(name: str, value: Any, *, least: int) -> None:
    """Raise FastVLMError unless `value` is an integer of at least `least`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise FastVLMError(f"{name} is {value!r}", f"give an integer of at least {least}")


def _check_number(name: str, value: Any, expected: str, in_range: Callable[[float], bool]) -> None:
    if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value) or not in_range(float(value)):
        raise FastVLMError(f"{name} is {value!r}", f"give a number {expected}")


class Sampler:
    """Chooses the ids of one reply. Ids from `token_count` on are padding rows of the embedding and are never chosen."""

    def __init__(self, params: SamplingParams, token_count: int, prompt_ids: Iterable[int] = ()) -> None:
        """The repetition penalty applies to the text tokens of `prompt_ids` as well as to the reply."""
        self._params = params
        self._token_count = token_count
        self._said = {token_id for token_id in prompt_ids if token_id < token_count} if params.wants_logits else set()
        self._random = np.random.default_rng(params.seed)

    def next(self, top_values: NDArray[Any], top_ids: NDArray[Any], logits: NDArray[Any] | None = None) -> int:
        """The next id.

        `top_values` and `top_ids` are [candidates], in descending order. `logits` [vocab] is needed with a repetition penalty only.
        Raises FastVLMError if no candidate is a token, or the output of the model is not finite.
        """
        params = self._params
        if params.wants_logits:
            if logits is None:
                raise ValueError("a repetition penalty needs the logits of all tokens")
            top_values, top_ids = self._penalised(logits)
        choose = self._first_token if params.temperature == 0 else self._draw
        chosen = choose(top_values, top_ids)
        if params.wants_logits:
            self._said.add(chosen)
        return chosen

    def _first_token(self, top_values: NDArray[Any], top_ids: NDArray[Any]) -> int:
        for value, token_id in zip(top_values, top_ids, strict=True):
            if token_id < self._token_count:
                if not math.isfinite(value):
                    break
                return int(token_id)
        raise _no_candidate(top_values)

    def _draw(self, top_values: NDArray[Any], top_ids: NDArray[Any]) -> int:
        real = (top_ids < self._token_count) & (top_values != -np.inf)  # a grammar masks with -inf
        ids = top_ids[real][: self._params.top_k]
        values = top_values[real][: self._params.top_k].astype(np.float64)
        if not len(ids) or not math.isfinite(values[0]):
            raise _no_candidate(top_values)
        weights = np.exp((values - values[0]) / self._params.temperature)
        cumulative = np.cumsum(weights / weights.sum())
        kept = min(int(np.searchsorted(cumulative, self._params.top_p)) + 1, len(ids))  # including the one that reaches p
        point = self._random.random() * cumulative[kept - 1]
        return int(ids[min(int(np.searchsorted(cumulative[:kept], point, side="right")), kept - 1)])

    def _penalised(self, logits: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The candidates after the penalty: positive logits of tokens already used are divided by it, negative ones multiplied."""
        scores = np.array(logits[: self._token_count], dtype=np.float32)
        said = np.fromiter(self._said, dtype=np.int64, count=len(self._said))
        penalty = np.float32(self._params.repetition_penalty)
        scores[said] = np.where(scores[said] > 0, scores[said] / penalty, scores[said] * penalty)
        count = min(MAX_TOP_K, len(scores))
        ids = np.argpartition(-scores, count - 1)[:count]
        ids = ids[np.lexsort((ids, -scores[ids]))]
        return scores[ids], ids


def _no_candidate(top_values: NDArray[Any]) -> FastVLMError:
    if not np.isfinite(top_values[:1]).all():
        return FastVLMError(
            "the output of the model is not finite (overflow)",
            "run once with --verify, which finds damaged files, or convert with another --precision",
        )
    return FastVLMError(
        "none of the candidates is a token of the vocabulary: the model directory is damaged", "convert the checkpoint again"
    )
