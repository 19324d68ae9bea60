"""How the doctor asks a machine. Everything that is not a file under `root` is a field, so that tests bring machines of their own."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path


def _run(command: Sequence[str]) -> str | None:
    """Output of a program; None where it is absent, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _has_module(name: str) -> bool:
    """Whether Python would import it. A mere folder of that name, such as a clone of its sources, is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.absolute().parents):  # the cache folder may not be there yet
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Probe:
    """The machine at hand, unless fields say otherwise."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = _run
    has_module: Callable[[str], bool] = _has_module
    package_version: Callable[[str], str | None] = _package_version
    free_bytes: Callable[[Path], int | None] = _free_bytes
    accessible: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    architecture: str = field(default_factory=platform.machine)
    kernel: str = field(default_factory=platform.release)
    cores: int = field(default_factory=_cores)
    python: tuple[int, int, int] = field(default_factory=lambda: sys.version_info[:3])
    environment: str | None = field(default_factory=lambda: sys.prefix if sys.prefix != sys.base_prefix else None)
    """Folder of the virtual environment; None outside of any."""
    home: Path = field(default_factory=lambda: Path(os.path.expanduser("~")))

    def text(self, path: str) -> str | None:
        """A file's text, without the zeros of a device tree; None where it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip("\0 \n")
        except OSError:
            return None

    def number(self, path: str) -> float | None:
        """A file with one number, finite."""
        text = self.text(path)
        try:
            value = None if text is None else float(text)
        except ValueError:
            return None
        return value if value is not None and math.isfinite(value) else None

    def exists(self, path: str) -> bool:
        """Whether it is there, as a file, folder or device."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def find(self, pattern: str) -> Iterator[str]:
        """Paths below the root that match, in order."""
        for path in sorted(self.root.glob(pattern)):
            yield str(path.relative_to(self.root))

    def cache(self) -> Path:
        """Where built engines are kept: `$FASTVLM_EDGE_CACHE`, or `fastvlm-edge` in the user's cache folder, as `build` has it."""
        named = self.environ.get("FASTVLM_EDGE_CACHE")
        base = self.environ.get("XDG_CACHE_HOME") or str(self.home / ".cache")
        return Path(named) if named else Path(base) / "fastvlm-edge"
