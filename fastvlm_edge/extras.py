"""Which packages each part needs, and the command that installs them. It uses the standard library only and runs on Python 3.8."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
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
    "jinja2": "convert",
    "tensorrt_rtx": "rtx",
    "cuda": "tensorrt",
    "pynvml": "tensorrt",
    "matplotlib": "bench",
}
"""Module of a dependency -> the extra of pyproject.toml that installs it; "" stands for the dependencies of the runtime."""

DISTRIBUTIONS = {"PIL": "pillow", "tensorrt_rtx": "tensorrt-rtx", "cuda": "cuda-bindings", "pynvml": "nvidia-ml-py"}
"""Module -> the name for pip, if it differs."""


def install_command(extra: str = "") -> str:
    """The pip command that installs the dependencies of the runtime or of an extra.

    In a clone it installs the clone. If fastvlm-edge was installed from a wheel, it names the packages one by one, because fastvlm-edge
    is not on PyPI yet. In a bundle, which is neither, it is the command for a clone somewhere else; `place_of_install` says so.
    """
    clone, requirements = _origin()
    if requirements is None:
        place = "." if clone is None else str(clone)
        return f'pip install "{place}[{extra}]"' if extra else f'pip install "{place}"'
    packages = []
    for requirement in requirements:
        package, _, condition = requirement.partition(";")
        wanted = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", condition)
        if (wanted.group(1) if wanted else "") == extra:
            packages.append(f'"{package.strip()}"')
    return f"pip install {' '.join(packages)}"


def place_of_install() -> str:
    """Where `install_command` must run: "in a clone of fastvlm-edge" for a bundle, otherwise "", which means anywhere."""
    return "in a clone of fastvlm-edge" if _origin() == (None, None) else ""


def _origin() -> tuple[Path | None, list[str] | None]:
    """The clone that this file is in, or else the requirements of the installed wheel. A bundle has neither."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return clone, None
    try:
        return None, metadata.requires("fastvlm-edge") or []
    except metadata.PackageNotFoundError:
        return None, None


def install_advice(extra: str = "") -> str:
    """`install_command` as the second half of an error: "run: COMMAND", with the place if there is one."""
    place = place_of_install()
    return f"{place}, run: {install_command(extra)}" if place else f"run: {install_command(extra)}"


def gpu_extra(jetson: bool | None = None) -> str:
    """The extra with the GPU packages: `tensorrt` on a Jetson, whose TensorRT is JetPack's, `rtx` elsewhere. None: ask this machine."""
    from fastvlm_edge.machine.host import read_jetson
    from fastvlm_edge.machine.probe import Probe

    if jetson is None:
        jetson = read_jetson(Probe()) is not None
    return "tensorrt" if jetson else "rtx"


def absent_from_runtime() -> list[str]:
    """The dependencies of the runtime that are not installed."""
    absent = []
    for module, extra in NEEDED_BY.items():
        try:
            found = bool(extra) or find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            absent.append(module)
    return absent


def missing_package(module: str, what_for: str | None = None) -> FastVLMError | None:
    """The error for a module that cannot be imported, or None if it is not a known dependency, which is a bug.

    `what_for` begins the sentence, for example "drawing needs".
    """
    top = module.partition(".")[0]
    if top not in NEEDED_BY:
        return None
    extra = gpu_extra() if top in ("cuda", "pynvml") else NEEDED_BY[top]
    return FastVLMError(f"{what_for or 'this command needs'} the package {top}, which is not installed", install_advice(extra))


def import_failure(error: ImportError, what_for: str | None = None) -> FastVLMError | None:
    """The error for a known dependency that is not installed, or is installed but cannot be loaded; None for any other module.

    A compiled package may only say "import numpy failed", without a name: then a dependency of the runtime is looked for.
    """
    module = error.name or next(iter(absent_from_runtime()), "")
    if isinstance(error, ModuleNotFoundError) or not error.name:
        return missing_package(module, what_for)
    top = module.partition(".")[0]
    return broken_package(top, error) if top in NEEDED_BY else None


def broken_package(package: str, error: ImportError) -> FastVLMError:
    """The error for a package that is installed but cannot be loaded; `error` is its cause."""
    mend = f"run: pip install --force-reinstall {DISTRIBUTIONS.get(package, package)}"
    failure = FastVLMError(f"{package} is installed but cannot be loaded ({error})", mend)
    failure.__cause__ = error
    return failure
