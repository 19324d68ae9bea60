"""How the files, programs and packages of a machine are read. Tests describe other machines by giving the fields other values."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from fastvlm_edge.machine.cache_dir import cache_dir, home_dir


def _run(command: Sequence[str]) -> str | None:
    """Output of a program; None if it is missing, fails or takes longer than 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _has_module(name: str) -> bool:
    """Whether Python could import it. A directory of that name without `__init__.py` does not count."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None


_IMPORT = """
import os, sys
sys.path[:] = sys.argv[2:]
status = 0
try:
    from fastvlm_edge.extras import import_package
    import_package(sys.argv[1])
except BaseException as error:
    from fastvlm_edge.errors import one_line
    print("\\n" + one_line(error), flush=True)
    status = 3
os._exit(status)
"""
_IMPORT_SECONDS = 60
"""PyTorch takes 20 s from the memory card of a small board."""


def _import_error(name: str) -> str | None:
    """Why a module cannot be imported, as its exception in one line; None if it can. Another process tries it, which may crash."""
    if not sys.executable:
        return None
    command = [sys.executable, "-c", _IMPORT, name, *sys.path]
    try:
        with tempfile.TemporaryDirectory() as folder:  # some packages write to HOME or to the folder for temporary files
            places = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), folder)
            environment = {**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1"}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=_IMPORT_SECONDS, check=False
            )
    except subprocess.TimeoutExpired:
        return f"its import takes longer than {_IMPORT_SECONDS} s"
    except OSError:
        return None
    if done.returncode == -signal.SIGKILL:
        return "its import was killed, probably for lack of memory"
    if done.returncode < 0:
        return f"its import ends the process: {signal.strsignal(-done.returncode)}"
    if done.returncode == 0:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else f"its import ends the process with status {done.returncode}"


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.absolute().parents):  # the cache directory may not exist yet
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def usable_cores() -> int:
    """Cores that this process may use, which a container or `taskset` can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Probe:
    """A machine: this one, unless fields are given."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = _run
    has_module: Callable[[str], bool] = _has_module
    import_error: Callable[[str], str | None] = _import_error
    package_version: Callable[[str], str | None] = _package_version
    free_bytes: Callable[[Path], int | None] = _free_bytes
    accessible: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    architecture: str = field(default_factory=platform.machine)
    kernel: str = field(default_factory=platform.release)
    cores: int = field(default_factory=usable_cores)
    """Cores that this process may use."""
    python: tuple[int, int, int] = field(default_factory=lambda: sys.version_info[:3])
    environment: str | None = field(default_factory=lambda: sys.prefix if sys.prefix != sys.base_prefix else None)
    """Directory of the virtual environment; None outside one."""
    home: Path = field(default_factory=home_dir)

    def text(self, path: str) -> str | None:
        """Text of a file, without the zero bytes of a device tree; None if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip("\0 \n")
        except OSError:
            return None

    def number(self, path: str) -> float | None:
        """The number in a file; None if it cannot be read or is not a finite number."""
        text = self.text(path)
        try:
            value = None if text is None else float(text)
        except ValueError:
            return None
        return value if value is not None and math.isfinite(value) else None

    def exists(self, path: str) -> bool:
        """Whether there is a file, directory or device of this name."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def find(self, pattern: str) -> Iterator[str]:
        """Paths below the root that match, relative to it and sorted."""
        for path in sorted(self.root.glob(pattern)):
            yield str(path.relative_to(self.root))

    def cache(self) -> Path:
        """Where built engines are kept."""
        return cache_dir(self.environ, self.home)
