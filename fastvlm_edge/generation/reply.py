"""The result of a question: the text, why it ended, and where the time went."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvlm_edge.generation.answer import StopReason
from fastvlm_edge.generation.logprobs import TokenLogProb


@dataclass(frozen=True)
class Timings:
    """Time of each stage. Time that the caller spends between two pieces of a stream is not counted."""

    preprocess_ms: float
    """Reading, decoding and resizing the images."""
    vision_ms: float
    """Running the vision encoder; 0 if every image was an `EncodedImage`, or encoded for an earlier question."""
    queue_ms: float
    """Waiting until the model had room for this question."""
    prefill_ms: float
    """From then to the first sampled token, the steps of other conversations in between included."""
    ttft_ms: float
    """Time to first token: the four above plus the tokenizer. With `Reply.tried_sizes`, the time until the first text is shown, that of all
    sizes included; all other figures are those of the last one."""
    decode_tokens_per_second: float
    """Speed of all tokens after the first; 0 if there was only one."""
    prompt_tokens: int
    """Positions of the conversation before the reply, visual tokens included."""
    cached_tokens: int
    """How many of `prompt_tokens` were in the KV cache already."""
    prefilled_tokens: int
    """How many of them were computed: the others."""
    cached_images: int
    """How many images were encoded for an earlier question, and still known by their content."""
    new_tokens: int
    """Number of tokens in the reply."""


@dataclass(frozen=True)
class Confidence:
    """How likely the model found the tokens of its reply: probabilities, 0 to 1. They are not calibrated."""

    mean: float
    """Geometric mean: exp of the mean log probability."""
    least: float
    """That of the least likely token."""


def confidence(log_probabilities: Sequence[float]) -> Confidence | None:
    """From the natural logarithms of the probabilities of all tokens; None without a token."""
    if not log_probabilities:
        return None
    return Confidence(math.exp(math.fsum(log_probabilities) / len(log_probabilities)), math.exp(min(log_probabilities)))


@dataclass(frozen=True)
class Reply:
    """The answer to a question."""

    text: str
    token_ids: list[int]
    """The sampled ids, without the id that ended the reply. They may extend past a stop string."""
    stop_reason: StopReason
    stop_string: str | None
    """The stop string that ended the reply, if one did."""
    confidence: Confidence | None
    """Of `token_ids`; None if there is none."""
    logprobs: list[TokenLogProb] | None
    """Of `token_ids`, if `logprobs` was given."""
    backend: str
    """`ort`, `ort-cuda` or `tensorrt`."""
    precision: str
    """The precision the model was converted with, such as `int4`."""
    timings: Timings
    dropped_turns: int = 0
    """How many turns left a chat with `context="slide"` so that this one had room."""
    image_size: int | None = None
    """Pixels of a side of the newest picture in the conversation, as the model saw it; None without a picture."""
    tried_sizes: list[int] = field(default_factory=list)
    """The sizes at which the question was asked with `image_size="auto"`, in order; the answer is that at the last one. Empty if no cascade
    decided."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object. The times in it are rounded to 3 decimals."""
        document = dataclasses.asdict(self)
        timings: dict[str, float] = document["timings"]
        document["timings"] = {name: round(value, 3) if isinstance(value, float) else value for name, value in timings.items()}
        return document
