"""The server as an ASGI application: routes, middleware, errors, and the first run of the model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.cascade import sizes_to_try
from fastvlm_edge.server import completions, metrics, openapi, page, responses, status, tokens
from fastvlm_edge.server.access_log import AccessLog
from fastvlm_edge.server.admission import Admission
from fastvlm_edge.server.auth import Auth, Hosts
from fastvlm_edge.server.errors import RequestError, on_bug, on_http_error, on_request_error
from fastvlm_edge.server.limits import BodyLimit, Endings
from fastvlm_edge.server.metrics import Metrics
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.state import ServerState

_MODULES = (status, completions, responses, tokens, openapi, page)
"""Each has `routes(state)`."""
_ENDING_SECONDS = 2.0
"""For requests that did not end in time, to tell their clients."""
_WARM_TOKENS = 4
"""Of the shortest reply of the first run."""


def make_app(vlm: AsyncFastVLM, settings: Settings) -> Starlette:
    """The application. `app.state.server` is its ServerState; whoever made the model closes it."""
    state = ServerState(vlm, settings, Metrics(vlm, settings), Admission(settings.slots, settings.queue), asyncio.Event())

    running: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(_warm(state))
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.wait((warming, *running), timeout=_ENDING_SECONDS)
            state.metrics.close()

    middleware = [
        Middleware(Auth, keys=settings.api_keys, rejected=state.metrics.rejected),
        Middleware(Endings, running=running),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes),
    ]
    if settings.names is not None:
        middleware.insert(0, Middleware(Hosts, names=settings.names, rejected=state.metrics.rejected))
    if settings.cors_origins:
        headers = ["authorization", "content-type"]
        cors = Middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=("GET", "POST"), allow_headers=headers)
        middleware.insert(0, cors)
    if settings.access_log:
        middleware.insert(0, Middleware(AccessLog))
    app = Starlette(
        routes=[*(route for module in _MODULES for route in module.routes(state)), *metrics.routes(state.metrics)],
        middleware=middleware,
        exception_handlers={RequestError: on_request_error, HTTPException: on_http_error, Exception: on_bug},
        lifespan=life,
    )
    app.state.server = state
    return app


async def _warm(state: ServerState) -> None:
    """Run vision and decoder once, with every number of replies at a time, so that no request meets a first run."""
    try:
        for size in sizes_to_try(state.settings.image_size, state.vlm.vlm.manifest):
            picture = await state.vlm.encode_image(np.full((size, size, 3), 127, np.uint8), image_size=size)
        lengths = [_WARM_TOKENS * number for number in range(1, state.settings.slots + 1)]
        await asyncio.gather(*(state.vlm.generate("What is this?", picture, max_new_tokens=length) for length in lengths))
    except Exception as error:
        state.failure = error
        state.stop()
    else:
        state.metrics.begin()
        state.ready.set()
