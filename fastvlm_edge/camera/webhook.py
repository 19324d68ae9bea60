"""Posts lines of JSON to an address in a thread, so that an address that is slow or down delays nothing."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from queue import Full, Queue
from typing import Any
from urllib.parse import urlsplit

from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.version import __version__

QUEUED = 64
"""Lines that wait at most; newer ones are not posted."""
TIMEOUT = 10.0
"""Seconds that an address may be silent."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it could lead to another host, which nobody named."""

    def redirect_request(self, *_given: Any) -> None:
        return None


class Webhook:
    """An http or https address that gets lines as POST requests, in their order. `note` is told when it fails first, and when it works."""

    def __init__(self, address: str, note: Callable[[str], None]) -> None:
        """Raises FastVLMError if the address is not one of http or https."""
        self._host = _checked_host(address)
        self._address, self._note = address, note
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lines: Queue[str | None] = Queue(QUEUED)
        self.posted = self.failed = 0
        """Lines that arrived, and that did not: the address failed, or too many were waiting."""
        self._works = True
        self._count = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def post(self, line: str) -> None:
        """Let a line be posted. It does not wait."""
        try:
            self._lines.put_nowait(line)
        except Full:
            self._fail(f"{QUEUED} answers are waiting")

    def close(self, seconds: float = 5.0) -> None:
        """Wait until the lines are posted, but not longer than so many seconds. What is left has failed."""
        end = time.monotonic() + seconds
        waiting = 0
        try:
            self._lines.put(None, timeout=seconds)
        except Full:
            waiting = 1
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            with self._count:
                self.failed += self._lines.unfinished_tasks - 1 + waiting

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._post(line)
            self._lines.task_done()

    def _post(self, line: str) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": f"fastvlm-edge/{__version__}"}
        try:
            request = urllib.request.Request(self._address, line.encode(), headers, method="POST")
            with self._opener.open(request, timeout=TIMEOUT):
                pass
        except urllib.error.HTTPError as error:
            self._fail(f"HTTP status {error.code}" + (", a redirect, which is not followed" if 300 <= error.code < 400 else ""))
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            self._fail(one_line(reason) if isinstance(reason, Exception) else str(reason))
        else:
            with self._count:
                self.posted += 1
                again, self._works = not self._works, True
            if again:
                self._note(f"the webhook at {self._host} works again")

    def _fail(self, why: str) -> None:
        with self._count:
            self.failed += 1
            first, self._works = self._works, False
        if first:
            self._note(f"the webhook at {self._host} failed: {why}")  # the rest of the address may be a secret


def _checked_host(address: str) -> str:
    mend = "give http://HOST/PATH or https://HOST/PATH"
    try:
        parts = urlsplit(address)
        host, user, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise FastVLMError(f"the webhook is not an address ({error})", mend) from None
    if parts.scheme not in ("http", "https") or not host:
        raise FastVLMError("the webhook is not an address of http or https", mend)
    if user is not None:
        raise FastVLMError("the webhook has a user name in its address, which is not supported", mend)
    if any(character.isspace() or not character.isprintable() or ord(character) > 126 for character in address):
        raise FastVLMError("the webhook has characters that no address has", "write them as %20 and so on")
    return host
