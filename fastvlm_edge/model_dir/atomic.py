"""Directories and files that appear complete or not at all: they are written beside their final name and then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvlm_edge.errors import FastVLMError


@contextmanager
def written_beside(output: Path, *, replace: bool, elsewhere: str) -> Iterator[Path]:
    """A new directory beside `output` for the block to fill. It is renamed to `output` if the block succeeds, and removed if it fails.

    With `replace`, an old directory of that name is removed only after the new one is complete. If `output` is a symbolic link, its target
    is written. Parent directories that are created for it are removed if the block fails. Leftovers of killed processes are removed.
    Raises FastVLMError, with the remedy `elsewhere`, if the disk is full or not writable, or if `output` is not a directory.
    """
    output = Path(os.path.realpath(output))  # beside the target of a link: renaming works only within one file system
    marker = f".{output.name}.partial-"
    partial = output.parent / f"{marker}{os.getpid()}"
    old = output.parent / f"{partial.name}-old"
    folders, created = [partial, old], list[Path]()
    try:  # from here on, because a signal may come between any two lines
        try:
            if output.exists() and not output.is_dir():
                raise FastVLMError(f"{output} exists and is not a directory", elsewhere)
            created += [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            for stale in output.parent.glob(f"{marker}*"):
                if not _is_running(stale.name.removeprefix(marker)):
                    shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            folders.clear()  # not made here
            raise FastVLMError(f"{output.parent} cannot be written to ({error.strerror})", elsewhere) from None
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
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(created)  # not empty if the block succeeded


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the block to write to.

    The file replaces `path` if the block succeeds, and is removed if it fails. If `path` is a symbolic link, its target is replaced.
    Leftovers of killed processes are removed. Raises OSError if `path` is a directory, a device or a pipe.
    """
    path = file_to_replace(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not _is_running(stale.name.split(".")[-2]):
            with contextlib.suppress(OSError):
                stale.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_to_replace(path: Path) -> Path:
    """Where a file called `path` is written: there, or where the link of that name leads.

    Raises OSError for everything that renaming must not replace: a directory, a device or a pipe.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    return Path(os.path.realpath(path))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_running(pid: str) -> bool:
    pid = pid.removesuffix("-old")
    return not pid.isdigit() or Path(f"/proc/{pid}").exists()


def _sync(path: Path) -> None:
    """Make sure that the content of a file is on the disk before its directory is renamed."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
