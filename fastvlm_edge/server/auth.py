"""`--api-key`: pure ASGI middleware that answers 401 to whoever does not send one of the keys as `Authorization: Bearer KEY`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from hmac import compare_digest
from typing import TYPE_CHECKING

from fastvlm_edge.server.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = frozenset({"/health", "/health/ready", "/", "/page.css", "/page.js"})
"""Paths that need no key: a supervisor asks for the health, and the page, which holds no secret, asks for the key."""


class Auth:
    """Guards every path but the open ones."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str] = OPEN, rejected: Callable[[int], None] = lambda status: None
    ) -> None:
        """Without `keys` everything is open. `open_paths` are compared as a whole. `rejected` is told of every refusal."""
        self._app, self._rejected = app, rejected
        self._keys = [key.encode("utf-8") for key in keys]
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or not self._keys or scope.get("path") in self._open or self._known(scope):
            await self._app(scope, receive, send)
            return
        refusal = RequestError(401, "a valid API key is needed, as the header Authorization: Bearer KEY", code="invalid_api_key")
        self._rejected(refusal.status)
        response = refusal.response
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].strip().partition(b" ")
        # All are compared, so that the time tells nothing about which of them it might be.
        same = [compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(same)
