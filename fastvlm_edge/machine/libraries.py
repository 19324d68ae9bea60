"""What is installed: Python and its packages, TensorRT, CUDA, and the driver of an NVIDIA card."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from fastvlm_edge.machine.probe import Probe

PACKAGES = {
    "numpy": ("numpy", "1.26"),
    "PIL": ("pillow", "10.3"),
    "tokenizers": ("tokenizers", "0.20"),
    "onnxruntime": ("onnxruntime", "1.22"),
}
"""Module -> distribution and oldest version that the runtime needs, as in pyproject.toml."""
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
    """The interpreter that runs this."""

    version: str
    environment: str | None
    """Folder of the virtual environment."""
    packages: dict[str, str | None]
    """Distributions of PACKAGES -> version; None where missing."""


@dataclass(frozen=True)
class TensorRT:
    """Both libraries. A version is None where there is none."""

    library: str | None
    """Of libnvinfer.so, out of its file name."""
    module: str | None
    """Of what `import tensorrt` finds; `unknown` where it does not tell."""
    rtx: str | None
    """Of what `import tensorrt_rtx` finds."""
    system_pythons: list[str]
    """Pythons such as 3.10 whose system packages, where JetPack puts its own, have `tensorrt`."""
    dla_compiler: bool
    """Whether libnvdla_compiler.so is there, which the TensorRT of a JetPack 7 container needs."""


@dataclass(frozen=True)
class Cuda:
    """The toolkit is not needed, the binding is."""

    toolkit: str | None
    bindings: str | None
    """Version of cuda-bindings."""
    pycuda: str | None
    driver: str | None
    """The CUDA version that the driver supports, as nvidia-smi has it."""
    library: bool
    """Whether libcuda.so.1 is there."""


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
    """The NVIDIA driver of a machine that is no Jetson."""

    kernel_module: str | None
    """Version of the loaded one."""
    user_library: str | None
    """Version of libcuda.so."""
    pci: list[str] = field(default_factory=list)
    """`10de:2786` of every NVIDIA display device."""
    cards: list[Card] = field(default_factory=list)


def read_python(probe: Probe) -> Python:
    """Version, virtual environment and the runtime's packages."""
    packages = {}
    for module, (name, _) in PACKAGES.items():
        version = probe.package_version(name) or (probe.package_version("onnxruntime-gpu") if name == "onnxruntime" else None)
        packages[name] = (version or "unknown") if probe.has_module(module) else None
    return Python(".".join(map(str, probe.python)), probe.environment, packages)


def read_tensorrt(probe: Probe) -> TensorRT:
    """From the dynamic loader's folders and Python's; nothing is imported."""
    pythons = {path.split("/")[2][len("python") :] for path in probe.find("usr/lib/python3*/dist-packages/tensorrt/__init__.py")}
    return TensorRT(
        library=_library_version(probe, "libnvinfer"),
        module=_module_version(probe, "tensorrt", ("tensorrt",)),
        rtx=_module_version(probe, "tensorrt_rtx", ("tensorrt_rtx", "tensorrt-rtx")),
        system_pythons=sorted(pythons),
        dla_compiler=any(probe.exists(f"{folder}/libnvdla_compiler.so") for folder in _folders(probe)),
    )


def read_cuda(probe: Probe) -> Cuda:
    """From the toolkit's version file, Python's packages and nvidia-smi's heading."""
    try:
        toolkit = json.loads(probe.text("usr/local/cuda/version.json") or "{}")["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
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
        memory_total=int(total) if total.isdigit() else None,  # [N/A] where the memory is the board's
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
    """Of the first `name.so.X.Y...` in the loader's folders."""
    for folder in _folders(probe):
        for path in probe.find(f"{folder}/{name}.so.*.*"):
            version = path.rpartition(".so.")[2]
            if re.fullmatch(r"\d+(\.\d+)+", version):
                return version
    return None
