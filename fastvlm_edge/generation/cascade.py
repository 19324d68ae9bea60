"""The sizes at which a question about a picture is asked, one after another, until an answer stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import Answer
from fastvlm_edge.generation.reply import Confidence, confidence
from fastvlm_edge.model_dir.manifest import Cascade, Manifest

ImageSize: TypeAlias = "int | Literal['auto'] | None"
"""Pixels of a side, one of those that the model has; `auto` is the cascade of the manifest, None the default size."""


def check_image_size(image_size: ImageSize, manifest: Manifest) -> None:
    """Raise FastVLMError for a size that the model does not have."""
    if image_size is None or image_size == "auto":
        return
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        sizes = ", ".join(map(str, manifest.vision.sizes))
        raise FastVLMError(f"image_size is {image_size!r}", f'use one of: {sizes}, or "auto"')
    manifest.vision.at(image_size)


def sizes_to_try(image_size: ImageSize, manifest: Manifest) -> list[int]:
    """The sizes that a picture may be encoded at, the first one first: one, unless it is `auto` and a cascade was fitted."""
    if image_size == "auto" and manifest.cascade is not None:
        return list(manifest.cascade.sizes)
    return [image_size if isinstance(image_size, int) else manifest.vision.image_size]


def stands(sure: Confidence | None, cascade: Cascade) -> bool:
    """Whether an answer at one of the first sizes is the reply. One without any token never is."""
    return sure is not None and (sure.mean if cascade.confidence == "mean" else sure.least) >= cascade.threshold


class Attempts:
    """Where one question is in its sizes. A single size is no cascade, and its answer always stands."""

    def __init__(self, sizes: Sequence[int], cascade: Cascade | None = None) -> None:
        """`sizes` in the order in which they are tried. `cascade` decides which answers stand."""
        self._sizes, self._cascade, self._at = sizes, cascade, 0
        self.seconds = 0.0
        """What the attempts took whose answers do not stand."""

    @property
    def size(self) -> int:
        """Pictures have this size now."""
        return self._sizes[self._at]

    @property
    def tried(self) -> list[int]:
        """The sizes so far; empty if no cascade decides."""
        return [] if self._cascade is None else list(self._sizes[: self._at + 1])

    @property
    def last(self) -> bool:
        """Whether the answer at this size stands in any case."""
        return self._cascade is None or self._at + 1 == len(self._sizes)

    @property
    def least(self) -> float:
        """A token that is less likely than this decides that an answer at this size does not stand, whatever follows."""
        return self._cascade.threshold if self._cascade is not None and self._cascade.confidence == "least" and not self.last else 0.0

    def stands(self, answer: Answer) -> bool:
        """Whether a complete answer at this size is the reply."""
        return self._cascade is None or self.last or stands(confidence(answer.log_probabilities), self._cascade)

    def next(self, seconds: float) -> None:
        """Go on to the next size, after an attempt that took so long."""
        self._at += 1
        self.seconds += seconds
