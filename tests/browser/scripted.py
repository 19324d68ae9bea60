"""A server that looks to the page like the real one, and answers what a test has written down."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastvlm_edge.server import page

IMAGE_SIZE = 512
DECODING_MS = 160.0


@dataclass
class Reply:
    """One answer of the server."""

    pieces: tuple[str, ...] = ("An", " answer.")
    status: int = 200
    message: str = "not now"
    retry_after: int | None = None
    pause: float = 0.0
    """Seconds before each piece."""
    fault: str | None = None
    """Message of an error event after the pieces."""
    breaks: bool = False
    """End the stream without saying so."""


@dataclass
class Script:
    """What the server answers next (the last one again and again), and what it was asked."""

    replies: deque[Reply] = field(default_factory=lambda: deque([Reply()]))
    health: int = 200
    address: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    """Clients that went away before the end of their answer."""

    def then(self, *replies: Reply) -> None:
        self.replies = deque(replies)

    def picture(self, body: int = -1) -> Image.Image:
        """The picture in the first question of a request."""
        _, _, data = self.url(body).partition(";base64,")
        return Image.open(io.BytesIO(base64.b64decode(data)))

    def url(self, body: int = -1) -> str:
        url: str = self.bodies[body]["messages"][0]["content"][0]["image_url"]["url"]
        return url


def make_scripted_app(script: Script) -> Starlette:
    async def health(_: Request) -> Response:
        return Response(status_code=script.health)

    async def props(_: Request) -> Response:
        backend = {"name": "ort", "description": "a script"}
        return JSONResponse({"model": "scripted", "precision": "int8", "backend": backend, "image_size": IMAGE_SIZE, "geometry": "pad"})

    async def completions(request: Request) -> Response:
        script.bodies.append(await request.json())
        reply = script.replies[0] if len(script.replies) == 1 else script.replies.popleft()
        if reply.status != 200:
            headers = {"Retry-After": str(reply.retry_after)} if reply.retry_after else None
            return JSONResponse({"error": {"message": reply.message}}, reply.status, headers)
        return StreamingResponse(_stream(script, reply), media_type="text/event-stream")

    routes = [Route("/health", health), Route("/props", props), Route("/v1/chat/completions", completions, methods=["POST"])]
    return Starlette(routes=[*routes, *page.file_routes()])


async def _stream(script: Script, reply: Reply) -> AsyncIterator[str]:
    complete = False
    try:
        yield ": waiting\n\n"
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for piece in reply.pieces:
            await asyncio.sleep(reply.pause)
            yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        complete = True
        if reply.fault is not None:
            yield _event({"error": {"message": reply.fault}})
        elif not reply.breaks:
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 9, "completion_tokens": len(reply.pieces), "prompt_tokens_details": {"cached_tokens": 4}}
            yield _event({"choices": [], "usage": usage, "timings": {"predicted_ms": DECODING_MS}})
            yield "data: [DONE]\n\n"
    finally:
        script.gone += not complete


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
