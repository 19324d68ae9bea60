"""The board, its system, power mode and clocks, from /proc, /sys, /etc and /dev."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastvlm_edge.machine.boards.chips import CHIPS, MODULES, SOC_IDS
from fastvlm_edge.machine.boards.jetpacks import JetPack, find_jetpack
from fastvlm_edge.machine.probe import Probe

_EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
_UNKNOWN_MODEL = "a Jetson"


@dataclass(frozen=True)
class Jetson:
    """A Jetson board and its Jetson Linux."""

    model: str
    chip: str
    """Such as `tegra234`; `unknown` if the system does not name it."""
    module: str | None
    """A name in MODULES."""
    compute_capability: tuple[int, int] | None
    l4t: tuple[int, ...] | None
    """Such as (36, 4, 3)."""
    jetpack: JetPack | None

    @property
    def name(self) -> str:
        """The module, such as "Orin NX 16 GB", or else the board; empty if neither is visible, as in Docker."""
        if self.module is not None:
            return self.module.partition(" (")[0]
        return "" if self.model == _UNKNOWN_MODEL else self.model


@dataclass(frozen=True)
class System:
    """Operating system, and whether it runs in a container or under WSL."""

    name: str
    kernel: str
    architecture: str
    container: bool
    wsl: bool


@dataclass(frozen=True)
class PowerMode:
    """The modes that nvpmodel knows: number -> name, and the current number."""

    current: int | None
    modes: dict[int, str]

    @property
    def name(self) -> str | None:
        """Name of the current mode."""
        return None if self.current is None else self.modes.get(self.current)

    @property
    def fastest(self) -> int | None:
        """Number of MAXN_SUPER, else of MAXN, else of the mode with the most watts."""

        def rank(mode: int) -> tuple[int, int]:
            name = self.modes[mode]
            watts = re.search(r"(\d+)W", name)
            return (2 if "MAXN_SUPER" in name else 1 if name.startswith("MAXN") else 0, int(watts.group(1)) if watts else 0)

        return max(self.modes, key=rank, default=None)


@dataclass(frozen=True)
class Clock:
    """One clock in MHz, its limits, and its governor."""

    now: float
    least: float | None
    most: float | None
    governor: str | None

    @property
    def pinned(self) -> bool:
        """Whether it cannot go lower, as it is after jetson_clocks."""
        return self.least is not None and self.least == self.most


def read_jetson(probe: Probe) -> Jetson | None:
    """None if this is not a Jetson. Docker hides the device tree, but the number of the chip can still be read."""
    compatible = (probe.text("proc/device-tree/compatible") or "").replace("\0", " ").split()
    chips = [name.partition(",")[2] for name in compatible if name.partition(",")[2] in CHIPS]
    tegra = probe.text("sys/devices/soc0/family") == "Tegra"
    if not chips and tegra:
        chips = [name for name, number in SOC_IDS.items() if probe.text("sys/devices/soc0/soc_id") == number]
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", probe.text("etc/nv_tegra_release") or "")
    if not chips and release is None and not tegra:
        return None
    l4t = (int(release.group(1)), *(int(part) for part in release.group(2).split(".") if part)) if release else None
    parts = re.findall(r"p\d{4}-\d{4}", " ".join(compatible))
    chip = chips[0] if chips else "unknown"
    return Jetson(
        model=probe.text("proc/device-tree/model") or _UNKNOWN_MODEL,
        chip=chip,
        module=next((MODULES[part] for part in parts if part in MODULES), None),
        compute_capability=CHIPS[chip][1] if chip in CHIPS else None,
        l4t=l4t,
        jetpack=find_jetpack(l4t) if l4t else None,
    )


def read_system(probe: Probe) -> System:
    """From os-release, and from the files that Docker, Podman and WSL add."""
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', probe.text("etc/os-release") or "", re.MULTILINE)
    return System(
        name=name.group(1) if name else "an unknown system",
        kernel=probe.kernel,
        architecture=probe.architecture,
        container=probe.exists(".dockerenv") or probe.exists("run/.containerenv") or "container" in probe.environ,
        wsl=probe.exists("dev/dxg") or "microsoft" in probe.kernel.lower(),
    )


def read_power_mode(probe: Probe) -> PowerMode | None:
    """From the files of nvpmodel, which everybody may read; None if there is no nvpmodel."""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", probe.text("etc/nvpmodel.conf") or "", re.MULTILINE)
    if not found:
        return None
    current = re.search(r"pmode:(\d+)", probe.text("var/lib/nvpmodel/status") or "")
    return PowerMode(int(current.group(1)) if current else None, {int(number): name for number, name in found})


def read_clocks(probe: Probe) -> dict[str, Clock]:
    """`gpu` and `emc` (memory): 17000000.gpu on Orin, gpu-gpc-0 and bwmgr on Thor. On Orin only root can read the clock of the memory."""
    clocks = {}
    for folder in probe.find("sys/class/devfreq/*"):
        device = folder.rpartition("/")[2]
        name = "gpu" if device in ("gpu-gpc-0", "17000000.gpu", "17000000.ga10b") else "emc" if device == "bwmgr" else None
        now = probe.number(f"{folder}/cur_freq")
        if name and now:
            least, most = probe.number(f"{folder}/min_freq"), probe.number(f"{folder}/max_freq")
            governor = probe.text(f"{folder}/governor")
            clocks[name] = Clock(now / 1e6, least / 1e6 if least else None, most / 1e6 if most else None, governor)
    now, least, most = (probe.number(f"{_EMC}/{name}") for name in ("rate", "min_rate", "max_rate"))
    if now and "emc" not in clocks:
        clocks["emc"] = Clock(now / 1e6, least / 1e6 if least else None, most / 1e6 if most else None, None)
    return clocks
