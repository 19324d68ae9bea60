"""A backend with a stopwatch, to tell the time of the decoder from that of the sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import Backend, ImageFeatures, SavedSlot, StepOutput


class TimedBackend:
    """Passes every call of the `Backend` protocol on to another backend, and measures the time of `step` and `decode`."""

    def __init__(self, backend: Backend) -> None:
        """`close` also closes `backend`."""
        self._backend = backend
        self.name = backend.name
        self.description = backend.description
        self.slots = backend.slots
        self.position_bytes = backend.position_bytes
        self.engines = backend.engines
        self.step_seconds = 0.0
        """Time spent in `step` since this was last set to 0."""
        self.decodes: list[tuple[int, float]] = []
        """Rows and time of the end (`time.perf_counter`) of every call of `decode` since this was last emptied."""

    @property
    def lengths(self) -> Sequence[int]:
        """Positions in each slot."""
        return self._backend.lengths

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """Encode with the backend, not timed."""
        return self._backend.encode(pixel_values)

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        slot: int = 0,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the step of the backend, and add its time to `step_seconds`."""
        began = time.perf_counter()
        output = self._backend.step(input_ids, image_features, slot=slot, logit_positions=logit_positions, want_logits=want_logits)
        self.step_seconds += time.perf_counter() - began
        return output

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Decode with the backend, and add its time to `step_seconds`."""
        began = time.perf_counter()
        output = self._backend.decode(input_ids, want_logits=want_logits)
        ended = time.perf_counter()
        self.step_seconds += ended - began
        self.decodes.append((len(input_ids), ended))
        return output

    def truncate(self, length: int, slot: int = 0) -> None:
        """Shorten a slot of the backend to `length` positions."""
        self._backend.truncate(length, slot)

    def reset(self, slot: int = 0) -> None:
        """Empty a slot of the backend."""
        self._backend.reset(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a slot of the backend."""
        self._backend.copy(source, target, length)

    def save(self, slot: int) -> SavedSlot | None:
        """A copy of a slot of the backend."""
        return self._backend.save(slot)

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Restore a slot of the backend."""
        self._backend.restore(saved, slot, length)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()
