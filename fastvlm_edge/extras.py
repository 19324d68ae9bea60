"""Which packages each part needs, and the command that installs them today. Standard library only, for Python 3.8 too."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from fastvlm_edge.errors import FastVLMError

NEEDED_BY = {
    "numpy": "",
    "PIL": "",
    "tokenizers": "",
    "onnxruntime": "",
    "torch": "convert",
    "onnx": "convert",
    "ml_dtypes": "convert",
    "huggingface_hub": "convert",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "cuda": "tensorrt",
    "pynvml": "tensorrt",
    "matplotlib": "bench",
}
"""Module of another project -> the extra that brings it; "" is the runtime itself."""


def install_command(extra: str = "") -> str:
    """The pip command for the runtime, or for an extra: of this clone, or package by package if fastvlm-edge was installed from a wheel.

    In a bundle, which is neither, it is the command for a clone somewhere else. fastvlm-edge is not on PyPI yet, so its own name is never
    part of the command.
    """
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return f'pip install "{clone}[{extra}]"' if extra else f'pip install "{clone}"'
    try:
        requirements = metadata.requires("fastvlm-edge") or ()
    except metadata.PackageNotFoundError:
        place = f".[{extra}]" if extra else "."
        return f'pip install "{place}" (in a clone of fastvlm-edge)'
    packages = []
    for requirement in requirements:
        package, _, condition = requirement.partition(";")
        wanted = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", condition)
        if (wanted.group(1) if wanted else "") == extra:
            packages.append(f'"{package.strip()}"')
    return f"pip install {' '.join(packages)}"


def missing_package(module: str, what_for: str | None = None) -> FastVLMError | None:
    """The error for a module that cannot be imported; None where the module belongs to no extra, which is a bug.

    `what_for` begins the sentence: "drawing needs".
    """
    top = module.partition(".")[0]
    if top not in NEEDED_BY:
        return None
    extra = NEEDED_BY[top]
    return FastVLMError(f"{what_for or 'this command needs'} the package {top}, which is not installed", f"run: {install_command(extra)}")
