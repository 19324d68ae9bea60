"""Limits of connections: heads and bodies that never end or are too large, clients that go away, a server that stops."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvlm_edge.server.errors import ClientGone, RequestError

HEAD_SECONDS = 30.0
"""The longest time until the head of a request is complete."""
BODY_SECONDS = 30.0
"""The longest silence inside a body, and the time that every body may take."""
BODY_RATE = 8 << 10
"""Bytes per second with which a body may take longer: a full one of 32 MiB an hour and nine minutes."""
BODIES = 8
"""Bodies of the largest size that requests may hold at the same time, those that wait in the queue included."""
CLIENT_GONE = 499
"""Status of a request whose client went away, as in nginx. Only logs show it."""


class HeadLimit(H11Protocol):
    """uvicorn's protocol of a connection, which closes one that begins no request, or does not end its head, in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A part of a request came."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BodyLimit:
    """Bounds the body of a request, and those of all that run, while they are read. Whoever reads more gets RequestError."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        taken, complete, began = 0, False, time.monotonic()

        async def bounded() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            if length.isdigit() and int(length) > self._max_bytes:
                raise self._too_large()
            left = began + BODY_SECONDS + taken / BODY_RATE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(left, BODY_SECONDS)))
            except asyncio.TimeoutError:
                slow = f"the body comes too slowly: {taken:,} bytes in {time.monotonic() - began:.0f} seconds"
                raise RequestError(408, slow, code="timeout") from None
            size = len(message.get("body", b""))
            taken += size
            self._held += size
            complete = not message.get("more_body", False)
            if taken > self._max_bytes:
                raise self._too_large()
            if self._held > BODIES * self._max_bytes:
                what = "the requests that wait take all the memory that they may; try again later"
                raise RequestError(429, what, type="rate_limit_error", code="queue_full", retry_after=1)
            return message

        try:
            await self._app(scope, bounded, send)
        finally:
            self._held -= taken

    def _too_large(self) -> RequestError:
        message = f"the body has more than {self._max_bytes:,} bytes; send smaller pictures"
        return RequestError(413, message, code="request_too_large")


class Endings:
    """Ends a request quietly whose client went away, and with status 503 if the server stops before the response has begun."""

    def __init__(self, app: ASGIApp, running: set[asyncio.Task[Any]]) -> None:
        """`running` is filled with the tasks of requests."""
        self._app, self._running = app, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, task = False, asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        self._running.add(task)

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientGone:
            if not started:
                await Response(status_code=CLIENT_GONE)(scope, receive, send)
        except asyncio.CancelledError:
            if not started:
                await stopping().response(scope, receive, send)
        finally:
            self._running.discard(task)


def stopping() -> RequestError:
    """The error for a request that the server can no longer finish."""
    return RequestError(503, "the server stops", type="unavailable_error", code="stopping")
