"""The loop from ids to text: prefill, then sample, decode, detokenise until something ends the reply."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fastvlm_edge.backends.protocol import ImageFeatures
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.sampling import Sampler, SamplingParams
from fastvlm_edge.generation.session import PREFILL_CHUNK, Session
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.stop_strings import StopStrings
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

StopReason = Literal["stop", "length", "context", "cancelled"]
"""`stop`: the model ended its reply, or a stop string did. `length`: max_new_tokens. `context`: no position is left.
`cancelled`: the caller stopped listening."""


@dataclass(frozen=True)
class Piece:
    """What one sampled id adds to the reply. `text` is empty while a character, or a possible stop string, is incomplete."""

    text: str
    token_id: int | None
    """None for text that was held back until the end."""


class Generation:
    """One reply in the making: iterate for its pieces. The attributes are true at any moment, also after an exception."""

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
        """`ids` is the whole conversation up to where the reply begins; `reuse` keeps the part that the cache holds already.

        Raises FastVLMError where `ids` leave no room in the context.
        """
        check_room(ids, manifest)
        self._session, self._tokenizer, self._manifest = session, tokenizer, manifest
        self._ids, self._image_features, self._params = ids, image_features, params
        self._reuse, self._chunk = reuse, chunk
        self.token_ids: list[int] = []
        """Ids of the reply so far, without the one that ended it."""
        self.stop_reason: StopReason = "cancelled"
        self.stop_string: str | None = None
        self.prefill_seconds = 0.0
        self.prefilled_tokens = 0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def __iter__(self) -> Iterator[Piece]:
        """Prefill, then one piece a token, then perhaps one with text that had been held back."""
        params, text = self._params, self._manifest.text
        sampler = Sampler(params, text.token_count, self._ids)
        detokenizer, stops = Detokenizer(self._tokenizer), StopStrings(params.stop)

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
            yield Piece(stops.push(detokenizer.push(token_id)), token_id)
            if self._ended(stops):
                break
            began = time.perf_counter()
            output = self._session.decode(ticket, token_id, want_logits=params.wants_logits)
        tail = stops.push(detokenizer.flush()) + stops.flush()
        self.stop_string = stops.found
        if tail:
            yield Piece(tail, None)

    def _count(self, seconds: float) -> None:
        """The first sampled id is the end of prefill; the others are decode steps."""
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
    """Raise FastVLMError where a conversation leaves no position for a reply."""
    context, vocab = manifest.decoder.context, manifest.decoder.vocab
    if len(ids) < context:
        return
    of_picture = sum(token_id >= vocab for token_id in ids)
    remedy = "shorten the prompt" if len(ids) - of_picture >= context // 2 else "use fewer pictures"
    raise FastVLMError(
        f"the conversation has {len(ids)} tokens, {of_picture} of them of pictures, and the context of {context} leaves no room "
        f"for a reply; {remedy}, start a new conversation, or convert with a larger --context"
    )
