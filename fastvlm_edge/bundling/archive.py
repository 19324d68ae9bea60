"""Write a bundle: a shell header that finds the right Python, the text of `start`, and a zip archive in which nothing is compressed.

The archive holds wheels as they were published, so their hashes can be looked up and the bytes do not depend on a compressor. Models hardly
compress.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fastvlm_edge
from fastvlm_edge.bundling import start
from fastvlm_edge.bundling.licences import OWN_LICENCE, list_licences, model_licences, own_licence
from fastvlm_edge.bundling.wheels import Wheel
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.systems import BundleTarget
from fastvlm_edge.model_dir.atomic import file_to_replace, whole_file
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, read_manifest, sha256, verify_files
from fastvlm_edge.progress import Progress, SilentProgress
from fastvlm_edge.version import __version__

HEADER_BYTES = 4096
_BEGINNING = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip entry can have
_NEEDS_TORCH = ("convert", "calib")
"""Packages that are left out, because a board does not convert models."""
_DEMO = "demo"
"""The demo model, which is left out as well."""
_SOURCE = (".py", ".jpg", ".typed", ".html", ".css", ".js")
_BLOCK = 1 << 22

_HEADER = """#!/bin/sh
# A fastvlm-edge bundle for {title}, Python {python}: ./FILE --help
# After this header come the Python text that starts it and a zip archive, which `unzip -l FILE` lists.
if [ "$(uname -m)" != {machine} ]; then
  echo "$0: error: this bundle is for {machine} ({title}), and this machine is $(uname -m); bundle with another --target" >&2
  exit 1
fi
for python in /usr/bin/python{python} python{python} /usr/local/bin/python{python} python3; do
  if "$python" -I -c 'import sys; sys.exit(sys.version_info[:2] != ({major}, {minor}))' 2>/dev/null; then
    exec "$python" -I -c '
import hashlib, sys, types
with open(sys.argv[1], "rb") as file:
    file.seek({offset})
    text = file.read({size})
if hashlib.sha256(text).hexdigest() != "{start_sha256}":
    sys.exit(sys.argv[1] + ": error: the file is damaged or cut off; copy it again")
module = types.ModuleType("fastvlm_edge.bundling.start")
sys.modules[module.__name__] = module
exec(compile(text, "start.py", "exec"), module.__dict__)
def run():
    bundle = module.start(sys.argv[1], "{index_sha256}")
    from fastvlm_edge.bundle_entry import main
    return main(bundle, sys.argv[2:])
sys.exit(module.exit_status(sys.argv[1], run))
' "$0" "$@"
  fi
done
echo "$0: error: this bundle is for Python {python} ({title}), and this machine has $(python3 --version 2>&1 || echo none)." >&2
echo "Install python{python}, or bundle for the Python of this machine: fastvlm-edge bundle ... --python 3.X" >&2
exit 1
"""


@dataclass(frozen=True)
class Written:
    """A new bundle. Sizes in bytes."""

    path: Path
    bytes: int
    model_bytes: int
    unpacked_bytes: int
    """Size of the unpacked runtime on the disk of the board, without the model."""
    wheels: list[Wheel]

    @property
    def runtime_bytes(self) -> int:
        """Size of the file without the model."""
        return self.bytes - self.model_bytes


def write_bundle(
    model: Path, target: BundleTarget, wheels: list[Wheel], output: Path, *, force: bool = False, progress: Progress | None = None
) -> Written:
    """Write the bundle of a model directory. The same model, wheels and toolkit give the same bytes, whatever `output` is called.

    Raises FastVLMError if the model is damaged, `output` exists, or the disk is full; then nothing is left at `output`.
    """
    progress = progress or SilentProgress()
    manifest = read_manifest(model)
    progress.stage("checking the model's hashes")
    verify_files(model, manifest, hashes=True)
    models = {name: model / name for name in sorted({MANIFEST_NAME, *manifest.files, *model_licences(model)})}
    sources = dict(sorted([*source_files(Path(fastvlm_edge.__file__).parent), (OWN_LICENCE, own_licence())]))
    index = {
        "schema": 1,
        "toolkit_version": __version__,
        "target": target.name,
        "title": target.title,
        "machine": target.machine,
        "python": list(target.python),
        "glibc": list(target.glibc),
        "wheels": [{"file": w.path.name, "name": w.name, "version": w.version, "sha256": w.sha256} for w in wheels],
        "model": {"name": manifest.name, "precision": manifest.precision, "source": manifest.source.checkpoint},
        "model_licences": model_licences(model),
        "parts": {
            "runtime": _part({**_records("source", sources), **_wheel_records(wheels)}),
            "model": _part(_records("model", models)),
        },
    }
    runtime = index["parts"]["runtime"]["files"]  # type: ignore[index]
    index["licences"] = list_licences(wheels, runtime)
    text = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    entries = {f"source/{name}": path for name, path in sources.items()}
    entries |= {f"wheels/{wheel.path.name}": wheel.path for wheel in wheels}
    entries |= {f"model/{name}": path for name, path in models.items()}
    progress.stage(f"writing {output}", sum(path.stat().st_size for path in entries.values()) >> 20)
    with _new_file(output, force=force) as file:
        _write(file, target, text, entries, progress)
    progress.done()
    return Written(
        output,
        output.stat().st_size,
        sum(path.stat().st_size for path in models.values()),
        sum(record["bytes"] for record in runtime.values()),
        wheels,
    )


def _write(file: BinaryIO, target: BundleTarget, index: bytes, entries: dict[str, Path], progress: Progress) -> None:
    code = Path(start.__file__).read_bytes()
    header = _HEADER.format(
        title=target.title,
        machine=target.machine,
        python="{}.{}".format(*target.python),
        major=target.python[0],
        minor=target.python[1],
        offset=HEADER_BYTES,
        size=len(code),
        start_sha256=hashlib.sha256(code).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    ).encode()
    assert len(header) < HEADER_BYTES
    file.write(header + b"\n" * (HEADER_BYTES - len(header)) + code)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(zipfile.ZipInfo(start.INDEX, _BEGINNING), index)
        done = 0
        for name, path in entries.items():
            info = zipfile.ZipInfo(name, _BEGINNING)
            info.external_attr = 0o644 << 16
            size = info.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(info, "w", force_zip64=size >= 1 << 31) as entry:
                while block := source.read(_BLOCK):
                    entry.write(block)
                    progress.advance(((done + len(block)) >> 20) - (done >> 20))
                    done += len(block)


@contextmanager
def _new_file(output: Path, *, force: bool) -> Iterator[BinaryIO]:
    """An executable file that gets its name only after it is complete."""
    check_new_file(output, force=force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as partial:
            with partial.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o755)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FastVLMError(
                f"the disk of {output.parent} is full; no partial file was left there", "free some space, or give -o a name on another disk"
            ) from None
        raise FastVLMError(f"{output} could not be written ({error.strerror or error})", "give -o another name") from None


def check_new_file(output: Path, *, force: bool) -> None:
    """Raise FastVLMError if no bundle can be written to `output`: it exists and `force` is not given, or it is not a regular file."""
    if output.exists() and not force:
        raise FastVLMError(f"{output} exists", "use --force to replace it, or give -o another name")
    try:
        file_to_replace(output)
    except OSError as error:
        what = "is a directory" if isinstance(error, IsADirectoryError) else f"cannot be written ({error.strerror})"
        raise FastVLMError(f"{output} {what}", "give -o the name of a file") from None


# What goes in -------------------------------------------------------------------------------------------------------------------


def source_files(home: Path) -> Iterator[tuple[str, Path]]:
    """Name in the runtime and file of all modules and data below `home`, the package fastvlm_edge, but those for PyTorch and the demo."""
    for folder, folders, files in os.walk(home, followlinks=True):  # in a clone, engines/ is a link
        folders[:] = sorted({*folders} - {"__pycache__", _DEMO, *_NEEDS_TORCH})
        for path in (Path(folder, name) for name in files):
            if path.suffix in _SOURCE:
                yield f"fastvlm_edge/{path.relative_to(home).as_posix()}", path


def _records(prefix: str, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        name: {"entry": f"{prefix}/{name}", "sha256": sha256(path), "bytes": path.stat().st_size} for name, path in sorted(files.items())
    }


def _wheel_records(wheels: list[Wheel]) -> dict[str, dict[str, Any]]:
    """Every file that installing the wheels would create (binary distribution format, "installing a wheel"), but scripts and data."""
    records = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel.path) as archive:
            for info in archive.infolist():
                found = re.fullmatch(r"[^/]+\.data/([^/]+)/(.*)", info.filename)
                if info.is_dir() or (found and found.group(1) not in ("purelib", "platlib")):
                    continue
                name = found.group(2) if found else info.filename
                if name.startswith("/") or ".." in name.split("/"):
                    raise FastVLMError(f"{wheel.path} has a file outside its directory ({name})", "download the wheel again")
                digest = hashlib.sha256(archive.read(info)).hexdigest()
                entry = f"wheels/{wheel.path.name}"
                records[name] = {"entry": entry, "member": info.filename, "sha256": digest, "bytes": info.file_size}
    return records


def _part(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A part of the index: its files, and a key that is the hash of their names and contents."""
    contents = json.dumps({name: record["sha256"] for name, record in files.items()}, sort_keys=True)
    return {"key": hashlib.sha256(contents.encode()).hexdigest(), "files": files}
