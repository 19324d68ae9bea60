"""The queue in front of the engine: N places, a bounded number of requests that wait for one, in the order of their arrival."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

from fastvlm_edge.server.errors import RequestError

_WEIGHT = 0.2
"""Of the newest request in the mean time of requests."""


class Place:
    """The place of one request, or the wait for it. It may take the room of several, for a request of several replies."""

    def __init__(self, admission: Admission, count: int) -> None:
        """Made by `Admission.enter`."""
        self.count = count
        self._admission = admission
        self._granted = asyncio.get_running_loop().create_future()
        self._left = False
        self.since = time.monotonic()
        """When it was granted, or asked for."""

    @property
    def granted(self) -> bool:
        """Whether the request may begin."""
        return self._granted.done() and not self._granted.cancelled()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until the request may begin, at most some seconds. Whether it may."""
        done, _ = await asyncio.wait((self._granted,), timeout=seconds)
        return bool(done)

    def grant(self) -> None:
        """Let the request begin."""
        self.since = time.monotonic()
        if not self._granted.done():
            self._granted.set_result(None)

    def leave(self) -> None:
        """Free the place, or give up waiting for it. May be called twice."""
        if not self._left:
            self._left = True
            self._admission._leave(self)


class Admission:
    """Hands out places. All of it runs in one event loop."""

    def __init__(self, places: int, queue: int) -> None:
        """`queue` is how many requests may wait."""
        self.places, self.queue = places, queue
        self._free = places
        self._waiting: deque[Place] = deque()
        self._seconds = 1.0
        """Mean time that a place is taken."""

    @property
    def running(self) -> int:
        """Places that are taken."""
        return self.places - self._free

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def enter(self, count: int = 1) -> Place:
        """A place for a request of `count` replies, at the end of the queue. Raises RequestError with status 429 if the queue is full."""
        place = Place(self, count)
        if not self._waiting and count <= self._free:
            self._free -= count
            place.grant()
        elif len(self._waiting) >= self.queue:
            raise RequestError(
                429,
                f"{self.places} replies are being generated and {len(self._waiting)} requests wait, which is the limit; try again later",
                type="rate_limit_error",
                code="queue_full",
                retry_after=self.retry_after,
            )
        else:
            self._waiting.append(place)
        return place

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that comes again is likely to find room in the queue."""
        return max(1, math.ceil(self._seconds / self.places))

    def _leave(self, place: Place) -> None:
        if place.granted:
            self._free += place.count
            self._seconds += _WEIGHT * (time.monotonic() - place.since - self._seconds)
        else:
            self._waiting.remove(place)
        while self._waiting and self._waiting[0].count <= self._free:
            following = self._waiting.popleft()
            self._free -= following.count
            following.grant()
