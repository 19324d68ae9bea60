"""The access log: one JSON line a request on stderr. It never has contents, keys or query strings.

Pure ASGI middleware, the outermost, so that it also sees what the others refuse. Handlers add the tokens of a reply with `note_tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEY = "fastvlm_edge.access_log"
_SHOWN = 200
"""Characters of a path."""
LEFT = 499
"""The status where a client went away before there was one, as nginx writes it."""


class AccessLog:
    """Writes the log."""

    def __init__(self, app: ASGIApp, stream: TextIO | None = None) -> None:
        """`stream` is stderr unless it is given."""
        self._app, self._stream = app, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write its line when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), LEFT
        extra: dict[str, Any] = {}
        scope[_KEY] = extra

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = 500 if status == LEFT else status
            raise
        finally:
            client = scope.get("client")
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"][:_SHOWN],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                **extra,
            }
            with suppress(OSError, ValueError):  # a full disk, a reader that went away, a stream that was closed
                print(json.dumps(line), file=self._stream or sys.stderr, flush=True)


def note_tokens(scope: Scope, prompt_tokens: int, completion_tokens: int) -> None:
    """Let the line of this request have the tokens of its reply, added to those noted before."""
    extra = scope.get(_KEY)
    if extra is not None:
        extra["prompt_tokens"] = extra.get("prompt_tokens", 0) + prompt_tokens
        extra["completion_tokens"] = extra.get("completion_tokens", 0) + completion_tokens
