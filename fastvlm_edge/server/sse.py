"""Server-sent events (WHATWG HTML, section 9.2), written by hand: a dozen lines, and no race with a client that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.types import Send

from fastvlm_edge.server.errors import ClientGone, RequestError, failed
from fastvlm_edge.server.limits import stopping

T = TypeVar("T")

SEND_SECONDS = 60.0
"""A client that takes nothing for so long is gone."""
PING_SECONDS = 10.0
"""A comment is sent after so much silence, so that nothing between server and client takes the connection for dead."""


class Events:
    """A response of server-sent events."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def start(self) -> None:
        """Send status 200 and the headers. After that, an error is an event."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._write({"type": "http.response.start", "status": 200, "headers": headers})

    async def data(self, document: msgspec.Struct) -> None:
        """An event without a name."""
        await self._body(b"data: " + msgspec.json.encode(document) + b"\n\n")

    async def named(self, name: str, document: msgspec.Struct) -> None:
        """An event with a name."""
        await self._body(f"event: {name}\ndata: ".encode() + msgspec.json.encode(document) + b"\n\n")

    async def error(self, error: RequestError) -> None:
        """An event named `error`. Clients of the OpenAI API look at its data."""
        await self._body(b"event: error\ndata: " + error.body + b"\n\n")

    async def ping(self) -> None:
        """A comment."""
        await self._body(b": ping\n\n")

    async def done(self) -> None:
        """The end of a stream of the OpenAI API."""
        await self._body(b"data: [DONE]\n\n")

    async def end(self) -> None:
        """The end of the response."""
        await self._body(b"", more=False)

    async def _body(self, data: bytes, *, more: bool = True) -> None:
        await self._write({"type": "http.response.body", "body": data, "more_body": more})

    async def _write(self, message: dict[str, object]) -> None:
        await within(SEND_SECONDS, self._send(message))


async def respond(
    send: Send, write: Callable[[Events], Awaitable[None]], fail: Callable[[Events, RequestError], Awaitable[None]] = Events.error
) -> None:
    """A whole response: what `write` sends, or `fail` if it raises an error, or the server stops."""
    events = Events(send)
    await events.start()
    try:
        await write(events)
    except ClientGone:
        raise
    except asyncio.CancelledError:
        await fail(events, stopping())
        await events.end()
        raise
    except Exception as error:
        await fail(events, failed(error))
    await events.end()


async def within(seconds: float, sending: Awaitable[T]) -> T:
    """The result of `sending`. Raises ClientGone if the client does not take it in time."""
    task = asyncio.ensure_future(sending)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not done:
        raise ClientGone
    return task.result()
