"""A backend with a stopwatch: tells the decoder's own time from what the sampler adds to it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import Backend, ImageFeatures, StepOutput


class TimedBackend:
    """Implements `fastvlm_edge.backends.Backend` by another one."""

    def __init__(self, backend: Backend) -> None:
        """Closing the one closes the other."""
        self._backend = backend
        self.name = backend.name
        self.description = backend.description
        self.step_seconds = 0.0
        """Spent in `step` since it was last set to 0."""

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._backend.length

    @property
    def revision(self) -> int:
        """Differs after every change of the cache."""
        return self._backend.revision

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """As the backend does."""
        return self._backend.encode(pixel_values)

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """As the backend does, timed."""
        began = time.perf_counter()
        output = self._backend.step(input_ids, image_features, logit_positions=logit_positions, want_logits=want_logits)
        self.step_seconds += time.perf_counter() - began
        return output

    def truncate(self, length: int) -> None:
        """As the backend does."""
        self._backend.truncate(length)

    def reset(self) -> None:
        """As the backend does."""
        self._backend.reset()

    def close(self) -> None:
        """As the backend does."""
        self._backend.close()
