"""What all parts of the server share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.images import model_digest
from fastvlm_edge.server.admission import Admission
from fastvlm_edge.server.errors import RequestError, not_ready
from fastvlm_edge.server.metrics import Metrics
from fastvlm_edge.server.pictures import KnownPictures
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.version import __version__


@dataclass
class ServerState:
    """The model, and everything around it."""

    vlm: AsyncFastVLM
    settings: Settings
    metrics: Metrics
    admission: Admission
    ready: asyncio.Event
    """Set when vision and decoder have run once."""
    pictures: KnownPictures = field(default_factory=KnownPictures)
    started: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    failure: BaseException | None = None
    """Why the model does not become ready."""
    stop: Callable[[], None] = lambda: None
    """Ends the server."""

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.model_name or self.vlm.vlm.manifest.name

    @cached_property
    def fingerprint(self) -> str:
        """`system_fingerprint`: it changes with the model's files and with what runs them."""
        backend = self.vlm.vlm.backend
        parts = (model_digest(self.vlm.vlm.manifest).hex(), backend.name, backend.description, __version__)
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def check_ready(self) -> None:
        """Raise RequestError until the model is warmed up."""
        if self.failure is not None:
            raise RequestError(503, f"the model failed its first run: {self.failure}", type="unavailable_error", code="failed")
        if not self.ready.is_set():
            raise not_ready("the model is loading; try again in a second")

    def check_model(self, name: str | None) -> None:
        """Raise RequestError if a request names another model."""
        if name and name != self.model_name:
            message = f"there is no model {name[:80]!r}, only {self.model_name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")
