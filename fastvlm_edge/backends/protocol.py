"""The interface of a backend, which runs the two graphs and owns the KV cache: one slot for each conversation that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.dtypes import storage
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import EngineRecord
from fastvlm_edge.model_dir.manifest import DecoderSpec, VisionSpec

PREFILL_CHUNK = 512
"""Largest number of ids per call. Longer prompts are several calls."""
LOGIT_POSITIONS = 16
"""Largest number of positions per call for which every backend gives logits: TensorRT engines are built for 16 (engines/profiles.py)."""


class ImageFeatures(Protocol):
    """The visual tokens of one picture, in host or device memory as the backend chooses."""

    @property
    def rows(self) -> int:
        """Number of visual tokens."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""

    def numpy(self) -> NDArray[np.float32]:
        """A copy on the host: [rows, hidden]."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """Outputs of a step at its `m` requested positions. The next step may overwrite the arrays: copy what is needed for longer."""

    top_values: NDArray[np.float32]
    """[m, candidates]: the largest logits, in descending order."""
    top_ids: NDArray[np.int64]
    """[m, candidates]: the token ids of `top_values`."""
    log_normalizer: NDArray[np.float32]
    """[m]: log(sum(exp(logits))) of each row. A logit minus it is the natural logarithm of the probability."""
    logits: NDArray[np.float32] | None
    """[m, vocab], or None if they were not requested."""


class SavedSlot(Protocol):
    """A copy of the first positions of a slot, in host or device memory as the backend chooses."""

    @property
    def length(self) -> int:
        """Number of positions."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""


class Decoder(Protocol):
    """Runs the decoder. Positions are implied: a call continues after those that the slot holds."""

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        slot: int = 0,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        """Run the decoder on `input_ids` and append their keys and values to a slot.

        An id below `vocab` is a text token; `vocab + k` is row k of all `image_features`, concatenated. `logit_positions` are indices into
        `input_ids`; None means the last one. Raises FastVLMError if the context is full or the library fails; the cache is then unchanged.
        """

    def reset(self, slot: int = 0) -> None:
        """Forget all positions of a slot."""


class Backend(Decoder, Protocol):
    """Runs `vision.onnx` and `decoder.onnx` (docs/graphs.md). One call at a time, but for `encode`, which may run beside the others."""

    name: str
    """A name that `select` takes, never `auto`."""
    description: str
    """Library, version and device, as text for users."""
    slots: int
    """Most conversations that the cache holds at a time."""
    position_bytes: int
    """Memory of one position of one slot."""
    engines: EngineRecord | None
    """The record of the TensorRT engines that it runs; None if it runs none."""

    @property
    def lengths(self) -> Sequence[int]:
        """Number of positions in each slot: [slots]."""

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """Run the vision encoder: pixel_values [1, 3, S, S] in 0..1 -> the features of that picture."""

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        """Append one text token to each of the slots 0 to n-1, in one call. Row i of the output is that of slot i. Errors as in `step`."""

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the positions of a slot from `length` on, when a conversation branches or a draft was rejected."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`, and nothing else.

        Raises FastVLMError if memory is short; then nothing has changed. If the library fails, `target` may be empty.
        """

    def save(self, slot: int) -> SavedSlot | None:
        """A copy of a slot that outlives it. None if the backend has no copies, or there is no memory for it."""

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions of a copy, and nothing else. Errors as in `copy`."""

    def close(self) -> None:
        """Release sessions and memory. The backend cannot be used afterwards."""


def position_bytes(spec: DecoderSpec) -> int:
    """Memory of the keys and values of one position of one conversation."""
    return spec.layers * 2 * spec.kv_heads * spec.head_dim * storage(spec.dtype).itemsize


def same_pictures(some: tuple[ImageFeatures, ...], others: tuple[ImageFeatures, ...]) -> bool:
    """Whether both are the same objects in the same order. Equal features of two encodings are not the same."""
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def check_context(positions: int, context: int) -> None:
    """Raise FastVLMError if the context does not hold that many positions."""
    if positions > context:
        raise FastVLMError(f"{positions} positions do not fit into the context of {context}", "shorten the conversation")


def check_pixels(pixel_values: NDArray[np.float32], vision: VisionSpec) -> int:
    """The size of the picture. Raises FastVLMError if pixel_values are not [1, 3, S, S] with one of the model's sizes S."""
    for size in vision.sizes:
        if pixel_values.shape == (1, 3, size, size):
            return size
    sizes = " or ".join(map(str, vision.sizes))
    what = f"pixel_values have shape {list(pixel_values.shape)}, but this model takes [1, 3, S, S] with S = {sizes}"
    raise FastVLMError(what, "preprocess the picture for an image size in this model's manifest")
