"""The safetensors files of a checkpoint: headers are read at once, data one tensor (or a few rows) at a time.

Files are read and not mapped into memory, so a conversion needs memory only for the tensors that it holds. Nothing here knows what a tensor
means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fastvlm_edge.errors import FastVLMError

INDEX_NAME = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}
MAX_HEADER = 100_000_000
LFS_MARK = b"version https://git-lfs.github.com/spec/"
FINITE_BLOCK = 1 << 22
EXPONENT = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is stored: its data begin at byte `start` of the file `path`."""

    path: Path
    start: int
    shape: tuple[int, ...]
    kind: str
    """Its safetensors dtype: a key of DTYPES, or one that this toolkit does not support."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type. Raises KeyError for an unsupported dtype."""
        return DTYPES[self.kind]


def find_weights(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises FastVLMError that says what the directory is if it is not a checkpoint."""
    weights = weight_files(directory)
    exported = any(directory.glob("*.mlpackage")) or any(directory.glob("*.mlmodelc")) or (directory / "weights.npz").is_file()
    if not weights and exported:
        raise FastVLMError(f"{directory} is an export for CoreML or MLX, not a checkpoint", "give the checkpoint that it was made from")
    if not weights and ((directory / "adapter_config.json").is_file() or any(directory.glob("adapter_model.*"))):
        raise FastVLMError(f"{directory} contains only a LoRA adapter", "merge it into its base model, save that, and give the result")
    if not weights and any(directory.glob("pytorch_model*.bin")):
        raise FastVLMError(
            f"{directory} has its weights in pytorch_model*.bin, a format that can run code when it is opened",
            "convert it to safetensors first: load it with its own code and call save_pretrained(..., safe_serialization=True)",
        )
    if not weights and (directory / "mm_projector.bin").is_file():
        raise FastVLMError(f"{directory} contains only a projector (mm_projector.bin)", "give the directory of a whole FastVLM checkpoint")
    if not (directory / "config.json").is_file():
        inner = sorted(path.parent for path in directory.glob("*/config.json"))
        zipped = sorted(directory.glob("*.zip"))
        hint = f"try {inner[0]}" if inner else f"unpack {zipped[0].name} first" if zipped else "check the path"
        raise FastVLMError(f"{directory} is not a checkpoint: config.json is missing", hint)
    if not weights:
        raise FastVLMError(f"{directory} has a config.json but no safetensors file", "download the whole checkpoint again")
    return weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those that the index lists, or the only one; empty if there are none.

    Raises FastVLMError for a missing shard, a damaged index, or several files without an index.
    """
    index_path = directory / INDEX_NAME
    if index_path.is_file():
        refuse_lfs_pointer(index_path)
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({"" + name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastVLMError(f"{index_path} is damaged ({error})", "copy or download it again") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FastVLMError(
                f"{directory / missing[0]} is missing ({len(missing)} of {len(names)} shards listed in {INDEX_NAME})",
                "download the whole checkpoint again",
            )
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if len(found) > 1:
        raise FastVLMError(
            f"{directory} has {len(found)} safetensors files but no {INDEX_NAME}, which says which of them belong together",
            "download the whole checkpoint again",
        )
    return found


def read_shards(directory: Path, files: Sequence[Path]) -> dict[str, Entry]:
    """Every tensor of `files` by name, in file order.

    Raises FastVLMError for a truncated or damaged file, a tensor that appears twice, or one that is not where the index says.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in entries:
                raise FastVLMError(
                    f"tensor {name} appears in both {entries[name].path.name} and {path.name} of {directory}",
                    "download the checkpoint again into an empty directory",
                )
            entries[name] = entry
    index_path = directory / INDEX_NAME
    if index_path.is_file():
        weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        for name, shard in weight_map.items():
            if name not in entries or entries[name].path.name != shard:
                raise FastVLMError(f"{index_path} lists tensor {name} in {shard}, but it is not there", "download the checkpoint again")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8-byte little-endian header length, JSON header, data.

    Raises FastVLMError if the file is a git-LFS pointer, is truncated, or has no valid header.
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
        header = json.loads(raw, object_pairs_hook=_unique)
        items = {name: _read_item(item) for name, item in header.items() if name != "__metadata__"}
    except DuplicateError as error:
        raise FastVLMError(f"tensor {error} appears twice in the header of {path}", again) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastVLMError(f"the header of {path} is damaged ({error})", again) from None
    entries = {}
    for name, (kind, shape, start, end) in items.items():
        if not 0 <= start <= end or min(shape, default=0) < 0:
            raise FastVLMError(f"the header of {path} is damaged: {name} {list(shape)} is stored at bytes {start} to {end}", again)
        if 8 + length + end > size:
            raise FastVLMError(f"{path} is truncated: it has {size} bytes, but tensor {name} ends at byte {8 + length + end}", again)
        if kind in DTYPES and end - start != math.prod(shape) * DTYPES[kind].itemsize:
            raise FastVLMError(f"the header of {path} is damaged: {name} {list(shape)} {kind} cannot have {end - start} bytes", again)
        entries[name] = Entry(path, 8 + length + start, shape, kind)
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


def refuse_lfs_pointer(path: Path) -> None:
    """Raise FastVLMError if `path` is the small text file that git stores in place of a large one."""
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            raise FastVLMError(
                f"{path} is a git-LFS pointer, not the file itself", "run `git lfs pull` in that directory, or give the hub id"
            )


def read_tensor(name: str, entry: Entry, rows: tuple[int, int] | None = None) -> npt.NDArray[Any]:
    """A tensor as a new array, or only its rows [start, stop) along the first axis.

    Raises FastVLMError if the file was removed or truncated after its header was read, and IndexError if the rows are out of range.
    """
    shape = entry.shape
    offset = entry.start
    if rows is not None:
        start, stop = rows
        if not (shape and 0 <= start <= stop <= shape[0]):
            raise IndexError(f"rows {start} to {stop} of {name}, which has shape {list(shape)}")
        offset += start * math.prod(shape[1:]) * entry.dtype.itemsize
        shape = (stop - start, *shape[1:])
    array = np.empty(shape, entry.dtype)
    if not array.size:
        return array
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    try:
        with entry.path.open("rb") as file:
            file.seek(offset)
            while count := file.readinto(view[done:]):
                done += count
    except OSError as error:
        raise FastVLMError(f"{entry.path} cannot be read ({error})", "check that it still exists and is readable") from None
    if done < len(view):
        raise FastVLMError(f"{entry.path} ends inside tensor {name}", "copy or download it again")
    return array


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
