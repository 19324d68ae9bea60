"""`verified.json`: which files of a model directory were compared with the manifest, and their state on this disk at that time.

Reading gigabytes for their hashes takes as long as copying them, so a file is compared once, and again only after it has changed.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import Manifest, check_sha256, verify_files
from fastvlm_edge.progress import Progress, SilentProgress

VERIFIED_NAME = "verified.json"
_PACKAGE = Path(__file__).resolve().parents[1]


def verify(directory: Path, manifest: Manifest, *, again: bool = False, progress: Progress | None = None) -> None:
    """Compare the files with the manifest: their sizes, and the sha256 of those that changed since they were last compared.

    With `again`, the sha256 of all files. If the directory is not writable, new files are compared every time. Raises FastVLMError that
    names the first file that differs.
    """
    verify_files(directory, manifest)
    new = [*manifest.files] if again else changed(directory, manifest)
    if not new:
        return
    progress = progress or SilentProgress()
    progress.stage("verifying files", sum(manifest.files[name].bytes for name in new) >> 20)
    for name in new:
        check_sha256(directory / name, manifest.files[name])
        progress.advance(manifest.files[name].bytes >> 20)
    progress.done()
    remember(directory, manifest)


def changed(directory: Path, manifest: Manifest) -> list[str]:
    """The files, which must exist, that were not compared yet, or that have changed since."""
    known = _read(directory)
    return [name for name in manifest.files if known.get(name) != _state(directory, manifest, name)]


def remember(directory: Path, manifest: Manifest) -> None:
    """Record that all files were just compared. Nothing is written into the package itself, which has the demo model: pip owns it."""
    if _PACKAGE in directory.resolve().parents:
        return
    states = {name: _state(directory, manifest, name) for name in manifest.files}
    if states == _read(directory):
        return
    with contextlib.suppress(OSError), whole_file(directory / VERIFIED_NAME) as partial:
        partial.write_text(json.dumps(states) + "\n", encoding="utf-8")


def _read(directory: Path) -> dict[str, Any]:
    try:
        return dict(parse_json((directory / VERIFIED_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _state(directory: Path, manifest: Manifest, name: str) -> list[str | int]:
    """The recorded sha256, and what changes whenever a file is written, copied or replaced."""
    status = (directory / name).stat()
    return [manifest.files[name].sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
