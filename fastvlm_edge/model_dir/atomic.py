"""Directories and files that appear complete or not at all: they are written beside their final name and then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvlm_edge.errors import FastVLMError


@contextmanager
def written_beside(output: Path, *, replace: bool, elsewhere: str) -> Iterator[Path]:
    """A new directory beside `output` for the block to fill. It is renamed to `output` if the block succeeds, and removed if it fails.

    With `replace`, an old directory of that name is removed only after the new one is complete. If `output` is a symbolic link, its target
    is written. Leftovers of killed processes are removed. Raises FastVLMError if the disk is full or not writable, with the remedy
    `elsewhere`.
    """
    output = Path(os.path.realpath(output))  # beside the target of a link: renaming works only within one file system
    marker = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for stale in output.parent.glob(f"{marker}*"):
            if not _is_running(stale.name.removeprefix(marker)):
                shutil.rmtree(stale, ignore_errors=True)
        partial = output.parent / f"{marker}{os.getpid()}"
        partial.mkdir()
    except OSError as error:
        raise FastVLMError(f"{output.parent} cannot be written to ({error.strerror})", elsewhere) from None
    old = output.parent / f"{partial.name}-old"
    try:
        try:
            yield partial
            for path in partial.iterdir():
                _sync(path)
            if replace and output.exists():
                output.rename(old)
            partial.rename(output)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FastVLMError(
                    f"the disk of {output.parent} is full; nothing was left there", f"free some space, or {elsewhere}"
                ) from None
            raise FastVLMError(f"{output} could not be written ({error}); nothing was left there", elsewhere) from error
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the block to write to.

    The file replaces `path` if the block succeeds, and is removed if it fails.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    pid = pid.removesuffix("-old")
    return not pid.isdigit() or Path(f"/proc/{pid}").exists()


def _sync(path: Path) -> None:
    """Make sure that the content of a file is on the disk before its directory is renamed."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
