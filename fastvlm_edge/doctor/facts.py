"""Everything that was read of a machine, in one place: what the checks judge, and the `machine` object of `doctor --json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.host import (
    Clock,
    Heat,
    Jetson,
    Memory,
    PowerMode,
    Processor,
    System,
    read_clocks,
    read_heat,
    read_jetson,
    read_memory,
    read_power_mode,
    read_processor,
    read_system,
)
from fastvlm_edge.machine.libraries import Cuda, Driver, Python, TensorRT, read_cuda, read_driver, read_python, read_tensorrt
from fastvlm_edge.machine.probe import Probe

_DEVICES = ("dev/nvmap", "dev/nvgpu/igpu0/*", "dev/nvhost-ctrl-gpu", "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/nvidia-uvm", "dev/dxg")
"""Device files that CUDA opens: Orin's, Thor's and a card's, WSL's."""


@dataclass(frozen=True)
class Facts:
    """Of one machine at one moment."""

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
    """`cache` (where built engines are kept) and, where one was named, `model` -> free bytes of the disk that it is on."""
    boot: str | None
    """Where the kernel's command line is set: `extlinux` or `grub`."""

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU that TensorRT might run on."""
        chip = self.jetson is not None and self.jetson.compute_capability is not None
        card = bool(self.driver.cards or self.driver.pci or self.driver.kernel_module)
        return chip or card or (self.system.wsl and self.cuda.library)

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Of the GPU that runs would use."""
        if self.jetson is not None:
            return self.jetson.compute_capability
        return self.driver.cards[0].compute_capability if self.driver.cards else None

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is nothing to tell."""
        return dataclasses.asdict(self)


def read_facts(probe: Probe, model: Path | None = None) -> Facts:
    """Read all of it. Takes well under a second; nothing is imported, written or run but nvidia-smi."""
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


_BOOTS = {"extlinux": "boot/extlinux/extlinux.conf", "grub": "etc/default/grub"}
