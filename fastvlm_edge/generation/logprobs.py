"""Log probabilities of the tokens of a reply, and of the most likely ones at their places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastvlm_edge.backends.protocol import StepOutput
from fastvlm_edge.inputs.tokenizer import TextTokenizer


@dataclass(frozen=True)
class LogProb:
    """A token and its log probability."""

    token_id: int
    text: str
    """A token may begin or end inside a character, for which U+FFFD stands."""
    bytes: list[int]
    """The token in UTF-8."""
    logprob: float
    """Natural logarithm of the model's own probability: before temperature, repetition penalty and the format of the answer."""


@dataclass(frozen=True)
class TokenLogProb(LogProb):
    """A token of a reply, and the most likely ones at its place."""

    top: list[LogProb]
    """The most likely first. The token of the reply need not be among them."""


def log_probability(output: StepOutput, row: int, token_id: int) -> float:
    """That of an id that is a candidate, or of any if the output has logits."""
    if output.logits is not None:
        value = output.logits[row, token_id]
    elif output.top_ids[row, 0] == token_id:  # nearly always
        value = output.top_values[row, 0]
    else:
        value = output.top_values[row][output.top_ids[row] == token_id][0]
    return float(value) - float(output.log_normalizer[row])


def most_likely(output: StepOutput, row: int, count: int, token_count: int) -> list[tuple[int, float]]:
    """Up to `count` ids and their log probabilities, without the padding rows of the embedding, which begin at `token_count`."""
    normalizer = float(output.log_normalizer[row])
    pairs = zip(output.top_ids[row], output.top_values[row], strict=True)
    return [(int(token_id), float(value) - normalizer) for token_id, value in pairs if token_id < token_count][:count]


def token_logprobs(
    tokenizer: TextTokenizer, token_ids: Sequence[int], log_probabilities: Iterable[float], top: Iterable[Sequence[tuple[int, float]]]
) -> list[TokenLogProb]:
    """What `log_probability` and `most_likely` gave for each of `token_ids`, with the text of the tokens."""

    def data(token_id: int) -> tuple[str, list[int]]:
        token = tokenizer.token_bytes(token_id)
        return token.decode("utf-8", "replace"), list(token)

    return [
        TokenLogProb(token_id, *data(token_id), logprob, [LogProb(other, *data(other), value) for other, value in others])
        for token_id, logprob, others in zip(token_ids, log_probabilities, top, strict=False)
    ]
