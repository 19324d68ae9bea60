"""The wheels of the lean runtime for another machine and Python, by pip's own resolver for foreign platforms."""

from __future__ import annotations

import email
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from fastvlm_edge.bundling.targets import BundleTarget
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import sha256

RUNTIME = ("numpy>=1.26", "pillow>=10.3", "tokenizers>=0.20", "onnxruntime>=1.22")
"""As pyproject.toml has them. What else these name as needs (sympy and protobuf, huggingface_hub and its HTTP client) serves their tools
and downloads, and is not imported by inference: it stays out."""
_OLDEST_GLIBC = 17


@dataclass(frozen=True)
class Wheel:
    """A wheel file, and what it says of itself."""

    path: Path
    name: str
    version: str
    sha256: str
    licence: str
    """Its licence expression, or the first words of what it has instead."""


def requirements(target: BundleTarget) -> tuple[str, ...]:
    """What pip is asked for."""
    if target.cuda is None:
        return RUNTIME
    oldest = "12.6" if target.cuda == 12 else f"{target.cuda}.0"
    return (*RUNTIME, f"cuda-bindings>={oldest},<{target.cuda + 1}", "cuda-pathfinder>=1.1", "nvidia-ml-py>=12.560")


def collect_wheels(target: BundleTarget, folder: Path) -> list[Wheel]:
    """The wheels for `target`: those in `folder` where it has any, without a network; otherwise fetched into it. Sorted by file name.

    Raises FastVLMError with pip's own words where one cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.whl")):
        _pip(target, ["--dest", str(folder)])
        chosen = sorted(folder.glob("*.whl"))
    else:
        chosen = _choose(target, folder)
    wheels = [_read(path) for path in chosen]
    have = {wheel.name for wheel in wheels}
    for requirement in requirements(target):
        name = re.split(r"[<>=]", requirement)[0]
        if name not in have:
            raise FastVLMError(f"{folder} has no wheel of {name}; empty the folder, and the wheels are fetched again")
    return wheels


def _choose(target: BundleTarget, folder: Path) -> list[Path]:
    """Those of a folder's wheels that pip would install on the target."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        where = ["--no-index", "--find-links", str(folder.resolve()), "--target", f"{scratch}/none", "--dry-run", "--ignore-installed"]
        _pip(target, [*where, "--report", str(report)], command="install")
        document = json.loads(report.read_text(encoding="utf-8"))
    return sorted(Path(unquote(urlparse(item["download_info"]["url"]).path)) for item in document["install"])


def _pip(target: BundleTarget, arguments: Sequence[str], command: str = "download") -> None:
    if importlib.util.find_spec("pip") is None:
        raise FastVLMError(f"bundling needs pip, which this Python lacks; run: {sys.executable} -m ensurepip")
    python = "{}.{}".format(*target.python)
    glibc = [f"manylinux_2_{minor}_{target.machine}" for minor in range(target.glibc[1], _OLDEST_GLIBC - 1, -1)]
    platforms = [word for name in (*glibc, f"manylinux2014_{target.machine}") for word in ("--platform", name)]
    fixed = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    run = subprocess.run(
        [sys.executable, "-m", "pip", command, *fixed, *platforms, *arguments, *requirements(target)], capture_output=True, text=True
    )
    if run.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR")] or [
            run.stderr.strip()[-300:]
        ]
        raise FastVLMError(f"the wheels for {target.name}, Python {python} cannot be had: {errors[0]}; name a folder of them with --wheels")


def _read(path: Path) -> Wheel:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = email.message_from_string(archive.read(name).decode("utf-8"))
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise FastVLMError(f"{path} is not a wheel ({error or 'it has no METADATA'}); remove it, or fetch it again") from None
    named = [value.rpartition(":: ")[2] for value in metadata.get_all("Classifier", []) if value.startswith("License ::")]
    licence = metadata["License-Expression"] or next(iter([*(metadata["License"] or "").splitlines(), *named]), "not said")
    return Wheel(path, re.sub(r"[-_.]+", "-", metadata["Name"]).lower(), metadata["Version"], sha256(path), licence[:60])
