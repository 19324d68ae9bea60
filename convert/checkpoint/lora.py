"""Weights of a base model with the low-rank update of an adapter, added while a tensor is read: one tensor in memory at a time.

The sums are computed and stay in float32, because a small update would be lost in the base model's bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.checkpoint.entries import Entry, Rows

Float32 = npt.NDArray[np.float32]
BLOCK = 1 << 22
"""Values of a product that are computed at once."""


@dataclass(frozen=True)
class _Changed(Entry):
    """A tensor of a base model that an adapter changes. `path` is the adapter's file."""

    base: Entry

    @property
    def origin(self) -> str:
        """Where the values come from, for errors."""
        return f"{self.base.origin} with the adapter {super().origin}"


@dataclass(frozen=True)
class Merged(_Changed):
    """`base + scale * up @ down` (LoRA, arXiv 2106.09685). A convolution's update is that of its weights as a matrix [out, in * h * w].

    With a `magnitude`, every row is scaled to that norm (DoRA, arXiv 2402.09353). `base` is [out, in], or [out, in, h, w].
    """

    down: Entry
    """[rank, in], or [rank, in, h, w]"""
    up: Entry
    """[out, rank], or [out, rank, 1, 1]"""
    scale: float
    magnitude: Entry | None = None
    """[out], or [1, out, 1, 1]"""

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`, in float32."""
        weight = _float32(self.base.read(name, rows))
        matrix = weight.reshape(len(weight), math.prod(self.shape[1:]))
        rank = self.down.shape[0]
        up, down = _float32(self.up.read(name, rows)), _float32(self.down.read(name))
        _add_product(matrix, self.scale, up.reshape(-1, rank), down.reshape(rank, -1))
        if self.magnitude is not None:
            lengths = _float32(self.magnitude.read(name)).reshape(-1)[slice(*rows) if rows else slice(None)]
            matrix *= (lengths / np.sqrt(np.square(matrix).sum(axis=1)))[:, None]
        return weight


@dataclass(frozen=True)
class MergedEmbedding(_Changed):
    """`base + scale * (up @ down).T`: a table of rows, one for each id. `base` is [vocab, hidden]."""

    down: Entry
    """[rank, vocab]"""
    up: Entry
    """[hidden, rank]"""
    scale: float

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`, in float32."""
        table = _float32(self.base.read(name, rows))
        down = self.down.read(name)[:, slice(*rows) if rows else slice(None)]
        _add_product(table, self.scale, _float32(down).T, _float32(self.up.read(name)).T)
        return table


@dataclass(frozen=True)
class MergedBias(_Changed):
    """`base + scale * update`."""

    update: Entry
    scale: float

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`, in float32."""
        total: Float32 = _float32(self.base.read(name, rows)) + np.float32(self.scale) * _float32(self.update.read(name, rows))
        return total


def _add_product(matrix: Float32, scale: float, left: Float32, right: Float32) -> None:
    """`matrix += scale * left @ right` in blocks of rows, so that the product needs little memory."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        matrix[start : start + step] += np.float32(scale) * (left[start : start + step] @ right)


def _float32(array: npt.NDArray[Any]) -> Float32:
    return array.astype(np.float32, copy=False)
