"""What every backend does: run the two graphs and own the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import VisionSpec


class ImageFeatures(Protocol):
    """The visual tokens of one picture, wherever the backend that made them keeps them."""

    @property
    def rows(self) -> int:
        """How many visual tokens."""

    def numpy(self) -> NDArray[np.float32]:
        """A copy on the host: [rows, hidden]."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a step says about its `m` asked-for positions. The arrays may be reused by the next step: take from them what you need first."""

    top_values: NDArray[np.float32]
    """[m, candidates], largest first."""
    top_ids: NDArray[np.int64]
    """[m, candidates]"""
    logits: NDArray[np.float32] | None
    """[m, vocab], where asked for."""


class Backend(Protocol):
    """Runs `vision.onnx` and `decoder.onnx` (docs/graphs.md) for one conversation at a time.

    Positions are implied: a step continues after the `length` positions that the cache holds.
    """

    name: str
    """As in `select`, after `auto` was resolved."""
    description: str
    """Library, version and device, for a person to read."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """pixel_values [1, 3, S, S] in 0..1 -> the features of that picture."""

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to the cache.

        An id of `vocab + k` is row k of all `image_features` one after another. `logit_positions` index into `input_ids`; None is the last.
        Raises FastVLMError where the context is full or the library fails; the cache then is as before.
        """

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on: a conversation branches, or a draft was refused."""

    def reset(self) -> None:
        """Forget all positions."""

    def close(self) -> None:
        """Give back sessions and memory. The backend cannot be used afterwards."""


def check_pixels(pixel_values: NDArray[np.float32], vision: VisionSpec) -> None:
    """Refuse pixel_values of another shape than the encoder's own with a FastVLMError."""
    expected = (1, 3, vision.image_size, vision.image_size)
    if pixel_values.shape != expected:
        raise FastVLMError(f"pixel_values have shape {list(pixel_values.shape)}; this model takes {list(expected)}")
