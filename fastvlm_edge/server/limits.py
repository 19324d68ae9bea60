"""Middleware for connections: a body that is too large or never ends, a client that goes away, a server that stops."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_edge.server.errors import ClientGone, RequestError

BODY_SECONDS = 30.0
"""The longest silence inside a body."""
CLIENT_GONE = 499
"""Status of a request whose client went away, as in nginx. Only logs show it."""


class BodyLimit:
    """Bounds the body of a request while it is read. Whoever reads more gets RequestError."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        taken, complete = 0, False

        async def bounded() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            if length.isdigit() and int(length) > self._max_bytes:
                raise self._too_large()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise RequestError(408, f"nothing of the body came for {BODY_SECONDS:g} seconds", code="timeout") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, bounded, send)

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
