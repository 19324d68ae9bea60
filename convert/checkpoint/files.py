"""The small files of a checkpoint: its JSON documents, and the pointers that git leaves in place of large files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

LFS_MARK = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FastVLMError if the file is damaged or a git-LFS pointer."""
    refuse_lfs_pointer(path)
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FastVLMError(f"{path} is damaged ({error})", "copy or download it again") from None
    if not isinstance(document, dict):
        raise FastVLMError(f"{path} is damaged (it is not a json object)", "copy or download it again")
    return document


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, but an empty object if there is no such file."""
    return read_json(path) if path.is_file() else {}


def refuse_lfs_pointer(path: Path) -> None:
    """Raise FastVLMError if `path` is the small text file that git stores in place of a large one."""
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            raise FastVLMError(
                f"{path} is a git-LFS pointer, not the file itself", "run `git lfs pull` in that directory, or give the hub id"
            )
