"""The licences of everything in a bundle, and the files that hold their texts."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvlm_edge.bundling.wheels import Wheel
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.version import __version__

OWN_LICENCE = "LICENSE.fastvlm-edge"
_NAMES = re.compile(r"(licen[cs]e|copying|notice|authors|thirdpartynotices|privacy)[^/]*$", re.IGNORECASE)


def own_licence() -> Path:
    """The licence file of fastvlm-edge, as installed or in the repository."""
    installed = [Path(str(file.locate())) for file in importlib.metadata.files("fastvlm-edge") or () if file.name == "LICENSE"]
    for path in (Path(__file__).resolve().parents[2] / "LICENSE", *installed):
        if path.is_file():
            return path
    raise FastVLMError("the LICENSE file of fastvlm-edge is missing", "install fastvlm-edge again")


def list_licences(wheels: Iterable[Wheel], runtime: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each package: name, version, licence, and the files of the runtime that hold its text."""
    rows = [{"name": "fastvlm-edge", "version": __version__, "licence": "Apache-2.0", "files": [OWN_LICENCE]}]
    files = sorted(runtime)
    for wheel in wheels:
        stem = "-".join(wheel.path.name.split("-")[:2]).lower()  # name of its .dist-info directory
        texts = [name for name in files if name.lower().startswith(f"{stem}.dist-info/") and _is_licence(name)]
        texts += [name for name in files if name.lower().startswith(f"{wheel.name.replace('-', '_')}/") and _is_licence(name)]
        if not texts and "apache" in wheel.licence.lower():
            texts = [OWN_LICENCE]  # the wheel has no licence text, and the licence is the same
        rows.append({"name": wheel.name, "version": wheel.version, "licence": wheel.licence, "files": texts})
    return rows


def _is_licence(name: str) -> bool:
    return "/licenses/" in name or (_NAMES.search(name) is not None and not name.endswith((".py", ".so")))


def model_licences(model: Path) -> list[str]:
    """Names of the licence files in a model directory."""
    return sorted(path.name for path in model.iterdir() if path.is_file() and _NAMES.match(path.name))
