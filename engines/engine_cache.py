"""A cache of engines and timings in the user's cache directory. The key is a hash of everything that an engine depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.manifest import sha256

LIMIT = 16 << 30
"""Total size in bytes of the engines that are kept; beyond it, the least recently used are deleted. Hard links to the engines of a model
directory take no additional space."""


def cache_key(ingredients: dict[str, Any]) -> str:
    """Hash of everything that an engine depends on, as a file name."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


class EngineCache:
    """A directory of engines and timing caches. No method raises OSError: if the cache fails, a build takes longer but succeeds."""

    def __init__(self, folder: Path | None) -> None:
        """With None nothing is kept."""
        self._folder = folder

    def fetch(self, key: str, destination: Path) -> bool:
        """Put the engine `key` at `destination`, as a hard link if the file system can. Returns whether the cache has it."""
        if self._folder is None:
            return False
        kept = self._folder / f"{key}.engine"
        try:
            # A hard link shares its bytes: a program that writes into an engine of a model directory also writes here.
            if sha256(kept) != kept.with_suffix(".sha256").read_text(encoding="ascii"):
                kept.unlink()
                return False
            os.utime(kept)
            _link(kept, destination)
        except OSError:
            destination.unlink(missing_ok=True)
            return False
        return True

    def keep(self, key: str, engine: Path) -> None:
        """Add a new engine. Delete the least recently used ones beyond LIMIT."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._folder / f"{key}.engine") as partial:
                _link(engine, partial)
                (self._folder / f"{key}.sha256").write_text(sha256(partial), encoding="ascii")
            self._prune()

    def timings(self, name: str) -> bytes:
        """The timing cache called `name`, or no bytes."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                return (self._folder / f"{name}.timing").read_bytes()
        return b""

    def keep_timings(self, name: str, timings: bytes) -> None:
        """Replace the timing cache called `name`."""
        if self._folder is None or not timings:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._folder / f"{name}.timing") as partial:
                partial.write_bytes(timings)

    def _prune(self) -> None:
        assert self._folder is not None
        engines = sorted(self._folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in engines:
            total += path.stat().st_size
            if total > LIMIT:
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
