"""Who may use the server, as pure ASGI middleware: names of the server that are answered, and API keys (`Authorization: Bearer KEY`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from hmac import compare_digest
from typing import TYPE_CHECKING

from fastvlm_edge.server.errors import RequestError
from fastvlm_edge.server.settings import HOST

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = frozenset({"/health", "/health/ready", "/", "/page.css", "/page.js"})
"""Paths that need no key: a supervisor asks for the health, and the page, which holds no secret, asks for the key."""


class Hosts:
    """Answers only requests that name this server as one of its names.

    Otherwise any web page could use a server on the machine of its visitor: it lets its own name point to 127.0.0.1 (DNS rebinding), so
    that the browser takes the server for a part of the page. The browser then sends the name of the page as Host.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], rejected: Callable[[int], None] = lambda status: None) -> None:
        """`names` are in lower case, IPv6 addresses in brackets. `rejected` is told of every refusal."""
        self._app, self._names, self._rejected = app, frozenset(names), rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        found = HOST.fullmatch(given[0]) if len(given) == 1 else None
        if found is not None and found[1].rstrip(".") in self._names:
            await self._app(scope, receive, send)
            return
        what = f"this server has no name {(given or [''])[0][:80]!r}; --allowed-host gives it one more"
        refusal = RequestError(403, what, code="host_not_allowed")
        self._rejected(refusal.status)
        await refusal.response(scope, receive, send)


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
