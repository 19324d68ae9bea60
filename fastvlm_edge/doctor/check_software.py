"""Findings on what is installed: the driver of a graphics card, access rights, TensorRT, CUDA, Python and its packages."""

from __future__ import annotations

from fastvlm_edge.doctor.check_board import FLASH, HOT, OLDEST_TENSORRT
from fastvlm_edge.doctor.facts import Facts
from fastvlm_edge.doctor.findings import Finding, ok, problem, warning
from fastvlm_edge.extras import broken_package, gpu_extra, install_command, place_of_install
from fastvlm_edge.machine.boards.faults import find_faults
from fastvlm_edge.machine.boards.targets import RTX_GPUS
from fastvlm_edge.machine.libraries import PACKAGES, Card, numbers, too_old

OLDEST_PYTHON = (3, 10)
OLDEST_RTX = (1, 2)
OLDEST_GPU = (7, 5)
"""Turing, the oldest in the support matrix of TensorRT 10."""


def check_software(facts: Facts) -> list[Finding]:
    """Findings on all software. TensorRT, containers and CUDA matter only with a GPU."""
    broken = _broken(facts)
    findings = [*_gpu(facts), *_rights(facts)]
    if facts.has_gpu:
        findings += [*(broken["tensorrt"] or [_tensorrt(facts)]), *_container(facts), *(broken["cuda"] or _cuda(facts))]
    else:
        findings += broken["tensorrt"] or [ok("tensorrt", _versions(facts) + "; there is no GPU for it")]
        findings += broken["cuda"]
    return [*findings, *_python(facts), *broken["packages"]]


def _broken(facts: Facts) -> dict[str, list[Finding]]:
    """Topic -> a problem for every package that is installed but cannot be imported."""
    findings: dict[str, list[Finding]] = {"tensorrt": [], "cuda": [], "packages": []}
    for module, why in facts.python.broken.items():
        topic = "tensorrt" if module.startswith("tensorrt") else "cuda" if module in ("cuda.bindings", "pycuda") else "packages"
        error = broken_package(module, why)
        mend = str(error.mend).replace("run: ", "")
        if module == "tensorrt" and facts.jetson is not None:
            mend = "sudo apt install --reinstall python3-libnvinfer tensorrt-libs"
        finding = problem if topic != "packages" or module in PACKAGES else warning
        findings[topic].append(finding(topic, error.what, mend))
    return findings


def _gpu(facts: Facts) -> list[Finding]:
    driver = facts.driver
    if facts.jetson is not None:
        return []  # the GPU of a Jetson is part of the finding on the board
    if driver.cards:
        return [_card(card) for card in driver.cards]
    if facts.system.wsl:
        mend = "wsl --update in Windows, and NVIDIA's driver for Windows (none inside WSL); then: wsl --shutdown"
        if facts.cuda.library:
            return [problem("gpu", "WSL has the library of NVIDIA's driver for Windows, but nvidia-smi does not answer", mend)]
        return [ok("gpu", "WSL without the library of NVIDIA's driver for Windows: models run on the CPU", mend)]
    if facts.system.container and (driver.pci or driver.kernel_module):
        return [problem("gpu", "this container has no access to the NVIDIA GPU of the host", "docker run --gpus all ...")]
    if driver.kernel_module:
        library = driver.user_library
        if library and library != driver.kernel_module:
            text = f"the kernel module of the driver is {driver.kernel_module}, its library {library}: an update needs a restart"
            return [problem("gpu", text, "sudo reboot")]
        return [problem("gpu", f"driver {driver.kernel_module} is loaded, but nvidia-smi does not answer", "sudo ubuntu-drivers install")]
    if driver.pci:
        return [problem("gpu", f"an NVIDIA GPU ({', '.join(driver.pci)}) without a driver", "sudo ubuntu-drivers install && sudo reboot")]
    return [ok("gpu", "no NVIDIA GPU: models run on the CPU, through onnxruntime")]


def _card(card: Card) -> Finding:
    memory = f", {card.memory_free} of {card.memory_total} MiB free" if card.memory_total and card.memory_free is not None else ""
    heat = f", {card.temperature:.0f} °C" if card.temperature is not None else ""
    capability = card.compute_capability
    said = f"{card.name}, compute capability {_dotted(capability) if capability else 'unknown'}, driver {card.driver}{memory}{heat}"
    if capability is not None and capability < OLDEST_GPU:
        return problem("gpu", f"{said}; TensorRT needs {_dotted(OLDEST_GPU)} or newer", "fastvlm-edge run MODEL --backend ort ...")
    if card.temperature is not None and card.temperature >= HOT:
        return warning("gpu", f"{said}, near throttling", "nvidia-smi -q -d PERFORMANCE (shows what lowers its clocks)")
    return ok("gpu", said)


def _rights(facts: Facts) -> list[Finding]:
    denied = [path for path, allowed in facts.devices.items() if not allowed]
    if denied:
        mend = "sudo usermod -aG video,render $USER (then log out and in again)"
        return [problem("rights", f"this user has no access to {', '.join(denied)}", mend)]
    return [ok("rights", f"this user has access to {', '.join(facts.devices)}")] if facts.devices else []


def _versions(facts: Facts) -> str:
    found = [
        f"{name} {version}" for name, version in (("tensorrt", facts.tensorrt.module), ("tensorrt_rtx", facts.tensorrt.rtx)) if version
    ]
    return ", ".join(found) or "not installed"


def _tensorrt(facts: Facts) -> Finding:
    if facts.jetson is not None:
        return _jetson_tensorrt(facts)
    found, capability = facts.tensorrt, facts.compute_capability
    if too_old(found.module, OLDEST_TENSORRT):
        text = f"{_versions(facts)}; {_dotted(OLDEST_TENSORRT)} or newer is needed"
        return problem("tensorrt", text, "pip install --upgrade tensorrt")
    if too_old(found.rtx, OLDEST_RTX):
        text = f"{_versions(facts)}; {_dotted(OLDEST_RTX)} or newer is needed"
        return problem("tensorrt", text, "pip install --upgrade tensorrt-rtx")
    listed = capability is None or capability in RTX_GPUS
    if found.module or (found.rtx and listed):
        return _with_faults(_versions(facts), found.module, capability)
    unused = "models run on the CPU, and the GPU is unused"
    if listed:
        return warning("tensorrt", f"{_versions(facts)}: {unused}{_place()}", install_command("rtx"))
    unlisted = f"TensorRT for RTX cannot build for compute capability {_dotted(capability or ())}"
    return warning(
        "tensorrt", f"{_versions(facts)}, and {unlisted}: {unused}{_place()}", f"{install_command('tensorrt')} && pip install tensorrt"
    )


def _with_faults(text: str, version: str | None, capability: tuple[int, int] | None) -> Finding:
    """TensorRT itself is well, unless this version has known faults."""
    faults = find_faults("tensorrt", version or "", capability)
    if not faults:
        return ok("tensorrt", text)
    said = "; ".join(f"{fault.what} ({fault.sources})" for fault in faults)
    return warning("tensorrt", f"{text}; {said}", faults[0].mend)


def _place() -> str:
    """Where the command of a finding must run, for the end of its text."""
    place = place_of_install()
    return f" (install {place})" if place else ""


def _jetson_tensorrt(facts: Facts) -> Finding:
    found, python = facts.tensorrt, facts.python
    ours = ".".join(python.version.split(".")[:2])
    if found.module:
        version = found.module if found.module != "unknown" else found.library
        if version and numbers(version) < OLDEST_TENSORRT:
            return problem("tensorrt", f"tensorrt {version}; {_dotted(OLDEST_TENSORRT)} or newer is needed", FLASH)
        text = f"tensorrt {version}{f', libnvinfer {found.library}' if found.library else ''}"
        return _with_faults(text, version, facts.compute_capability)
    if ours in found.system_pythons and python.environment:
        text = "this virtual environment does not see JetPack's tensorrt, which is a package of the system"
        return problem("tensorrt", text, f"python{ours} -m venv --system-site-packages {python.environment}")
    if found.system_pythons and ours not in found.system_pythons:
        other = found.system_pythons[-1]
        text = f"JetPack's tensorrt is built for Python {other}, and this is {ours}"
        return problem("tensorrt", text, f"/usr/bin/python{other} -m venv --system-site-packages .venv")
    if found.library:
        text = f"libnvinfer {found.library} is installed, but its Python package is not"
        return problem("tensorrt", text, "sudo apt install python3-libnvinfer")
    if facts.system.container:
        return problem("tensorrt", "not in this container", "docker run --runtime nvidia ... with an image that contains TensorRT")
    return problem("tensorrt", "JetPack's libraries are not installed", "sudo apt update && sudo apt install nvidia-jetpack")


def _container(facts: Facts) -> list[Finding]:
    if not facts.system.container:
        return []
    if facts.jetson is not None and not (facts.devices and facts.cuda.library):
        text = "this container has no access to the GPU (no device files or no libcuda.so.1)"
        return [problem("container", text, "docker run --runtime nvidia ...")]
    release = facts.jetson.l4t if facts.jetson else None
    if release and release >= (38,) and facts.tensorrt.module and not facts.tensorrt.dla_compiler:  # blakeblackshear/frigate#23582
        library = "/usr/lib/aarch64-linux-gnu/nvidia/libnvdla_compiler.so"
        text = "libnvdla_compiler.so is missing; TensorRT of some images does not load without it"
        return [warning("container", text, f"docker run -v {library}:{library}:ro ...")]
    return [ok("container", "this container has access to the GPU")]


def _cuda(facts: Facts) -> list[Finding]:
    cuda, board = facts.cuda, facts.jetson
    toolkit = f"toolkit {cuda.toolkit}" if cuda.toolkit else "no toolkit (not needed)"
    if not cuda.bindings and not cuda.pycuda:
        text = f"cuda-bindings, which Python needs for CUDA, is not installed; {toolkit}{_place()}"
        return [problem("cuda", text, install_command(gpu_extra(board is not None)))]
    driver: tuple[int, ...] | None = None
    if board is not None and board.jetpack is not None:
        driver = board.jetpack.cuda
    elif cuda.driver:
        driver = numbers(cuda.driver)
    binding = f"cuda-bindings {cuda.bindings}" if cuda.bindings else f"PyCUDA {cuda.pycuda}"
    if cuda.bindings and driver and cuda.bindings != "unknown" and numbers(cuda.bindings)[0] > driver[0]:
        text = f"{binding} needs CUDA {numbers(cuda.bindings)[0]}, and the driver supports {_dotted(driver)}"
        return [problem("cuda", text, f"pip install 'cuda-bindings<{driver[0] + 1}'")]
    supports = f"driver for CUDA {_dotted(driver)}" if driver else "driver version unknown"
    return [ok("cuda", f"{binding}, {supports}, {toolkit}")]


def _python(facts: Facts) -> list[Finding]:
    python = facts.python
    where = "in a virtual environment" if python.environment else "of the system"
    findings = [ok("python", f"{python.version}, {where}")]
    if numbers(python.version) < OLDEST_PYTHON:
        text = f"{python.version}; {_dotted(OLDEST_PYTHON)} or newer is needed"
        mend = f"{FLASH} brings Python 3.10" if facts.jetson else "sudo apt install python3.10-venv && python3.10 -m venv .venv"
        findings = [problem("python", text, mend)]
    missing = [name for module, (name, _) in PACKAGES.items() if python.packages[name] is None and module not in python.broken]
    if missing:
        text = f"{', '.join(missing)} missing: convert, build and run need them{_place()}"
        return [*findings, problem("packages", text, install_command())]
    oldest = dict(PACKAGES.values())
    old = [f"{name} {version}" for name, version in python.packages.items() if too_old(version, numbers(oldest[name]))]
    if old:
        upgrade = " ".join(f"'{name.split()[0]}>={oldest[name.split()[0]]}'" for name in old)
        return [*findings, problem("packages", f"too old: {', '.join(old)}", f"pip install --upgrade {upgrade}")]
    whole = [f"{name} {python.packages[name]}" for module, (name, _) in PACKAGES.items() if module not in python.broken]
    return [*findings, ok("packages", ", ".join(whole))] if whole else findings


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
