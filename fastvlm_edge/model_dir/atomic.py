"""Folders and files that appear whole or not at all: written beside their final name and renamed into place."""

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
    """A new folder beside `output`, links followed, that takes its name when the block ends well and is gone when it does not.

    With `replace` a folder that has the name goes when the new one is there, not before. What killed processes left is cleared away.
    Raises FastVLMError where the disk is full or not writable; `elsewhere` says what to do then.
    """
    output = Path(os.path.realpath(output))  # what stands at the end of a link, on its own disk
    marker = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for stale in output.parent.glob(f"{marker}*"):
            if not _is_running(stale.name.removeprefix(marker)):
                shutil.rmtree(stale, ignore_errors=True)
        partial = output.parent / f"{marker}{os.getpid()}"
        partial.mkdir()
    except OSError as error:
        raise FastVLMError(f"{output.parent} cannot be written to ({error.strerror}); {elsewhere}") from None
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
                raise FastVLMError(f"the disk of {output.parent} is full; nothing was left there. Make room, or {elsewhere}") from None
            raise FastVLMError(f"{output} could not be written ({error}); nothing was left there") from error
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path`: what the block writes there takes the place of `path` when it ends well, and is gone when it does not."""
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
    """Make sure that a file is on the disk before its folder gets the name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
