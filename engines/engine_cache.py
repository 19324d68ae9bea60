"""Engines and timings that were paid for once: kept under the user's cache folder, by everything that an engine depends on."""

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
"""Bytes of engines that are kept; beyond it the ones unused for longest go. Hard links to a model directory's own cost nothing more."""


def default_cache() -> Path:
    """`$FASTVLM_EDGE_CACHE`, or `fastvlm-edge` in the user's cache folder (XDG base directory specification)."""
    named = os.environ.get("FASTVLM_EDGE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base) / "fastvlm-edge"


def cache_key(ingredients: dict[str, Any]) -> str:
    """One name for everything that an engine depends on."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


class EngineCache:
    """A folder of engines and timing caches. What goes wrong here costs time, never a build: no method raises OSError."""

    def __init__(self, folder: Path | None) -> None:
        """None keeps nothing."""
        self._folder = folder

    def fetch(self, key: str, destination: Path) -> bool:
        """Put the engine called `key` at `destination`, by a hard link where the file system can. Returns whether there is one."""
        if self._folder is None:
            return False
        kept = self._folder / f"{key}.engine"
        try:
            # A hard link shares its bytes: whoever writes into an engine of a model directory writes here too.
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
        """Remember a new engine, and forget the ones unused for longest beyond LIMIT."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._folder / f"{key}.engine") as partial:
                _link(engine, partial)
                (self._folder / f"{key}.sha256").write_text(sha256(partial), encoding="ascii")
            self._prune()

    def timings(self, name: str) -> bytes:
        """The timing cache of that name, or nothing."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                return (self._folder / f"{name}.timing").read_bytes()
        return b""

    def keep_timings(self, name: str, timings: bytes) -> None:
        """Replace the timing cache of that name."""
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
