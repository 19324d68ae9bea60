"""One reply while it is generated: the engine pushes the outputs of the model in, text comes out through a queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import LOGIT_POSITIONS, StepOutput
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.draft import MOST, PromptLookup, StepCosts
from fastvlm_edge.generation.engine import Part, Work
from fastvlm_edge.generation.grammar import Grammar, allowed_candidates
from fastvlm_edge.generation.images import EncodedImage
from fastvlm_edge.generation.logprobs import TokenLogProb, log_probability, most_likely, token_logprobs
from fastvlm_edge.generation.sampling import MAX_TOP_K, Sampler, SamplingParams
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.stop_strings import StopStrings
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

StopReason = Literal["stop", "length", "context", "cancelled"]
"""`stop`: the model or a stop string ended the reply. `length`: it has max_new_tokens tokens. `context`: the context is full.
`cancelled`: the caller closed the stream."""


@dataclass(frozen=True)
class Piece:
    """A part of the text of a reply."""

    text: str
    tokens: int
    """Number of ids of the reply when it was shown."""


class Answer(Work):
    """A reply. The engine's thread fills it; the caller reads `events`, or gives a `sink`."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        ids: Sequence[int],
        images: tuple[EncodedImage, ...],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        reuse: bool,
        chunk: int,
        piecewise: bool,
        speculate: bool,
        least: float = 0.0,
        sink: Callable[[Piece | None], None] | None = None,
    ) -> None:
        """`ids` is the whole conversation up to where the reply begins, and must leave room in the context (`check_room`).

        `grammar` is that of `params.format`. Without `piecewise`, the text is one piece, at the end. The first token whose probability is
        below `least` ends it. `sink` takes what else goes to `events`, in the engine's thread: it must not wait. If it raises RuntimeError,
        nobody listens any more, and the answer is cancelled.
        """
        context = manifest.decoder.context
        super().__init__(ids, images, positions=min(len(ids) + params.max_new_tokens, context), most_kept=len(ids) - 1 if reuse else 0)
        self._tokenizer = tokenizer
        self._text, self._context, self._params, self._chunk, self._piecewise = manifest.text, context, params, chunk, piecewise
        self._state = None if grammar is None else grammar.begin()
        # The candidates often hold nothing that a grammar allows. Another step for the rest of the row would cost much more than its copy.
        self.wants_logits = params.wants_logits or grammar is not None
        self._sampler = Sampler(params, manifest.text.token_count, ids)
        self._detokenizer = Detokenizer(tokenizer, special_tokens=params.special_tokens)
        self._stops = StopStrings(params.stop)
        self._lookup = PromptLookup(ids, manifest.decoder.vocab) if speculate else None
        self._held = ""
        """Text that is not given out yet, because the reply is not read piecewise."""
        self.events: SimpleQueue[Piece | None] = SimpleQueue()
        """Pieces of the text, and None at the end; then `error` says whether it failed."""
        self._sink, self._least = sink or self.events.put, least
        self.log_probabilities: list[float] = []
        """Natural logarithm of the model's probability of each of them."""
        self._most_likely: list[list[tuple[int, float]]] = []
        """At the place of each of them."""
        self.stop_reason: StopReason = "cancelled"
        self.stop_string: str | None = None
        self.submitted = time.perf_counter()
        self._began = self._first = self._last = 0.0
        self.sampled = 0

    @property
    def queue_seconds(self) -> float:
        """Time that it waited for a slot."""
        return self._began - self.submitted if self._began else 0.0

    @property
    def prefill_seconds(self) -> float:
        """From then to the first sampled token; 0 if there is none yet."""
        return self._first - self._began if self._first else 0.0

    @property
    def seconds(self) -> float:
        """From its submission to its last token."""
        return self._last - self.submitted if self._last else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of all tokens after the first; 0 if there was only one."""
        seconds = self._last - self._first
        return (self.sampled - 1) / seconds if self.sampled > 1 and seconds > 0 else 0.0

    def logprobs(self, count: int, first: int = 0) -> list[TokenLogProb] | None:
        """Those of the first `count` ids without the first `first` of them, or None if they were not asked for."""
        if self._params.logprobs is None:
            return None
        part = slice(first, count)
        return token_logprobs(self._tokenizer, self.token_ids[part], self.log_probabilities[part], self._most_likely[part])

    def begin(self, kept: int) -> None:
        self._began = time.perf_counter()
        super().begin(kept)

    def part(self, at: int) -> Part:
        end = min(at + self._chunk, len(self.ids))
        last = end == len(self.ids)
        return Part(self.ids[at:end], None, self.wants_logits and last, last)

    def push(self, output: StepOutput, row: int) -> int | None:
        token_id = self._choose(output, row)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.sampled += 1
        if token_id in self._text.stop_ids:
            self.stop_reason = "stop"
            return None
        self.token_ids.append(token_id)
        if self._lookup is not None:
            self._lookup.append(token_id)
        self.log_probabilities.append(log_probability(output, row, token_id))
        if self._params.logprobs is not None:
            self._most_likely.append(most_likely(output, row, self._params.logprobs, self._text.token_count))
        self._say(self._stops.push(self._detokenizer.push(token_id)))
        if self._state is not None:
            self._state.accept(token_id)
        if (
            self._stops.found is not None
            or (self._state is not None and self._state.ended)
            or (self._least and math.exp(self.log_probabilities[-1]) < self._least)
        ):
            self.stop_reason = "stop"
        elif len(self.token_ids) >= self._params.max_new_tokens:
            self.stop_reason = "length"
        elif len(self.ids) + len(self.token_ids) >= self._context:
            self.stop_reason = "context"
        else:
            return token_id
        return None

    def draft(self, costs: StepCosts) -> list[int]:
        if self._lookup is None:
            return []
        left = min(self._params.max_new_tokens, self._context - len(self.ids)) - len(self.token_ids)
        forced = [] if self._state is None else self._state.forced(min(LOGIT_POSITIONS, left) - 1)
        return forced or self._lookup.draft(costs, min(MOST, left - 1))

    def _choose(self, output: StepOutput, row: int) -> int:
        """The next id, as if everything that the grammar does not allow had been masked in the whole row."""
        values, ids = output.top_values[row], output.top_ids[row]
        logits = None if output.logits is None else output.logits[row]
        if self._state is not None:
            assert logits is not None
            whole, allowed = logits, self._state.allowed()
            if self._params.wants_logits:
                logits = np.where(allowed, whole[: len(allowed)], -np.inf)
            else:
                count = 1 if self._params.temperature == 0 else self._params.top_k or MAX_TOP_K
                values, ids = allowed_candidates(values, ids, allowed, count, lambda: whole)
        return self._sampler.next(values, ids, logits)

    def end(self) -> None:
        if self.error is None and not self.cancelled:
            self._say(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
            self.stop_string = self._stops.found
        if self._held:
            self._give(Piece(self._held, len(self.token_ids)))
        self._give(None)

    def _say(self, text: str) -> None:
        if text and self._piecewise:
            self._give(Piece(text, len(self.token_ids)))
        else:
            self._held += text

    def _give(self, event: Piece | None) -> None:
        try:
            self._sink(event)
        except RuntimeError:
            self.cancel()


class Score(Work):
    """The logits after each of `ids[start:]`, for up to LOGIT_POSITIONS ids."""

    def __init__(self, ids: Sequence[int], images: tuple[EncodedImage, ...], start: int, *, chunk: int) -> None:
        super().__init__(ids, images, positions=len(ids), most_kept=start)
        self._start, self._chunk = start, chunk
        self._done: SimpleQueue[None] = SimpleQueue()
        self._found: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def part(self, at: int) -> Part:
        if at < self._start:
            return Part(self.ids[at : min(at + self._chunk, self._start)], None, False, False)
        return Part(self.ids[at:], range(len(self.ids) - at), True, True)

    def push(self, output: StepOutput, row: int) -> int | None:
        assert output.logits is not None
        self._found = output.logits.astype(np.float32), output.log_normalizer.astype(np.float32)  # copies
        return None

    def end(self) -> None:
        self._done.put(None)

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the logits [n, vocab] and their log normalizers [n]."""
        self._done.get()
        if self.error is not None:
            raise self.error
        assert self._found is not None
        return self._found


class ContextFull(FastVLMError):
    """A conversation that leaves no room for a reply in the context of the model."""


def check_room(ids: Sequence[int], manifest: Manifest, *, or_else: str = "start a new conversation") -> None:
    """Raise ContextFull, with the other remedy `or_else`, if a conversation leaves no position for a reply."""
    context, vocab = manifest.decoder.context, manifest.decoder.vocab
    if len(ids) < context:
        return
    visual = sum(token_id >= vocab for token_id in ids)
    remedy = "shorten the prompt" if len(ids) - visual >= context // 2 else "use fewer images"
    raise ContextFull(
        f"the conversation has {len(ids)} tokens ({visual} of them visual), which leaves no room for a reply in the context of {context}",
        f"{remedy}, {or_else}, or convert with a larger --context",
    )
