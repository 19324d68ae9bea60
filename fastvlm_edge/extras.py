"""Which packages each part needs, and the command that installs them. It uses the standard library only and runs on Python 3.8."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from fastvlm_edge.errors import FastVLMError, PackageError, one_line

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
    "llguidance": "structured",
    "starlette": "serve",
    "uvicorn": "serve",
    "msgspec": "serve",
    "prometheus_client": "serve",
    "av": "camera",
    "pyarrow": "batch",
    "ray": "ray",
}
"""Module of a dependency -> the extra of pyproject.toml that installs it; "" stands for the dependencies of the runtime."""

NAMES = {
    "numpy": "ndarray",
    "PIL": "Image",
    "tokenizers": "Tokenizer",
    "onnxruntime": "InferenceSession",
    "torch": "Tensor",
    "onnx": "helper",
    "ml_dtypes": "bfloat16",
    "huggingface_hub": "snapshot_download",
    "jinja2": "sandbox",
    "matplotlib": "use",
    "pillow_heif": "HeifImageFile",
    "pynvml": "nvmlInit",
    "cuda.bindings": "driver",
    "tensorrt": "Runtime",
    "tensorrt_rtx": "Runtime",
    "starlette": "applications",
    "uvicorn": "Server",
    "msgspec": "Struct",
    "prometheus_client": "CollectorRegistry",
    "av": "open",
    "pyarrow": "parquet",
    "ray": "init",
}
"""Module -> a name in it that we use: an empty directory can be imported too."""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "cuda-bindings",
    "cuda.bindings": "cuda-bindings",
    "pynvml": "nvidia-ml-py",
    "pillow_heif": "pillow-heif",
}
"""Module -> the name for pip, if it differs."""

_ALONE = {"matplotlib": "matplotlib>=3.9"}
"""Module that is used without the other packages of its extra -> its requirement, as in pyproject.toml."""
TORCH_PAGE = "https://pytorch.org/get-started/locally/"
_TORCH_INDEX = "https://download.pytorch.org/whl"
_TORCH_BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")
"""In the version of a PyTorch that came from one of the folders of _TORCH_INDEX."""


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


def install_advice(extra: str = "", module: str = "") -> str:
    """`install_command` as the second half of an error: "run: COMMAND", with the place if there is one.

    `module` is the one that cannot be found. If pip lists it nevertheless, the command brings its files back.
    """
    place = place_of_install()
    version = listed_version(module) if module and not place else None
    if version is not None:
        return f"run: {_restore(module, version)}"
    command = f'pip install "{_ALONE[module]}"' if module in _ALONE else install_command(extra)
    run = f"{place}, run: {command}" if place else f"run: {command}"
    if module == "torch" and sys.platform == "linux":
        return f"first install PyTorch's CPU build ({TORCH_PAGE}), because pip takes the far larger one for CUDA; then {run}"
    return run


def gpu_extra(jetson: bool | None = None) -> str:
    """The extra with the GPU packages: `tensorrt` on a Jetson, whose TensorRT is JetPack's, `rtx` elsewhere. None: ask this machine."""
    from fastvlm_edge.machine.host import read_jetson
    from fastvlm_edge.machine.probe import Probe

    if jetson is None:
        jetson = read_jetson(Probe()) is not None
    return "tensorrt" if jetson else "rtx"


def absent_from_runtime() -> list[str]:
    """The dependencies of the runtime that are not installed."""
    return [module for module, extra in NEEDED_BY.items() if not extra and not _found(module)]


def missing_package(module: str, what_for: str | None = None) -> PackageError | None:
    """The error for a module that cannot be found, or None if it is not a known dependency, which is a bug.

    `what_for` begins the sentence, for example "drawing needs".
    """
    top = module.partition(".")[0]
    if top not in NEEDED_BY:
        return None
    needs = f"{what_for or 'this command needs'} the package {top}, which is not installed"
    if (version := listed_version(top)) is not None:
        needs += f" completely: pip lists version {version}, but its files are missing"
    extra = gpu_extra() if top in ("cuda", "pynvml") else NEEDED_BY[top]
    return PackageError(needs, install_advice(extra, top))


def broken_package(package: str, why: str) -> PackageError:
    """The error for a package that is installed but cannot be loaded; `why` is the exception in one line."""
    version = listed_version(package)
    mend = f"run: pip install --force-reinstall {_distribution(package)}{_index(package, version)}"
    if place_of_install():
        mend = "bundle again, for a target that fits this machine"  # a bundle checks the hashes of its packages at every start
    elif version is not None and not _found(package):
        mend = f"run: {_restore(package, version)}"
    elif (place := _unusual_place(package)) is not None:
        mend = f"rename {place} if it is not that package; otherwise {mend}"
    return PackageError(f"{package} is installed but cannot be loaded ({why})", mend)


def listed_version(module: str) -> str | None:
    """The version that pip lists for a module, even if its files are gone; None if it lists none."""
    with suppress(metadata.PackageNotFoundError, KeyError, OSError):
        return metadata.version(_distribution(module))
    return None


def _restore(module: str, version: str) -> str:
    """The command that brings back the files of a package. Without --force-reinstall, pip says that it is there."""
    build = _TORCH_BUILD.search(version)
    wanted = version if build is None else version[: build.start()]
    return f"pip install --force-reinstall --no-deps {_distribution(module)}=={wanted}{_index(module, version)}"


def _index(module: str, version: str | None) -> str:
    """The option that makes pip take the same build of PyTorch: without it, on Linux, it takes one for CUDA."""
    build = _TORCH_BUILD.search(version or "") if module == "torch" else None
    return f" --index-url {_TORCH_INDEX}/{build.group(1)}" if build else ""


def import_failure(error: BaseException, what_for: str | None = None) -> PackageError | None:
    """The error for a known dependency that is missing, or is there and broken; None if `error` is anything else.

    A package that is broken may raise anything while it is imported, SystemExit included, so it is found in the traceback.
    """
    if isinstance(error, MemoryError):
        return None
    imported = [name for name in _imported(error) if name in NEEDED_BY]
    package = imported[-1] if imported else None
    if isinstance(error, ImportError):
        name = error.name or ("" if package else next(iter(absent_from_runtime()), ""))
        top = name.partition(".")[0]
        if top in NEEDED_BY:
            missing = name == top if isinstance(error, ModuleNotFoundError) else not _found(top)
            return missing_package(top, what_for) if missing else broken_package(top, one_line(error))
    elif isinstance(error, AttributeError) and package is None:
        module = getattr(error, "obj", None)  # Python imports any directory on its path, such as one called onnx
        top = module.__name__.partition(".")[0] if isinstance(module, ModuleType) else ""
        if top in NEEDED_BY:
            if not _found(top):
                return missing_package(top, what_for)
            if not _unusual_place(top) and not _lacks_its_name(top):
                return None  # a name that a whole package lacks is our bug
            return broken_package(top, one_line(error))
    return broken_package(package, one_line(error)) if package else None


@contextmanager
def package_errors(what_for: str | None = None) -> Iterator[None]:
    """Imports inside it raise PackageError for a known dependency that is missing or broken."""
    try:
        yield
    except FastVLMError:
        raise
    except (Exception, SystemExit) as error:
        failure = import_failure(error, what_for)
        if failure is None:
            raise
        raise failure from error


def _imported(error: BaseException) -> list[str]:
    """Top-level names of the modules that were being imported when the error was raised, the innermost last."""
    names = []
    trace = error.__traceback__
    line = ""
    while trace is not None:
        line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        code = trace.tb_frame.f_code
        name = None
        if code.co_filename == "<frozen importlib._bootstrap>":  # it remains if a file cannot be read or compiled
            name = trace.tb_frame.f_locals.get("name")
        elif code.co_name == "<module>":
            name = trace.tb_frame.f_globals.get("__name__")
        if isinstance(name, str):
            names.append(name.partition(".")[0])
        trace = trace.tb_next
    # A file that cannot be compiled has no frame of its own.
    statement = re.match(r"\s*(?:import|from)\s+(\w+)", line)
    return [*names, statement.group(1)] if statement else names


def import_package(module: str) -> None:
    """Import a module and the name in it that we use. Raises whatever a broken package raises."""
    name = NAMES.get(module)
    loaded = __import__(module, fromlist=[name or "__name__"])
    if name is not None:
        getattr(loaded, name)


def _lacks_its_name(package: str) -> bool:
    try:
        import_package(package)
    except Exception:
        return True
    return False


def _found(package: str) -> bool:
    """Whether a package is installed. A directory of that name without `__init__.py` is none."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return package in sys.modules  # without a spec; or a finder refuses it
    return spec is not None and (spec.origin is not None or package == "cuda")  # cuda has no __init__.py


def _distribution(package: str) -> str:
    """The name for pip. onnxruntime has several with the same module."""
    if package == "onnxruntime":
        for name in ("onnxruntime", "onnxruntime-gpu"):
            with suppress(metadata.PackageNotFoundError):
                metadata.version(name)
                return name
    return DISTRIBUTIONS.get(package, package)


def _unusual_place(package: str) -> Path | None:
    """The file or directory that the package is loaded from, if pip does not install there."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    path = path.parent if path.name == "__init__.py" else path
    return None if {"site-packages", "dist-packages"} & set(path.parts) else path
