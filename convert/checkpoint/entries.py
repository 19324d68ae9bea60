"""One tensor of a checkpoint, wherever its values are: it is read when it is asked for, whole or a few rows of it.

Where the values come from is up to the kinds of entry: `shards.py`, `pickles.py`, `mlx.py`, `lora.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}
Rows = tuple[int, int]
"""[start, stop) along the first axis."""


@dataclass(frozen=True)
class Entry(ABC):
    """What is known of a tensor before it is read."""

    path: Path
    """The file that holds its values."""
    shape: tuple[int, ...]
    kind: str
    """Its type in the terms of safetensors: a key of DTYPES, or one that this toolkit does not support."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type. Raises KeyError for an unsupported one."""
        return DTYPES[self.kind]

    @property
    def origin(self) -> str:
        """Where the values come from, for errors."""
        return str(self.path.parent)

    @abstractmethod
    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """The tensor as a new array, or only some of its rows. `name` is what an error calls it.

        Raises FastVLMError if the file can no longer be read, and IndexError if the rows are out of range.
        """


def check_rows(name: str, shape: tuple[int, ...], rows: Rows) -> None:
    """Raise IndexError if a tensor of this shape has no such rows."""
    start, stop = rows
    if not (shape and 0 <= start <= stop <= shape[0]):
        raise IndexError(f"rows {start} to {stop} of {name}, which has shape {list(shape)}")
