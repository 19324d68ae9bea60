"""GStreamer's Python bindings of the system, in a virtual environment that does not see the system's packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastvlm_edge.camera.gstreamer import SYSTEM_PACKAGES

SYSTEM_PYTHON = "/usr/bin/python3"
_NEEDS = "import gi\nfor name in {names!r}:\n    gi.require_version(name, '1.0')\n    __import__('gi.repository.' + name)"


def folder_with_gi(folder: Path) -> Path:
    """A folder for PYTHONPATH that has `gi` and nothing else of the system. It works if this Python has the system's version."""
    folder.mkdir(exist_ok=True)
    (folder / "gi").symlink_to(SYSTEM_PACKAGES / "gi")
    return folder


def lacks(python: str, *names: str, path: Path | None = None) -> str | None:
    """Why a Python cannot import these of GStreamer's bindings, as a sentence for a skipped test; None if it can."""
    code = _NEEDS.format(names=names)
    environment = {"PATH": "/usr/bin:/bin"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    version = ".".join(map(str, sys.version_info[:2]))
    last = (done.stderr.splitlines() or ["it crashed"])[-1]
    return f"{python} (tests run on {version}) has no {', '.join(names)}: {last}; make test-camera installs them"
