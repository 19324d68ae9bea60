"""Counts of requests, for `/metrics`."""

from __future__ import annotations

from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.server.settings import Settings


class Metrics:
    """What happens to replies. Of each, `queued`, `started` and `finished` are called once, in this order."""

    def __init__(self, vlm: AsyncFastVLM, settings: Settings) -> None:
        self.waiting = self.running = 0
        self.ended: dict[str, int] = {}
        self.refused: dict[int, int] = {}
        self.first_tokens: list[float] = []
        self.gaps = 0

    def queued(self) -> None:
        """A reply was asked for."""
        self.waiting += 1

    def started(self) -> None:
        """It has a place, or its client went away before."""
        self.waiting -= 1
        self.running += 1

    def finished(self, reason: str, reply: Reply | None, seconds: float, queue_seconds: float) -> None:
        """It ended: `stop`, `length`, `cancelled` or `error`, some seconds after the request came."""
        self.running -= 1
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def first_token(self, seconds: float) -> None:
        """Its first text came, some seconds after the request."""
        self.first_tokens.append(seconds)

    def token_gap(self, seconds: float) -> None:
        """Its next text came, some seconds after the one before."""
        self.gaps += 1

    def rejected(self, status: int) -> None:
        """A request was answered with an error."""
        self.refused[status] = self.refused.get(status, 0) + 1
