"""`ReplyStream`: a reply as it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import Answer, Piece, StopReason
from fastvlm_edge.generation.cascade import Attempts
from fastvlm_edge.generation.logprobs import TokenLogProb
from fastvlm_edge.generation.reply import Reply, Timings, confidence


@dataclass(frozen=True)
class Started:
    """An answer that the engine works on, and what its caller did before."""

    answer: Answer
    preprocess_seconds: float
    vision_seconds: float
    before_seconds: float
    """From the question to the engine."""
    cached_images: int


class Starts(Protocol):
    """`FastVLM._start`."""

    def __call__(self, piecewise: bool, sink: Callable[[Piece | None], None] | None, wanted: Callable[[], bool]) -> Started | None: ...


class ReplyStream:
    """Iterate for the pieces of a reply as strings. `reply` is the whole reply, after the last piece or after `close`.

    The engine goes on generating while nobody reads. Any thread may call `close`.
    """

    def __init__(
        self,
        start: Starts,
        backend: str,
        precision: str,
        attempts: Attempts,
        leave: Callable[[Answer | None, str, bool], None] | None = None,
        dropped_turns: int = 0,
        *,
        reads_images: bool = False,
    ) -> None:
        """`start` reads the images, if there are any (`reads_images`), and hands the question to the engine.

        It is told whether the text is read in pieces and who takes them, and asks whether the answer is still wanted: None if not.
        It is called again for the next size of `attempts`, where an answer does not stand.
        `leave` is called once, at the end: with the answer if there is one, the text that was read, and whether that is all of it.
        """
        self._start, self._backend, self._precision, self._attempts, self._leave = start, backend, precision, attempts, leave
        self._dropped_turns = dropped_turns
        self._lock = threading.Lock()
        self._started: Started | None = None
        self._pieces: list[Piece] = []
        self._reply: Reply | None = None
        self._closed = False
        self.reads_images = reads_images

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        return self._next(piecewise=True)

    @property
    def reply(self) -> Reply:
        """The finished reply. Raises FastVLMError before the end, and if the stream was closed before its first piece."""
        if self._reply is None and self._closed:
            raise FastVLMError("there is no reply, because the stream was closed before its first piece")
        if self._reply is None:
            raise FastVLMError("the reply is not finished", "read the stream to its end, or close it")
        return self._reply

    def logprobs_from(self, first: int) -> list[TokenLogProb]:
        """Those of the tokens that the text read so far is made of, from number `first` on. Empty if `logprobs` was not given."""
        if self._started is None or not self._pieces:
            return []
        return self._started.answer.logprobs(self._pieces[-1].tokens, first) or []

    def close(self) -> None:
        """Stop the generation. The text that was read, if any, becomes the reply, with stop reason `cancelled`."""
        self._end(whole=False)

    def wait(self) -> Reply:
        """Read to the end."""
        try:
            while True:
                self._next(piecewise=False)
        except StopIteration:
            return self.reply
        except BaseException:
            self.close()
            raise

    def _next(self, *, piecewise: bool) -> str:
        while True:
            if self._closed:
                raise StopIteration
            try:
                if self._started is None and not self._begin(piecewise=piecewise):
                    raise StopIteration
                assert self._started is not None
                event = self._started.answer.events.get()
            except BaseException:
                self.close()
                raise
            text = self._take(event)
            if text is not None:
                return text

    def _begin(self, *, piecewise: bool, sink: Callable[[Piece | None], None] | None = None) -> bool:
        """Read the images and hand the question to the engine, which calls `sink`. False if the stream was closed meanwhile."""
        started = self._start(piecewise, sink, lambda: not self._closed)
        with self._lock:
            self._started = started
            closed = self._closed
        if closed and started is not None:
            started.answer.cancel()
        return not closed

    def _take(self, event: Piece | None) -> str | None:
        """The text of an event of the answer. Raises StopIteration at the end, and the error of an answer that failed.

        None if the answer does not stand: after its last event, `_begin` asks at the next size.
        """
        started = self._started
        assert started is not None
        failed = started.answer.error is not None or started.answer.cancelled
        if not self._closed and not self._attempts.last and (failed or not self._attempts.stands(started.answer)):
            if event is not None:
                return None
            if not failed:
                with self._lock:
                    self._started = None
                self._attempts.next(started.before_seconds + started.answer.seconds)
                return None
        if event is not None and not self._closed:
            self._pieces.append(event)
            return event.text
        error = started.answer.error
        self._end(whole=error is None and not started.answer.cancelled)
        if error is not None:
            raise error
        raise StopIteration

    def _end(self, *, whole: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            started = self._started
        answer = None if started is None else started.answer
        if answer is not None and not whole:
            answer.cancel()
        text = "".join(piece.text for piece in self._pieces)
        if started is not None and (whole or self._pieces):
            self._reply = self._make_reply(started, text, whole)
        if self._leave is not None:
            self._leave(answer, text, whole)

    def _make_reply(self, started: Started, text: str, whole: bool) -> Reply:
        answer = started.answer
        tokens = len(answer.token_ids) if whole else self._pieces[-1].tokens
        reason: StopReason = answer.stop_reason if whole else "cancelled"
        shown = answer.queue_seconds + answer.prefill_seconds if self._attempts.last else answer.seconds
        timings = Timings(
            preprocess_ms=started.preprocess_seconds * 1e3,
            vision_ms=started.vision_seconds * 1e3,
            queue_ms=answer.queue_seconds * 1e3,
            prefill_ms=answer.prefill_seconds * 1e3,
            ttft_ms=(self._attempts.seconds + started.before_seconds + shown) * 1e3,
            decode_tokens_per_second=answer.tokens_per_second,
            prompt_tokens=len(answer.ids),
            cached_tokens=answer.kept,
            prefilled_tokens=len(answer.ids) - answer.kept,
            cached_images=started.cached_images,
            new_tokens=tokens,
        )
        return Reply(
            text=text,
            token_ids=answer.token_ids[:tokens],
            stop_reason=reason,
            stop_string=answer.stop_string if whole else None,
            confidence=confidence(answer.log_probabilities[:tokens]),
            logprobs=answer.logprobs(tokens),
            backend=self._backend,
            precision=self._precision,
            timings=timings,
            dropped_turns=self._dropped_turns,
            image_size=answer.images[-1].image_size if answer.images else None,
            tried_sizes=self._attempts.tried,
        )

    def __del__(self) -> None:
        with suppress(Exception):  # it may not have been made completely
            self.close()

    def __repr__(self) -> str:
        state = "finished" if self._reply is not None else "closed" if self._closed else "not finished"
        return f"<ReplyStream, {state}>"
