"""The loop from ids to text: prefill, then sample, decode and detokenise until the reply ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

from fastvlm_edge.backends.protocol import PREFILL_CHUNK, ImageFeatures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.sampling import Sampler, SamplingParams
from fastvlm_edge.generation.session import Session
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.stop_strings import StopStrings
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

StopReason = Literal["stop", "length", "context", "cancelled"]
"""`stop`: the model or a stop string ended the reply. `length`: it has max_new_tokens tokens. `context`: the context is full.
`cancelled`: the caller closed the stream."""


class Generation:
    """One reply while it is generated: iterate for its text. The attributes are valid at any time, also after an exception."""

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...],
        params: SamplingParams,
        *,
        reuse: bool = False,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        """`ids` is the whole conversation up to where the reply begins, and must leave room in the context (`check_room`).

        With `reuse`, the beginning that the cache already holds is not computed again. `chunk` is the number of positions per prefill call.
        """
        self._session, self._tokenizer, self._manifest = session, tokenizer, manifest
        self._ids, self._image_features, self._params = ids, image_features, params
        self._reuse, self._chunk = reuse, chunk
        self.token_ids: list[int] = []
        """Ids of the reply so far, without the one that ended it."""
        self.pieces: list[str] = []
        """Text of the reply so far."""
        self.stop_reason: StopReason = "cancelled"
        self.stop_string: str | None = None
        self.prefill_seconds = 0.0
        self.prefilled_tokens = 0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def __iter__(self) -> Iterator[str]:
        """Prefill, then sample and decode. Yields text as soon as a character is complete and cannot belong to a stop string."""
        params, text = self._params, self._manifest.text
        sampler = Sampler(params, text.token_count, self._ids)
        detokenizer, stops = Detokenizer(self._tokenizer, special_tokens=params.special_tokens), StopStrings(params.stop)

        began = time.perf_counter()
        ticket, output, self.prefilled_tokens = self._session.prefill(
            self._ids, self._image_features, reuse=self._reuse, chunk=self._chunk, want_logits=params.wants_logits
        )
        while True:
            logits = None if output.logits is None else output.logits[-1]
            token_id = sampler.next(output.top_values[-1], output.top_ids[-1], logits)
            self._count(time.perf_counter() - began)
            if token_id in text.stop_ids:
                self.stop_reason = "stop"
                break
            self.token_ids.append(token_id)
            yield from self._said(stops.push(detokenizer.push(token_id)))
            if self._ended(stops):
                break
            began = time.perf_counter()
            output = self._session.decode(ticket, token_id, want_logits=params.wants_logits)
        tail = stops.push(detokenizer.flush()) + stops.flush()
        self.stop_string = stops.found
        yield from self._said(tail)

    def _said(self, text: str) -> Iterator[str]:
        if text:
            self.pieces.append(text)
            yield text

    def _count(self, seconds: float) -> None:
        """Count the time until an id was sampled: the first id is the end of prefill, every other one a decode step."""
        if self.prefill_seconds:
            self.decode_seconds += seconds
            self.decode_steps += 1
        else:
            self.prefill_seconds = seconds

    def _ended(self, stops: StopStrings) -> bool:
        if stops.found is not None:
            self.stop_reason = "stop"
        elif len(self.token_ids) >= self._params.max_new_tokens:
            self.stop_reason = "length"
        elif len(self._ids) + len(self.token_ids) >= self._manifest.decoder.context:
            self.stop_reason = "context"
        else:
            return False
        return True


def check_room(ids: Sequence[int], manifest: Manifest) -> None:
    """Raise FastVLMError if a conversation leaves no position for a reply."""
    context, vocab = manifest.decoder.context, manifest.decoder.vocab
    if len(ids) < context:
        return
    visual = sum(token_id >= vocab for token_id in ids)
    remedy = "shorten the prompt" if len(ids) - visual >= context // 2 else "use fewer images"
    raise FastVLMError(
        f"the conversation has {len(ids)} tokens ({visual} of them visual), which leaves no room for a reply in the context of {context}",
        f"{remedy}, start a new conversation, or convert with a larger --context",
    )
