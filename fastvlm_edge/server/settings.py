"""Every limit and switch of the server. The command `serve` fills it from its options and the environment."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from fastvlm_edge.generation.cascade import ImageSize
from fastvlm_edge.generation.vlm import SLOTS

QUEUE = 4
"""Requests that wait for each slot at most, unless `Settings.queue` says otherwise."""

FRAMES = 8
"""Pictures that stand for a clip, unless a request says otherwise."""

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(:\d*)?")
"""A name or address with a port, as the header Host has it (RFC 9110, section 7.2), in lower case."""


@dataclass(frozen=True)
class Settings:
    """What a server may do, and how much of it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """A request needs one of them, if there is any; `/health` is open."""
    allowed_hosts: tuple[str, ...] = ()
    """More names of the server, which the header Host may have."""
    model_name: str | None = None
    """What clients call the model; None is the name in its manifest."""
    slots: int = SLOTS
    """Replies that are generated at a time."""
    queue: int = QUEUE * SLOTS
    """Requests that wait at a time; others get status 429."""
    image_size: ImageSize = "auto"
    """Of pictures whose `detail` does not say it. `auto` is the cascade, or the model's default size if it was never fitted."""
    max_tokens: int = 256
    """The longest reply, for requests that do not say."""
    timeout_seconds: float | None = None
    """Longest time of a request, waiting included."""
    drain_seconds: int = 30
    """How long running requests may go on after SIGTERM."""
    max_body_bytes: int = 32 << 20
    max_images: int = 8
    """Pictures of a request, those of earlier turns included."""
    max_image_bytes: int = 10 << 20
    """Of a picture as a file."""
    max_pixels: int | None = None
    """Of a picture, before it is decoded; None is the limit of the runtime."""
    allow_remote_images: bool = False
    """Whether pictures are fetched from https addresses."""
    media_path: Path | None = None
    """Folder whose files may be named by file: addresses."""
    special_tokens: bool = False
    """Read special tokens in prompts as tokens, and show those in replies."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of other origins that may use the server."""
    metrics_alias: str | None = None
    """Prefix of the metrics' names instead of ours: `vllm`."""
    access_log: bool = True
    page: bool = True
    """Whether `/` is the page."""

    @property
    def names(self) -> frozenset[str] | None:
        """What the header Host may have; None is everything.

        That is so without `allowed_hosts` where the network may come in by any name anyway, or a key is needed, which no web page has.
        """
        if not self.allowed_hosts and (self.api_keys or not _is_local(self.host)):
            return None
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in ("localhost", "127.0.0.1", "[::1]", own, *self.allowed_hosts))


def _is_local(host: str) -> bool:
    """Whether only programs on this machine reach the address."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"
