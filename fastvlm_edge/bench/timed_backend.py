"""A backend with a stopwatch, to tell the time of the decoder from that of the sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import Backend, ImageFeatures, StepOutput


class TimedBackend:
    """Passes every call of the `Backend` protocol on to another backend, and measures the time of `step`."""

    def __init__(self, backend: Backend) -> None:
        """`close` also closes `backend`."""
        self._backend = backend
        self.name = backend.name
        self.description = backend.description
        self.step_seconds = 0.0
        """Time spent in `step` since this was last set to 0."""

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._backend.length

    @property
    def revision(self) -> int:
        """Differs after every change of the cache."""
        return self._backend.revision

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """Encode with the backend, not timed."""
        return self._backend.encode(pixel_values)

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the step of the backend, and add its time to `step_seconds`."""
        began = time.perf_counter()
        output = self._backend.step(input_ids, image_features, logit_positions=logit_positions, want_logits=want_logits)
        self.step_seconds += time.perf_counter() - began
        return output

    def truncate(self, length: int) -> None:
        """Shorten the cache of the backend to `length` positions."""
        self._backend.truncate(length)

    def reset(self) -> None:
        """Empty the cache of the backend."""
        self._backend.reset()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()
