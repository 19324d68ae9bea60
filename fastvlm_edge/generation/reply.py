"""The result of a question: the text, why it ended, and where the time went."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastvlm_edge.generation.generate import StopReason


@dataclass(frozen=True)
class Timings:
    """Time of each stage. Time that the caller spends between two pieces of a stream is not counted."""

    preprocess_ms: float
    """Reading, decoding and resizing the images."""
    vision_ms: float
    """Running the vision encoder; 0 if every image was an `EncodedImage`."""
    prefill_ms: float
    """From the ids of the conversation to the first sampled token."""
    ttft_ms: float
    """Time to first token: the three above plus the tokenizer."""
    decode_tokens_per_second: float
    """Speed of all tokens after the first; 0 if there was only one."""
    prompt_tokens: int
    """Positions of the conversation before the reply, visual tokens included."""
    prefilled_tokens: int
    """How many of `prompt_tokens` were computed; the others were in the KV cache already."""
    new_tokens: int
    """Number of tokens in the reply."""


@dataclass(frozen=True)
class Reply:
    """The answer to a question."""

    text: str
    token_ids: list[int]
    """The sampled ids, without the id that ended the reply. They may extend past a stop string."""
    stop_reason: StopReason
    stop_string: str | None
    """The stop string that ended the reply, if one did."""
    backend: str
    """`ort`, `ort-cuda` or `tensorrt`."""
    precision: str
    """The precision the model was converted with, such as `int4`."""
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """A JSON object. The times in it are rounded to 3 decimals."""
        document = dataclasses.asdict(self)
        timings: dict[str, float] = document["timings"]
        document["timings"] = {name: round(value, 3) if isinstance(value, float) else value for name, value in timings.items()}
        return document
