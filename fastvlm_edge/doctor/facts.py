"""Everything that is read from a machine: the input of the checks, and the `machine` object of `doctor --json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.heat import Heat, read_heat
from fastvlm_edge.machine.host import Clock, Jetson, PowerMode, System, read_clocks, read_jetson, read_power_mode, read_system
from fastvlm_edge.machine.libraries import Cuda, Driver, Python, TensorRT, read_cuda, read_driver, read_python, read_tensorrt
from fastvlm_edge.machine.memory import Memory, read_memory
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.machine.processor import Processor, read_processor

_DEVICES = ("dev/nvmap", "dev/nvgpu/igpu0/*", "dev/nvhost-ctrl-gpu", "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/nvidia-uvm", "dev/dxg")
"""Device files that CUDA opens, on Orin, on Thor, with a graphics card and under WSL."""


@dataclass(frozen=True)
class Facts:
    """The state of one machine at one moment."""

    system: System
    jetson: Jetson | None
    processor: Processor
    memory: Memory
    heat: Heat
    clocks: dict[str, Clock]
    power_mode: PowerMode | None
    python: Python
    tensorrt: TensorRT
    cuda: Cuda
    driver: Driver
    devices: dict[str, bool]
    """Device file of the GPU -> whether this user may use it."""
    free_bytes: dict[str, int | None]
    """`cache` (where built engines are kept) and, if a model was named, `model` -> free bytes of its disk; None if unknown."""
    boot: str | None
    """Boot loader that sets the command line of the kernel: `extlinux` or `grub`."""

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU that TensorRT might run on."""
        return _has_gpu(self.jetson, self.driver, self.system, self.cuda)

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Compute capability of the GPU that a model would run on."""
        if self.jetson is not None:
            return self.jetson.compute_capability
        return self.driver.cards[0].compute_capability if self.driver.cards else None

    def to_json(self) -> dict[str, Any]:
        """All fields as plain types."""
        return dataclasses.asdict(self)


def read_facts(probe: Probe, model: Path | None = None) -> Facts:
    """Read everything. Nothing is written. nvidia-smi is run, and packages are imported in other processes, which takes a few seconds."""
    places = {"cache": probe.cache(), **({"model": model} if model is not None else {})}
    return Facts(
        system=read_system(probe),
        jetson=read_jetson(probe),
        processor=read_processor(probe),
        memory=read_memory(probe),
        heat=read_heat(probe),
        clocks=read_clocks(probe),
        power_mode=read_power_mode(probe),
        python=read_python(probe),
        tensorrt=read_tensorrt(probe),
        cuda=read_cuda(probe),
        driver=read_driver(probe),
        devices={f"/{path}": probe.accessible(probe.root / path) for pattern in _DEVICES for path in probe.find(pattern)},
        free_bytes={name: probe.free_bytes(path) for name, path in places.items()},
        boot=next((name for name, path in _BOOTS.items() if probe.exists(path)), None),
    )


def has_gpu(probe: Probe) -> bool:
    """`Facts.has_gpu` without the other facts, most of which take longer."""
    return _has_gpu(read_jetson(probe), read_driver(probe), read_system(probe), read_cuda(probe))


def _has_gpu(jetson: Jetson | None, driver: Driver, system: System, cuda: Cuda) -> bool:
    chip = jetson is not None and jetson.compute_capability is not None
    card = bool(driver.cards or driver.pci or driver.kernel_module)
    return chip or card or (system.wsl and cuda.library)


_BOOTS = {"extlinux": "boot/extlinux/extlinux.conf", "grub": "etc/default/grub"}
