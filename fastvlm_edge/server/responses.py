"""`POST /v1/responses`, without state: the conversation is in the request, and nothing is kept of it."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.logprobs import LogProb, TokenLogProb
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.server import api
from fastvlm_edge.server import responses_api as types
from fastvlm_edge.server.access_log import note_tokens
from fastvlm_edge.server.conversation import Conversation, read_messages
from fastvlm_edge.server.errors import RequestError, invalid_format
from fastvlm_edge.server.replies import End, Replies, replies_to, while_connected
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.sse import PING_SECONDS, Events, respond
from fastvlm_edge.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    """The address of the endpoint."""
    return [Route("/v1/responses", Responses(state), methods=["POST"])]


class Responses:
    """The endpoint, as an ASGI application: it listens for a client that goes away while it works."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        asked = await api.read(Request(scope, receive), types.ResponsesRequest, types.NEUTRAL)
        await while_connected(receive, self._answer(asked, scope, receive, send))

    async def _answer(self, asked: types.ResponsesRequest, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        state.check_ready()
        state.check_model(asked.model)
        messages, places = messages_of(asked)
        try:
            options = options_of(asked, state.settings)
            conversation = read_messages(messages, state.settings, state.vlm.vlm.manifest)
            answer = _Answer(state, asked, scope)
            if asked.stream:
                await answer.stream(conversation, options, send)
            else:
                response = await answer.whole(conversation, options)
                await response(scope, receive, send)
        except RequestError as error:
            param = "text.format" if error.detail.code == "invalid_format" else _param(error.detail.param, places)
            error.detail = msgspec.structs.replace(error.detail, param=param)
            raise


# What is asked for --------------------------------------------------------------------------------------------------------------


def messages_of(asked: types.ResponsesRequest) -> tuple[list[api.Message], list[str]]:
    """The conversation as messages of chat completions, and where in the request each of them stands."""
    messages: list[api.Message] = []
    places: list[str] = []
    if asked.instructions:
        messages.append(api.SystemMessage(content=asked.instructions))
        places.append("instructions")
    if isinstance(asked.input, str):
        return [*messages, api.UserMessage(content=asked.input)], [*places, "input"]
    for index, message in enumerate(asked.input):
        place = f"input[{index}]"
        messages.append(_message(message, place))
        places.append(place)
    return messages, places


def _message(message: types.InputMessage, place: str) -> api.Message:
    if message.role == "user":
        if isinstance(message.content, str):
            return api.UserMessage(content=message.content)
        return api.UserMessage(content=[_part(part) for part in message.content])
    texts = message.content if isinstance(message.content, str) else _texts(message.content, place)
    if message.role == "assistant":
        return api.AssistantMessage(content=texts)
    return api.SystemMessage(content=texts) if message.role == "system" else api.DeveloperMessage(content=texts)


def _texts(parts: Sequence[types.Content], place: str) -> list[api.TextPart]:
    texts = []
    for index, part in enumerate(map(_part, parts)):
        if not isinstance(part, api.TextPart):
            raise RequestError(400, "only messages of the user have pictures", param=f"{place}.content[{index}]")
        texts.append(part)
    return texts


def _part(part: types.Content) -> api.TextPart | api.ImagePart:
    if isinstance(part, types.InputImage):
        return api.ImagePart(image_url=api.ImageUrl(url=part.image_url, detail=part.detail))
    return api.TextPart(text=part.text)


def options_of(asked: types.ResponsesRequest, settings: Settings) -> dict[str, Any]:
    """The options of `Chat.stream`. Raises RequestError for values that contradict each other, or would be ignored."""
    logprobs = types.LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not logprobs:
        raise RequestError(400, f"top_logprobs needs {types.LOGPROBS} in include", param="top_logprobs")
    api.check_combinations(asked, top_p=asked.top_p not in (None, 1))
    options = {
        "max_new_tokens": asked.max_output_tokens or settings.max_tokens,
        "temperature": asked.temperature or 0.0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "logprobs": (asked.top_logprobs or 0) if logprobs else None,
    }
    wanted = None if asked.text is None else asked.text.format
    schema: dict[str, Any] | None = None
    if isinstance(wanted, api.JsonObjectFormat):
        schema = {"type": "object"}
    elif isinstance(wanted, types.JsonSchemaTextFormat):
        schema = wanted.schema
    try:
        answer_format(json_schema=schema)
    except FastVLMError as error:
        raise invalid_format(error) from None
    return options if schema is None else {**options, "json_schema": schema}


def _param(param: str | None, places: Sequence[str]) -> str | None:
    """A place among the messages of chat completions as one in this request."""
    found = re.fullmatch(r"messages(?:\[(\d+)\](.*))?", param or "")
    if found is None:
        return param
    return "input" if found.group(1) is None else places[int(found.group(1))] + found.group(2).removesuffix(".url")


# The answer ---------------------------------------------------------------------------------------------------------------------


class _Answer:
    """The answer to one request."""

    def __init__(self, state: ServerState, asked: types.ResponsesRequest, scope: Scope) -> None:
        self._state, self._asked, self._scope = state, asked, scope
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0
        wanted = None if asked.text is None else asked.text.format
        self._format = msgspec.to_builtins(wanted or api.TextFormat())

    async def whole(self, conversation: Conversation, options: dict[str, Any]) -> Response:
        """The answer, when the reply is complete."""
        async with replies_to(self._state, conversation, options) as replies:
            (reply,) = await replies.wait()
        return Response(msgspec.json.encode(self._finished(reply, replies)), media_type="application/json")

    async def stream(self, conversation: Conversation, options: dict[str, Any], send: Send) -> None:
        """Send the events."""
        async with replies_to(self._state, conversation, options) as replies:
            await respond(send, partial(self._events, replies), self._fail)

    async def _events(self, replies: Replies, events: Events) -> None:
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        begun = self._document("in_progress")
        await self._send(events, types.Created, response=begun)
        await self._send(events, types.InProgress, response=begun)
        await self._send(events, types.OutputItemAdded, output_index=0, item=self._message("in_progress"))
        await self._send(events, types.ContentPartAdded, **place, part=types.OutputText(text=""))
        async for event in replies.events(PING_SECONDS):
            if event is None:
                await events.ping()
            elif not isinstance(event, End):
                await self._send(events, types.OutputTextDelta, **place, delta=event.text, logprobs=_logprobs(event.logprobs))
        response = self._finished(replies.done[0], replies)
        item = response.output[0]
        part = item.content[0]
        await self._send(events, types.OutputTextDone, **place, text=part.text, logprobs=part.logprobs)
        await self._send(events, types.ContentPartDone, **place, part=part)
        await self._send(events, types.OutputItemDone, output_index=0, item=item)
        await self._send(events, types.Completed if response.status == "completed" else types.Incomplete, response=response)

    async def _fail(self, events: Events, error: RequestError) -> None:
        why = types.ResponseError(code="server_error", message=error.detail.message)
        await self._send(events, types.Failed, response=self._document("failed", error=why))

    async def _send(self, events: Events, kind: type[types.Event], **fields: Any) -> None:
        name = kind.__struct_config__.tag
        assert isinstance(name, str)
        await events.named(name, kind(sequence_number=self._number, **fields))
        self._number += 1

    def _finished(self, reply: Reply, replies: Replies) -> types.ResponseObject:
        """The answer with a complete reply."""
        complete = reply.stop_reason == "stop"
        usage = replies.usage
        note_tokens(self._scope, usage.prompt_tokens, usage.completion_tokens)
        return self._document(
            "completed" if complete else "incomplete",
            output=[self._message("completed" if complete else "incomplete", reply)],
            completed_at=int(time.time()) if complete else None,
            incomplete_details=None if complete else types.IncompleteDetails(reason="max_output_tokens"),
            usage=types.ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=types.InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=types.OutputTokensDetails(),
                total_tokens=usage.total_tokens,
            ),
        )

    def _document(self, status: Literal["in_progress", "completed", "incomplete", "failed"], **more: Any) -> types.ResponseObject:
        asked = self._asked
        return types.ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            model=self._state.model_name,
            temperature=asked.temperature or 0.0,
            text={"format": self._format},
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_logprobs=asked.top_logprobs or 0,
            user=asked.user,
            metadata=asked.metadata or {},
            **more,
        )

    def _message(self, status: Literal["in_progress", "completed", "incomplete"], reply: Reply | None = None) -> types.OutputMessage:
        content = [] if reply is None else [types.OutputText(text=reply.text, logprobs=_logprobs(reply.logprobs or ()))]
        return types.OutputMessage(id=self._item_id, status=status, content=content)


def _logprobs(tokens: Sequence[TokenLogProb]) -> list[types.OutputLogprob]:
    def alternative(found: LogProb) -> dict[str, Any]:
        return {"token": found.text, "logprob": found.logprob, "bytes": found.bytes}

    return [
        types.OutputLogprob(**alternative(token), top_logprobs=[types.TopLogprob(**alternative(other)) for other in token.top])
        for token in tokens
    ]
