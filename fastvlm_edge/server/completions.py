"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.logprobs import LogProb, TokenLogProb
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.server import api
from fastvlm_edge.server.access_log import note_tokens
from fastvlm_edge.server.conversation import Conversation, read_messages
from fastvlm_edge.server.errors import RequestError, invalid_format
from fastvlm_edge.server.replies import End, Replies, finish_reason, replies_to, while_connected
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.sse import PING_SECONDS, Events, respond
from fastvlm_edge.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    """The address of the endpoint."""
    return [Route("/v1/chat/completions", ChatCompletions(state), methods=["POST"])]


class ChatCompletions:
    """The endpoint, as an ASGI application: it listens for a client that goes away while it works."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        asked = await api.read(request, api.ChatRequest)
        await while_connected(receive, self._answer(asked, scope, receive, send))

    async def _answer(self, asked: api.ChatRequest, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        state.check_ready()
        state.check_model(asked.model)
        conversation = read_messages(asked.messages, state.settings, state.vlm.vlm.manifest, frames_of(asked))
        options = options_of(asked, state.settings)
        answer = _Answer(state, asked, scope)
        try:
            if asked.stream:
                await answer.stream(conversation, options, send)
                return
            response = await answer.whole(conversation, options)
        except RequestError as error:
            raise error.at(_format_field(asked)) if error.detail.code == "invalid_format" else error from None
        await response(scope, receive, send)


class _Answer:
    """The answer to one request."""

    def __init__(self, state: ServerState, asked: api.ChatRequest, scope: Scope) -> None:
        self._state, self._asked, self._scope = state, asked, scope
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": state.model_name,
            "system_fingerprint": state.fingerprint,
        }

    async def whole(self, conversation: Conversation, options: dict[str, Any]) -> Response:
        async with replies_to(self._state, conversation, options, self._asked.n or 1) as replies:
            choices = [
                api.Choice(
                    index=index,
                    message=api.ReplyMessage(content=reply.text),
                    logprobs=self._logprobs(reply.logprobs or []),
                    finish_reason=finish_reason(reply),
                )
                for index, reply in enumerate(await replies.wait())
            ]
        self._note(replies)
        document = api.ChatCompletion(**self._head, choices=choices, usage=replies.usage, timings=replies.timings)
        return Response(msgspec.json.encode(document), media_type="application/json")

    async def stream(self, conversation: Conversation, options: dict[str, Any], send: Send) -> None:
        async with replies_to(self._state, conversation, options, self._asked.n or 1) as replies:
            await respond(send, partial(self._chunks, replies))

    async def _chunks(self, replies: Replies, events: Events) -> None:
        count = self._asked.n or 1
        options = self._asked.stream_options
        usage: Any = None if options is not None and options.include_usage else msgspec.UNSET
        for index in range(count):
            await events.data(self._chunk(index, api.Delta(role="assistant", content=""), usage=usage))
        async for event in replies.events(PING_SECONDS):
            if event is None:
                await events.ping()
            elif isinstance(event, End):
                last = len(replies.done) == count and usage is msgspec.UNSET
                timings: Any = replies.timings if last else msgspec.UNSET
                await events.data(
                    self._chunk(
                        event.index, api.Delta(), event.logprobs, finish_reason=finish_reason(event.reply), usage=usage, timings=timings
                    )
                )
            else:
                await events.data(self._chunk(event.index, api.Delta(content=event.text), event.logprobs, usage=usage))
        if usage is None:
            await events.data(api.ChatCompletionChunk(**self._head, choices=[], usage=replies.usage, timings=replies.timings))
        self._note(replies)
        await events.done()

    def _note(self, replies: Replies) -> None:
        note_tokens(self._scope, replies.usage.prompt_tokens, replies.usage.completion_tokens)

    def _chunk(
        self,
        index: int,
        delta: api.Delta,
        logprobs: Sequence[TokenLogProb] = (),
        *,
        finish_reason: api.FinishReason | None = None,
        **more: Any,
    ) -> api.ChatCompletionChunk:
        shown = self._logprobs(logprobs) if logprobs else None
        choice = api.ChunkChoice(index=index, delta=delta, logprobs=shown, finish_reason=finish_reason)
        return api.ChatCompletionChunk(**self._head, choices=[choice], **more)

    def _logprobs(self, tokens: Sequence[TokenLogProb]) -> api.Logprobs | None:
        return api.Logprobs(content=[_token(token) for token in tokens]) if self._asked.logprobs else None


def _token(token: TokenLogProb) -> api.TokenLogprob:
    def alternative(found: LogProb) -> dict[str, Any]:
        return {"token": found.text, "logprob": found.logprob, "bytes": found.bytes}

    return api.TokenLogprob(**alternative(token), top_logprobs=[api.TokenAlternative(**alternative(other)) for other in token.top])


def frames_of(asked: api.ChatRequest) -> int | None:
    """How many pictures stand for a clip, if the request says it."""
    options = asked.media_io_kwargs
    return None if options is None or options.video is None else options.video.num_frames


# What is asked for --------------------------------------------------------------------------------------------------------------


def options_of(asked: api.ChatRequest, settings: Settings) -> dict[str, Any]:
    """The options of `Chat.stream`. Raises RequestError for values that contradict each other, or would be ignored."""
    if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
        raise RequestError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    top_k = asked.top_k if asked.top_k and asked.top_k > 0 else None
    api.check_combinations(asked, top_p=asked.top_p not in (None, 1), top_k=top_k is not None)
    return {
        "max_new_tokens": asked.max_completion_tokens or asked.max_tokens or settings.max_tokens,
        "temperature": asked.temperature or 0.0,
        "top_k": top_k,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "seed": asked.seed,
        "repetition_penalty": asked.repetition_penalty or 1.0,
        "stop": asked.stop,
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
        **_format(asked),
    }


def _format(asked: api.ChatRequest) -> dict[str, Any]:
    """What the reply must look like, as one keyword of `Chat.stream`."""
    structured = _structured(asked.structured_outputs)
    wanted: dict[str, Any] = {}
    if isinstance(asked.response_format, api.JsonObjectFormat):
        wanted = {"json_schema": {"type": "object"}}
    elif isinstance(asked.response_format, api.JsonSchemaFormat):
        wanted = {"json_schema": asked.response_format.json_schema.schema}
    if wanted and structured:
        raise RequestError(400, "response_format and structured_outputs are both given; give one of them", param="structured_outputs")
    wanted = wanted or structured
    try:
        answer_format(**wanted)
    except FastVLMError as error:
        raise invalid_format(error, _format_field(asked)) from None
    return wanted


def _format_field(asked: api.ChatRequest) -> str:
    return "response_format" if asked.structured_outputs is None else "structured_outputs"


def _structured(asked: api.StructuredOutputs | None) -> dict[str, Any]:
    if asked is None:
        return {}
    given = {name: value for name in asked.__struct_fields__ if (value := getattr(asked, name)) not in (None, False)}
    if len(given) != 1:
        message = f"structured_outputs has {', '.join(given) or 'nothing'}; give one of {', '.join(asked.__struct_fields__)}"
        raise RequestError(400, message, param="structured_outputs")
    ((name, value),) = given.items()
    if name == "json_object":
        return {"json_schema": {"type": "object"}}
    if name == "json" and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RequestError(400, f"the schema is not JSON ({error})", param="structured_outputs.json") from None
    return {{"json": "json_schema", "choice": "choices"}.get(name, name): value}
