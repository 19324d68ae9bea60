"""Pickles of PyTorch that hold weights (`pytorch_model.bin`, parts of fine-tunes), read without running anything that is in them.

PyTorch itself reads them, with `weights_only` and mapped into memory: only the tensors that are read take memory.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy.typing as npt
import torch

from fastvlm_edge.convert.checkpoint.entries import Entry, Rows, check_rows
from fastvlm_edge.convert.checkpoint.files import refuse_lfs_pointer
from fastvlm_edge.errors import FastVLMError

ZIP_MARK = b"PK\x03\x04"
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
MAPPED_BYTES = 1 << 28
"""So much of a file is read before it is mapped anew: pages that were read count as memory of the process until then."""
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
"""What a pickle asks for, in the error that PyTorch raises for anything but tensors."""
SAVE_AGAIN = "if you trust its origin, load it with the code that wrote it, and save it with save_pretrained(safe_serialization=True)"


class PickleFile:
    """The tensors of one file, by name."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises FastVLMError if it is damaged, in an old format, or holds anything but tensors."""
        self.path = path
        self._tensors = _load(path)
        self._read = 0

    def entries(self) -> dict[str, Entry]:
        """Every tensor, in the order of the file."""
        return {name: PickleEntry(self.path, tuple(each.shape), _kind(each), name, self) for name, each in self._tensors.items()}

    def read(self, key: str, rows: Rows | None) -> npt.NDArray[Any]:
        """A tensor, or rows of it, as a new array."""
        if self._read > MAPPED_BYTES:
            self._tensors, self._read = _load(self.path), 0
        tensor = self._tensors[key] if rows is None else self._tensors[key][slice(*rows)]
        array = to_numpy(tensor)
        self._read += array.nbytes
        return array


@dataclass(frozen=True)
class PickleEntry(Entry):
    """A tensor of a `PickleFile`, under the name `key`."""

    key: str
    file: PickleFile = field(repr=False, compare=False)

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`."""
        if rows is not None:
            check_rows(name, self.shape, rows)
        return self.file.read(self.key, rows)


def read_pickle(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises FastVLMError if it is damaged, in an old format, or holds anything but tensors."""
    return PickleFile(path).entries()


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy in the same type; numpy has bfloat16 from ml_dtypes."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if copy.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = copy.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = copy.numpy()
    return array


def _kind(tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout} {tensor.dtype}"
    return KINDS.get(tensor.dtype, str(tensor.dtype))


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, none of which is read yet.

    Only the zip format is opened. PyTorch before 2.6 could run code of the older ones, even with `weights_only` (CVE-2025-32434).
    """
    try:
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            mark = file.read(len(ZIP_MARK))
    except OSError as error:
        raise FastVLMError(f"{path} cannot be read ({error})", "check that it still exists and is readable") from None
    if mark != ZIP_MARK:
        raise FastVLMError(
            f"{path} is not in the zip format of torch.save (PyTorch 1.6 and newer), and older formats can run code when they are opened",
            SAVE_AGAIN,
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        foreign = FOREIGN.search(str(error))
        what = f"asks for {foreign[1]}" if foreign else f"cannot be read as tensors ({_first_line(error)})"
        raise FastVLMError(f"{path} {what}: it holds more than tensors, and was not opened", SAVE_AGAIN) from None
    except Exception as error:  # whatever damaged bytes lead to
        raise FastVLMError(f"{path} is damaged ({_first_line(error)})", "copy or download it again") from None
    if not isinstance(loaded, dict):
        raise FastVLMError(f"{path} holds a {type(loaded).__name__}, not tensors by name", SAVE_AGAIN)
    for name, each in loaded.items():
        if not (isinstance(name, str) and isinstance(each, torch.Tensor)):
            raise FastVLMError(f"{path} holds {name!r}, a {type(each).__name__}, where tensors are expected", SAVE_AGAIN)
    return loaded


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
