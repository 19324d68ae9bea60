"""Wheels for bundles in tests, made of the packages that are installed here."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path


def wheel_of_installed(name: str, folder: Path) -> Path:
    """A wheel again of a package that is installed here, so that the test needs no network."""
    distribution = importlib.metadata.distribution(name)
    path = folder / f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and Path(str(file.locate())).is_file():
                archive.write(str(file.locate()), str(file))
    return path
