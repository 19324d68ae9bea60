"""Wheels for tests: made of the packages that are installed here, or tiny ones."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from pathlib import Path

from fastvlm_edge.bundling.wheels import requirements
from fastvlm_edge.machine.boards.targets import bundle_target

BUNDLED = sorted(re.split("[<>=]", each)[0].replace("_", "-") for each in requirements(bundle_target("x86_64")))
"""Names of all packages of a bundle for the Python that runs the tests."""


def wheel_of_installed(name: str, folder: Path) -> Path:
    """A wheel again of a package that is installed here, so that the test needs no network."""
    distribution = importlib.metadata.distribution(name)
    path = folder / f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and Path(str(file.locate())).is_file():
                archive.write(str(file.locate()), str(file))
    return path


def tiny_wheel(folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any") -> Path:
    """A wheel with one module, another one in its `.data` directory, and a script."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-{tag}.whl"
    files = {
        f"{name.replace('-', '_')}/__init__.py": f"version = {version!r}\n",
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n",
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{stem}.data/purelib/{name}_extra.py": "extra = 1\n",
        f"{stem}.data/scripts/tool": "#!python\n",
    }
    record = "".join(
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for file, text in files.items()
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in {**files, f"{stem}.dist-info/RECORD": record}.items():
            archive.writestr(file, text)
    return path
