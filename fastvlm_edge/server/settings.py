"""Every limit and switch of the server. The command `serve` fills it from its options and the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastvlm_edge.generation.vlm import SLOTS

QUEUE = 4
"""Requests that wait for each slot at most, unless `Settings.queue` says otherwise."""

FRAMES = 8
"""Pictures that stand for a clip, unless a request says otherwise."""


@dataclass(frozen=True)
class Settings:
    """What a server may do, and how much of it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """A request needs one of them, if there is any; `/health` is open."""
    model_name: str | None = None
    """What clients call the model; None is the name in its manifest."""
    slots: int = SLOTS
    """Replies that are generated at a time."""
    queue: int = QUEUE * SLOTS
    """Requests that wait at a time; others get status 429."""
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
