"""The files of a checkpoint that hold its weights: what is in them is listed at once, data are read one tensor (or a few rows) at a time.

safetensors files are read and not mapped into memory, so a conversion needs memory only for the tensors that it holds. Nothing here knows
what a tensor means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_edge.convert.checkpoint.entries import DTYPES, Entry, Rows, check_rows
from fastvlm_edge.convert.checkpoint.files import refuse_lfs_pointer
from fastvlm_edge.convert.checkpoint.pickles import read_pickle
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

INDEX_NAMES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
"""The list of the shards, by the suffix of their names."""
MAX_HEADER = 100_000_000
FINITE_BLOCK = 1 << 22
EXPONENT = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}


@dataclass(frozen=True)
class FileEntry(Entry):
    """A tensor whose data begin at byte `start` of the file."""

    start: int

    def read(self, name: str, rows: Rows | None = None) -> npt.NDArray[Any]:
        """As in `Entry`. Raises FastVLMError if the file was removed or truncated after its header was read."""
        shape = self.shape
        offset = self.start
        if rows is not None:
            check_rows(name, shape, rows)
            offset += rows[0] * math.prod(shape[1:]) * self.dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        array = np.empty(shape, self.dtype)
        if not array.size:
            return array
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                while count := file.readinto(view[done:]):
                    done += count
        except OSError as error:
            raise FastVLMError(f"{self.path} cannot be read ({error})", "check that it still exists and is readable") from None
        if done < len(view):
            raise FastVLMError(f"{self.path} ends inside tensor {name}", "copy or download it again")
        return array


def read_shards(directory: Path, files: Sequence[Path]) -> dict[str, Entry]:
    """Every tensor of `files` by name, in file order.

    Raises FastVLMError for a truncated or damaged file, a tensor that appears twice, or one that is not where the index says.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        for name, entry in read_file(path).items():
            if name in entries:
                raise FastVLMError(
                    f"tensor {name} appears in both {entries[name].path.name} and {path.name} of {directory}",
                    "move the file that belongs to another save elsewhere, and correct the index",
                )
            entries[name] = entry
    index_path = directory / INDEX_NAMES[files[0].suffix]
    if index_path.is_file():
        weight_map: dict[str, str] = parse_json(index_path.read_text(encoding="utf-8"))["weight_map"]
        for name, shard in weight_map.items():
            if name not in entries or entries[name].path.name != shard:
                raise FastVLMError(
                    f"{index_path} lists tensor {name} in {shard}, but it is not there: index and shards are from different saves",
                    "copy, download or save all of them again into an empty directory",
                )
    return entries


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of one file: safetensors, or a pickle of PyTorch if it ends in `.bin`. Raises FastVLMError if it is damaged or unsafe."""
    return read_pickle(path) if path.suffix == ".bin" else read_header(path)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8-byte little-endian header length, JSON header, data.

    Raises FastVLMError if the file is a git-LFS pointer, truncated, or has no valid header.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    again = "copy or download it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise FastVLMError(
                f"{path} is truncated or not a safetensors file: it has {size} bytes, but its header alone should have {length}", again
            )
        raw = file.read(length)
    try:
        header = parse_json(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        items = {name: _read_item(item) for name, item in header.items()}
    except DuplicateError as error:
        raise FastVLMError(f"tensor {error} appears twice in the header of {path}", again) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastVLMError(f"the header of {path} is damaged ({error})", again) from None
    entries: dict[str, Entry] = {}
    for name, (kind, shape, start, end) in items.items():
        if not 0 <= start <= end or min(shape, default=0) < 0:
            raise FastVLMError(f"the header of {path} is damaged: {name} {list(shape)} is stored at bytes {start} to {end}", again)
        if 8 + length + end > size:
            raise FastVLMError(f"{path} is truncated: it has {size} bytes, but tensor {name} ends at byte {8 + length + end}", again)
        if kind in DTYPES and end - start != math.prod(shape) * DTYPES[kind].itemsize:
            raise FastVLMError(f"the header of {path} is damaged: {name} {list(shape)} {kind} cannot have {end - start} bytes", again)
        entries[name] = FileEntry(path, shape, kind, 8 + length + start)
    return entries


def _read_item(item: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and end byte of a header item. Raises ValueError, KeyError or TypeError if it is malformed."""
    start, end = map(index, item["data_offsets"])
    return str(item["dtype"]), tuple(map(index, item["shape"])), start, end


class DuplicateError(Exception):
    """A key that appears twice in a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise DuplicateError(key)
        out[key] = value
    return out


def first_non_finite(array: npt.NDArray[Any]) -> int | None:
    """Flat index of the first NaN or infinity; None if all values are finite. Works on the bits in blocks, so it needs little memory."""
    mask = EXPONENT.get(array.dtype.itemsize, {}).get(array.dtype.name)
    if mask is None:
        return None
    bits: npt.NDArray[Any] = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    for start in range(0, bits.size, FINITE_BLOCK):
        bad = (bits[start : start + FINITE_BLOCK] & mask) == mask
        if bad.any():
            return start + int(bad.argmax())
    return None
