"""The replies to one question: it waits for a place, its pictures are encoded, and the engine answers. All endpoints share this."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.async_vlm import AsyncReplyStream
from fastvlm_edge.generation.cascade import ImageSize
from fastvlm_edge.generation.chat_file import ChatTurn
from fastvlm_edge.generation.logprobs import TokenLogProb
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.server import api
from fastvlm_edge.server.conversation import Conversation
from fastvlm_edge.server.errors import ClientGone, RequestError, failed, invalid_format, refused
from fastvlm_edge.server.pictures import Encoded, encode, encode_question
from fastvlm_edge.server.state import ServerState

T = TypeVar("T")

_CANCEL_SECONDS = 1.0
_SHORT = 1 << 12
"""Characters that are tokenized in about a millisecond."""
FORMATS = ("json_schema", "choices", "regex", "grammar")
"""Options of `Chat.stream` that say what a reply must look like. An error that they cause has the code `invalid_format`, and no param."""


@dataclass(frozen=True)
class Piece:
    """A part of the text of a reply."""

    index: int
    text: str
    logprobs: list[TokenLogProb]
    """Of its tokens, if they were asked for."""


@dataclass(frozen=True)
class End:
    """A reply is complete."""

    index: int
    reply: Reply
    logprobs: list[TokenLogProb]
    """Of its last tokens, which no piece had."""


class _Deadline:
    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._began = seconds, time.monotonic()

    def left(self, most: float | None = None) -> float | None:
        """Seconds that are left, at most `most`. Raises RequestError at the end."""
        if self._seconds is None:
            return most
        left = self._seconds - (time.monotonic() - self._began)
        if left <= 0:
            raise RequestError(504, f"the request took more than {self._seconds:g} seconds", type="timeout_error", code="timeout")
        return left if most is None else min(left, most)


class Replies:
    """One or more replies that are being generated. `replies_to` makes it."""

    def __init__(self, state: ServerState, deadline: _Deadline, began: float, queue_seconds: float, encoded: Encoded) -> None:
        self._metrics, self._known, self._deadline, self._began = state.metrics, state.pictures, deadline, began
        self._queue_seconds, self._encoded = queue_seconds, encoded
        self.done: dict[int, Reply] = {}
        """Index -> reply, of those that are complete."""
        self._events: deque[Piece | End | Exception] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open: set[int] = set()
        """Replies that have not ended yet."""

    def _start(self, streams: list[AsyncReplyStream]) -> None:
        self._open = set(range(len(streams)))
        self._tasks = [asyncio.create_task(self._read(index, stream)) for index, stream in enumerate(streams)]

    async def events(self, ping_seconds: float | None = None) -> AsyncIterator[Piece | End | None]:
        """What comes, until all replies are complete; None when nothing came for some seconds. Raises RequestError if one fails."""
        while len(self.done) < len(self._tasks):
            while not self._events:
                self._arrival = asyncio.get_running_loop().create_future()
                arrived, _ = await asyncio.wait((self._arrival,), timeout=self._deadline.left(ping_seconds))
                if not arrived and ping_seconds is not None:
                    yield None
            found = self._events.popleft()
            if isinstance(found, Exception):
                raise failed(found) from found
            if isinstance(found, End):
                self.done[found.index] = found.reply
            yield found

    async def wait(self) -> list[Reply]:
        """All replies, when they are complete. Raises RequestError if one fails."""
        async for _ in self.events():
            pass
        return [self.done[index] for index in range(len(self._tasks))]

    @property
    def usage(self) -> api.Usage:
        """Tokens of all replies that are complete."""
        first, new = self.done[0].timings, sum(reply.timings.new_tokens for reply in self.done.values())
        prompt, details = first.prompt_tokens, api.PromptTokensDetails(cached_tokens=first.cached_tokens)
        return api.Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=details)

    @property
    def timings(self) -> api.Timings:
        """Those of the first reply; the tokens of several are added up, and the slowest counts."""
        reply = self.done[min(self.done)]
        first, *others = [self.done[index].timings for index in sorted(self.done)]
        new = first.new_tokens + sum(timings.new_tokens for timings in others)
        rates = [(each.new_tokens, each.decode_tokens_per_second) for each in (first, *others) if each.decode_tokens_per_second]
        seconds = max((tokens / rate for tokens, rate in rates), default=0.0)
        return api.Timings(
            cache_n=first.cached_tokens,
            prompt_n=first.prefilled_tokens,
            prompt_ms=round(first.prefill_ms, 3),
            prompt_per_token_ms=_ratio(first.prefill_ms, first.prefilled_tokens),
            prompt_per_second=_ratio(1e3 * first.prefilled_tokens, first.prefill_ms),
            predicted_n=new,
            predicted_ms=round(1e3 * seconds, 3),
            predicted_per_token_ms=_ratio(1e3 * seconds, new),
            predicted_per_second=_ratio(new, seconds),
            preprocess_ms=round(self._encoded.preprocess_ms, 3),
            vision_ms=round(self._encoded.vision_ms, 3),
            queue_ms=round(1e3 * self._queue_seconds + first.queue_ms, 3),
            image_size=reply.image_size,
            tried_sizes=reply.tried_sizes,
        )

    async def _read(self, index: int, stream: AsyncReplyStream) -> None:
        """Pass on what one stream gives. It ends with End or an exception, unless it is cancelled."""
        began, said, last = self._began, 0, 0.0
        try:
            async for text in stream:
                now = time.perf_counter()
                if last:
                    self._metrics.token_gap(now - last)
                else:
                    self._metrics.first_token(now - began)
                last = now
                logprobs = stream.logprobs_from(said)
                said += len(logprobs)
                self._give(Piece(index, text, logprobs))
            reply = stream.reply
            if reply.image_size is not None:
                for name in self._encoded.undecided:
                    self._known.sizes.put(name, reply.image_size)
            self._finished(index, finish_reason(reply), reply)
            self._give(End(index, reply, (reply.logprobs or [])[said:]))
        except Exception as error:
            self._finished(index, "error", None)
            self._give(error)

    def _give(self, event: Piece | End | Exception) -> None:
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _finished(self, index: int, reason: str, reply: Reply | None) -> None:
        if index not in self._open:
            return
        self._open.remove(index)
        queued = self._queue_seconds + (0.0 if reply is None else reply.timings.queue_ms / 1e3)
        self._metrics.finished(reason, reply, time.perf_counter() - self._began, queued)

    def _close(self) -> None:
        """Without waiting for anything, because whoever leaves may have been cancelled, or is when its client goes away."""
        for task in self._tasks:
            task.cancel()  # which closes its stream
        for index in sorted(self._open):
            self._finished(index, "cancelled", None)


@asynccontextmanager
async def replies_to(state: ServerState, conversation: Conversation, options: Mapping[str, Any], count: int = 1) -> AsyncIterator[Replies]:
    """Ask, and hand out the replies while they are generated. Whatever leaves the block stops what still runs, and frees the place.

    `options` are those of `Chat.stream`. Several replies are generated at the same time; the first one computes the prompt, the others
    begin with what it left in the cache. Raises RequestError if the server is busy, or the question is not accepted.
    """
    if count > state.admission.places:
        raise RequestError(400, f"n is {count}, and this server generates at most {state.admission.places} replies at a time", param="n")
    began, deadline, metrics = time.perf_counter(), _Deadline(state.settings.timeout_seconds), state.metrics
    place = state.admission.enter(count)
    for _ in range(count):
        metrics.queued()
    unfinished, reason, replies = count, "error", None
    try:
        try:
            while not await place.wait(deadline.left()):
                pass
        finally:
            queue_seconds = time.perf_counter() - began
            for _ in range(count):
                metrics.started()
        try:
            encoded, history = await asyncio.wait_for(_read_pictures(state, conversation), deadline.left())
        except (asyncio.TimeoutError, TimeoutError):
            deadline.left()
            raise
        metrics.pictures(encoded.preprocess_ms / 1e3, encoded.vision_ms / 1e3)
        deadline.left()
        replies = Replies(state, deadline, began, queue_seconds, encoded)
        ask = partial(_ask, state, conversation, history, encoded, options, count)
        at_once = conversation.characters < _SHORT and not any(name in options for name in FORMATS)
        replies._start(ask() if at_once else await asyncio.to_thread(ask))
        unfinished = 0
        yield replies
    except (asyncio.CancelledError, GeneratorExit):
        reason = "cancelled"
        raise
    finally:
        if replies is not None:
            replies._close()
        place.leave()
        for _ in range(unfinished):
            metrics.finished(reason, None, time.perf_counter() - began, queue_seconds)


async def _read_pictures(state: ServerState, conversation: Conversation) -> tuple[Encoded, list[ChatTurn]]:
    """Those of the question and, in turns, those of what was said before; the times are those of all."""
    history, special, more = [], state.settings.special_tokens, (state.vlm, state.settings, state.pictures)
    total = Encoded()
    for question, reply in conversation.history:
        history.append(ChatTurn(question.prompt, reply, await encode(question.pictures, total, *more), special_tokens=special))
    await encode_question(conversation.question.pictures, total, *more)
    return total, history


def _ask(
    state: ServerState, conversation: Conversation, history: list[ChatTurn], encoded: Encoded, options: Mapping[str, Any], count: int
) -> list[AsyncReplyStream]:
    """The streams, of which none has begun. It takes long if a long text is tokenized, or the format of a reply is compiled."""
    seed, streams = options.get("seed"), []
    size: ImageSize = "auto" if encoded.undecided else None
    try:
        state.vlm.vlm.prepare_format(**{name: options[name] for name in FORMATS if name in options})
    except FastVLMError as error:
        raise invalid_format(error) from None
    try:
        for index in range(count):
            chat = state.vlm.chat(system=conversation.system, history=history)
            more = {} if seed is None else {"seed": seed + index}
            special = state.settings.special_tokens
            streams.append(
                chat.stream(conversation.question.prompt, encoded.images, **{**options, **more}, special_tokens=special, image_size=size)
            )
    except FastVLMError as error:
        raise refused(error, "messages") from None
    return streams


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The body of the request must have been read.

    Raises ClientGone then.
    """
    job: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        while not job.done():
            job.cancel()  # again, because `asyncio.wait_for` before Python 3.12 may lose it (python/cpython#81839)
            await asyncio.wait((job,), timeout=_CANCEL_SECONDS)
    if job.cancelled():
        raise ClientGone
    return job.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def finish_reason(reply: Reply) -> api.FinishReason:
    """Why a reply ended."""
    return "stop" if reply.stop_reason == "stop" else "length"


def _ratio(value: float, by: float) -> float:
    return round(value / by, 3) if by else 0.0
