"""Collect the wheels that the runtime needs on another machine, with pip's resolver for other platforms."""

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

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.systems import BundleTarget
from fastvlm_edge.model_dir.manifest import sha256

RUNTIME = ("numpy>=1.26", "pillow>=10.3", "tokenizers>=0.20", "onnxruntime>=1.23")
"""Requirements of the runtime, as in pyproject.toml. Their own requirements (sympy and protobuf, huggingface_hub and its HTTP client) are
for tools and downloads. Inference does not import them, so they are left out."""
STRUCTURED = ("llguidance>=1.6,<2",)
"""Requirements of structured answers, the extra `structured`. 1.6 is the last one with wheels for glibc 2.28."""
SERVE = ("starlette>=1.0,<2", "uvicorn>=0.40", "msgspec>=0.19", "prometheus_client>=0.21")
"""Requirements of `fastvlm-edge serve`, the extra `serve`."""
_NEEDED_BY_SERVE = ("anyio>=4", "click>=8", "h11>=0.14", "idna>=3", "typing_extensions>=4.10")
"""What starlette, anyio and uvicorn import; on Python 3.10 anyio also imports exceptiongroup."""
_OLDEST_GLIBC = 17


@dataclass(frozen=True)
class Wheel:
    """A wheel file and its metadata."""

    path: Path
    name: str
    version: str
    sha256: str
    licence: str
    """Its licence expression, or else the beginning of its licence field or classifier."""


def requirements(target: BundleTarget) -> tuple[str, ...]:
    """Requirements that pip resolves for `target`."""
    backports = ("exceptiongroup>=1.1",) if target.python < (3, 11) else ()
    common = (*RUNTIME, *STRUCTURED, *SERVE, *_NEEDED_BY_SERVE, *backports)
    if target.cuda is None:
        return common
    oldest = "12.6" if target.cuda == 12 else f"{target.cuda}.0"
    return (*common, f"cuda-bindings>={oldest},<{target.cuda + 1}", "cuda-pathfinder>=1.1", "nvidia-ml-py>=12.560")


def collect_wheels(target: BundleTarget, folder: Path) -> list[Wheel]:
    """The wheels for `target`, sorted by file name: those in `folder` without a network, or downloaded into it if it has none.

    Raises FastVLMError, with the message of pip, if one is missing.
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
        name = _name(re.split(r"[<>=]", requirement)[0])
        if name not in have:
            raise FastVLMError(f"{folder} has no wheel of {name}", "empty the directory, so that the wheels are downloaded again")
    return wheels


def _choose(target: BundleTarget, folder: Path) -> list[Path]:
    """The wheels in `folder` that pip would install on the target."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        where = ["--no-index", "--find-links", str(folder.resolve()), "--target", f"{scratch}/none", "--dry-run", "--ignore-installed"]
        _pip(target, [*where, "--report", str(report)], command="install")
        document = json.loads(report.read_text(encoding="utf-8"))
    return sorted(Path(unquote(urlparse(item["download_info"]["url"]).path)) for item in document["install"])


def _pip(target: BundleTarget, arguments: Sequence[str], command: str = "download") -> None:
    if importlib.util.find_spec("pip") is None:
        raise FastVLMError("bundle needs pip, which this Python does not have", f"run: {sys.executable} -m ensurepip")
    python = "{}.{}".format(*target.python)
    glibc = [f"manylinux_2_{minor}_{target.machine}" for minor in range(target.glibc[1], _OLDEST_GLIBC - 1, -1)]
    platforms = [word for name in (*glibc, f"manylinux2014_{target.machine}") for word in ("--platform", name)]
    fixed = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    run = subprocess.run(
        [sys.executable, "-m", "pip", command, *fixed, *platforms, *arguments, *requirements(target)], capture_output=True, text=True
    )
    if run.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[0] if errors else run.stderr.strip()[-300:]
        raise FastVLMError(
            f"could not get the wheels for {target.name} with Python {python}: {said}",
            "check the network, or name a directory that has them with --wheels",
        )


def _name(text: str) -> str:
    """The name of a package in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", text).lower()


def _read(path: Path) -> Wheel:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = email.message_from_string(archive.read(name).decode("utf-8"))
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise FastVLMError(f"{path} is not a wheel ({error or 'it has no METADATA'})", "remove it, or download it again") from None
    named = [value.rpartition(":: ")[2] for value in metadata.get_all("Classifier", []) if value.startswith("License ::")]
    licence = metadata["License-Expression"] or next(iter([*(metadata["License"] or "").splitlines(), *named]), "not stated")
    return Wheel(path, _name(metadata["Name"]), metadata["Version"], sha256(path), licence[:60])
