"""What a question gives back: the text, why it ended, and where the time went."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastvlm_edge.generation.generate import StopReason


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each stage; what the caller does between two pieces of a stream does not count."""

    preprocess_ms: float
    """Reading, decoding and resizing the pictures."""
    vision_ms: float
    """Encoding the pictures. 0 where they came encoded."""
    prefill_ms: float
    """From ids to the first sampled token."""
    ttft_ms: float
    """Time to first token: all of the above and the tokenizer."""
    decode_tokens_per_second: float
    """Tokens after the first; 0 where there was none."""
    prompt_tokens: int
    """Positions of the conversation before the reply, pictures included."""
    prefilled_tokens: int
    """How many of them were computed; the rest was in the cache."""
    new_tokens: int
    """Tokens of the reply."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    token_ids: list[int]
    """The ids that were sampled, without the end-of-reply id. They may run past a stop string."""
    stop_reason: StopReason
    stop_string: str | None
    """The stop string that ended the reply, if one did."""
    backend: str
    precision: str
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the figures of `timings` rounded to what a clock can tell."""
        document = dataclasses.asdict(self)
        timings: dict[str, float] = document["timings"]
        document["timings"] = {name: round(value, 3) if isinstance(value, float) else value for name, value in timings.items()}
        return document
