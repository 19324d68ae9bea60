"""What is installed: Python and its packages, TensorRT, CUDA, and the driver of an NVIDIA card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastvlm_edge.machine.probe import Probe

PACKAGES = {
    "numpy": ("numpy", "1.26"),
    "PIL": ("pillow", "10.3"),
    "tokenizers": ("tokenizers", "0.20"),
    "onnxruntime": ("onnxruntime", "1.23"),
}
"""Module -> distribution, and the oldest version that the runtime supports (as in pyproject.toml)."""
OPTIONAL = {
    "torch": "torch",
    "onnx": "onnx",
    "ml_dtypes": "ml_dtypes",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "pillow_heif": "pillow-heif",
    "pynvml": "nvidia-ml-py",
    "cuda.bindings": "cuda-bindings",
    "pycuda": "pycuda",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""Module -> distribution, for what only some parts need. It may be absent, but if it is installed, Python has to be able to load it."""
NEEDS = {"onnxruntime": "numpy", "onnx": "ml_dtypes"}
"""Module -> another one of the same table that it imports."""
FILES_GONE = "its files are missing, but pip lists it"
_LIBRARIES = (
    "usr/lib/{arch}-linux-gnu",
    "usr/lib/{arch}-linux-gnu/nvidia",
    "usr/lib/{arch}-linux-gnu/tegra",
    "usr/lib64",
    "usr/lib/wsl/lib",
    "usr/local/lib",
)
_QUERY = ("name", "driver_version", "compute_cap", "memory.total", "memory.free", "temperature.gpu")


@dataclass(frozen=True)
class Python:
    """The Python that runs this."""

    version: str
    environment: str | None
    """Directory of the virtual environment; None outside one."""
    packages: dict[str, str | None]
    """Distribution -> version, for those in PACKAGES; None if it is not installed."""
    onnxruntime_cpu: str | None = None
    """Version of the distribution `onnxruntime`, which has no CUDA."""
    onnxruntime_gpu: str | None = None
    """Version of `onnxruntime-gpu`, which installs the same module."""
    broken: dict[str, str] = field(default_factory=dict)
    """Module of PACKAGES or OPTIONAL that is installed but cannot be imported -> why, in one line."""


@dataclass(frozen=True)
class TensorRT:
    """TensorRT and TensorRT for RTX. A version is None if the library is not installed."""

    library: str | None
    """Version of libnvinfer.so, from its file name."""
    module: str | None
    """Version of the Python package `tensorrt`; `unknown` if its metadata is missing."""
    rtx: str | None
    """Version of the Python package `tensorrt_rtx`; `unknown` if its metadata is missing."""
    system_pythons: list[str]
    """Python versions, such as 3.10, that have `tensorrt` among the system packages. JetPack installs it there."""
    dla_compiler: bool
    """Whether libnvdla_compiler.so exists. TensorRT in a JetPack 7 container needs it."""


@dataclass(frozen=True)
class Cuda:
    """The Python bindings, which are needed, the driver, and the toolkit, which is not needed."""

    toolkit: str | None
    bindings: str | None
    """Version of cuda-bindings."""
    pycuda: str | None
    driver: str | None
    """CUDA version that the driver supports, from nvidia-smi."""
    library: bool
    """Whether libcuda.so.1 exists."""


@dataclass(frozen=True)
class Card:
    """A GPU that nvidia-smi lists. Memory in MiB."""

    name: str
    driver: str
    compute_capability: tuple[int, int] | None
    memory_total: int | None
    memory_free: int | None
    temperature: float | None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of a machine that is not a Jetson."""

    kernel_module: str | None
    """Version of the module that is loaded."""
    user_library: str | None
    """Version of libcuda.so."""
    pci: list[str] = field(default_factory=list)
    """Vendor and device id of every NVIDIA display device, such as `10de:2786`."""
    cards: list[Card] = field(default_factory=list)


def read_python(probe: Probe) -> Python:
    """Version, virtual environment, versions of the packages that the runtime needs, and which packages are broken.

    Every package is imported in a process of its own, at most four at a time. Those that need a package that is missing or broken are not
    examined: they could not be imported either. Most of the optional ones need numpy.
    """
    packages = {}
    cpu, gpu = probe.package_version("onnxruntime"), probe.package_version("onnxruntime-gpu")
    for module, (name, _) in PACKAGES.items():
        version = cpu or gpu if name == "onnxruntime" else probe.package_version(name)
        packages[name] = (version or "unknown") if probe.has_module(module) else None
    runtime = {module: name for module, (name, _) in PACKAGES.items()}
    if gpu:
        runtime["onnxruntime"] = "onnxruntime-gpu"
    broken = _import_errors(probe, runtime)
    if not broken and None not in packages.values():
        broken = _import_errors(probe, OPTIONAL)
    return Python(".".join(map(str, probe.python)), probe.environment, packages, cpu, gpu, broken)


def _import_errors(probe: Probe, distributions: Mapping[str, str]) -> dict[str, str]:
    """Module that is installed but cannot be imported -> why. A module of NEEDS is left out if what it needs is missing or broken."""
    installed = [module for module in distributions if probe.has_module(module)]
    gone = [module for module, name in distributions.items() if module not in installed and probe.package_version(name) is not None]
    broken = dict.fromkeys(gone, FILES_GONE)
    with ThreadPoolExecutor(max_workers=min(4, probe.cores)) as pool:
        reasons = pool.map(lambda module: (module, probe.import_error(module)), installed)
        broken.update({module: reason for module, reason in reasons if reason is not None})
    whole = set(installed) - set(broken)
    return {module: why for module, why in broken.items() if module not in NEEDS or NEEDS[module] in whole}


def read_tensorrt(probe: Probe) -> TensorRT:
    """From the file names in the directories of the dynamic loader and of Python; nothing is imported."""
    pythons = {path.split("/")[2][len("python") :] for path in probe.find("usr/lib/python3*/dist-packages/tensorrt/__init__.py")}
    return TensorRT(
        library=_library_version(probe, "libnvinfer"),
        module=_module_version(probe, "tensorrt", ("tensorrt",)),
        rtx=_module_version(probe, "tensorrt_rtx", ("tensorrt_rtx", "tensorrt-rtx")),
        system_pythons=sorted(pythons),
        dla_compiler=any(probe.exists(f"{folder}/libnvdla_compiler.so") for folder in _folders(probe)),
    )


def read_cuda(probe: Probe) -> Cuda:
    """From the version file of the toolkit, the Python packages, and the heading of nvidia-smi."""
    try:
        toolkit = json.loads(probe.text("usr/local/cuda/version.json") or "{}")["cuda"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        toolkit = None
    heading = re.search(r"CUDA Version: *(\d+\.\d+)", _smi(probe) or "")
    return Cuda(
        toolkit=toolkit,
        bindings=_module_version(probe, "cuda.bindings", ("cuda-bindings",)),
        pycuda=_module_version(probe, "pycuda", ("pycuda",)),
        driver=heading.group(1) if heading else None,
        library=any(probe.exists(f"{folder}/libcuda.so.1") for folder in _folders(probe)),
    )


def read_driver(probe: Probe) -> Driver:
    """From /proc/driver/nvidia, the PCI devices and nvidia-smi."""
    loaded = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", probe.text("proc/driver/nvidia/version") or "")
    pci = []
    for folder in probe.find("sys/bus/pci/devices/*"):
        if probe.text(f"{folder}/vendor") == "0x10de" and (probe.text(f"{folder}/class") or "").startswith("0x03"):
            pci.append("10de:" + (probe.text(f"{folder}/device") or "0x")[len("0x") :])
    listing = _smi(probe, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits") or ""
    cards = [card for line in listing.splitlines() if (card := _card(line)) is not None]
    return Driver(loaded.group(1) if loaded else None, _library_version(probe, "libcuda"), pci, cards)


def _card(line: str) -> Card | None:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(_QUERY):
        return None
    name, driver, capability, total, free, temperature = fields
    numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Card(
        name=name,
        driver=driver,
        compute_capability=(int(numbers.group(1)), int(numbers.group(2))) if numbers else None,
        memory_total=int(total) if total.isdigit() else None,  # [N/A] if the GPU shares the memory of the board
        memory_free=int(free) if free.isdigit() else None,
        temperature=float(temperature) if temperature.isdigit() else None,
    )


def _smi(probe: Probe, *arguments: str) -> str | None:
    for program in ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi"):
        output = probe.run([program, *arguments])
        if output is not None:
            return output
    return None


def _module_version(probe: Probe, module: str, distributions: tuple[str, ...]) -> str | None:
    if not probe.has_module(module):
        return None
    return next((version for name in distributions if (version := probe.package_version(name)) is not None), "unknown")


def _folders(probe: Probe) -> list[str]:
    return [folder.format(arch=probe.architecture) for folder in _LIBRARIES]


def _library_version(probe: Probe, name: str) -> str | None:
    """Version in the name of the first file `NAME.so.X.Y...` in the directories of the dynamic loader."""
    for folder in _folders(probe):
        for path in probe.find(f"{folder}/{name}.so.*.*"):
            version = path.rpartition(".so.")[2]
            if re.fullmatch(r"\d+(\.\d+)+", version):
                return version
    return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.1.0rc1` gives (2, 1); (0,) if there are none."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found) or (0,)


def too_old(version: str | None, oldest: tuple[int, ...]) -> bool:
    """Whether a version is known and older than `oldest`."""
    return version not in (None, "unknown") and numbers(version or "") < oldest
