"""What the kernel tells of a machine, out of /proc, /sys, /etc and /dev: board, memory, power mode, clocks, heat, processor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastvlm_edge.machine.jetpack import CHIPS, MODULES, JetPack, find_jetpack
from fastvlm_edge.machine.probe import Probe

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve")
"""Of the processor, as /proc/cpuinfo has them: those that decide how fast matrix products are."""

_EMC = "sys/kernel/debug/bpmp/debug/clk/emc"
SOC_IDS = {"tegra194": "25", "tegra234": "35", "tegra264": "38"}
"""/sys/devices/soc0/soc_id: the chip id, 0x19, 0x23 and 0x26, in decimal (Linux, drivers/soc/tegra/fuse)."""


@dataclass(frozen=True)
class Jetson:
    """The board and its Jetson Linux."""

    model: str
    chip: str
    """`tegra234` and the like."""
    module: str | None
    """A title out of MODULES."""
    compute_capability: tuple[int, int] | None
    l4t: tuple[int, ...] | None
    """Such as (36, 4, 3)."""
    jetpack: JetPack | None


@dataclass(frozen=True)
class System:
    """Operating system and what it runs in."""

    name: str
    kernel: str
    architecture: str
    container: bool
    wsl: bool


@dataclass(frozen=True)
class Memory:
    """Bytes. CMA is the contiguous memory that some allocations of the GPU need; None where the kernel has none."""

    total: int
    available: int
    cma_total: int | None
    cma_free: int | None
    cma_argument: str | None
    """Of the kernel's command line, `950M`."""
    swap_total: int
    swap_free: int
    swap_zram: int
    """The part of swap_total that is compressed memory."""


@dataclass(frozen=True)
class PowerMode:
    """nvpmodel."""

    current: int | None
    modes: dict[int, str]

    @property
    def name(self) -> str | None:
        """Of the current mode."""
        return None if self.current is None else self.modes.get(self.current)

    @property
    def fastest(self) -> int | None:
        """MAXN_SUPER, else MAXN, else the mode of the most watts."""

        def rank(mode: int) -> tuple[int, int]:
            name = self.modes[mode]
            watts = re.search(r"(\d+)W", name)
            return (2 if "MAXN_SUPER" in name else 1 if name.startswith("MAXN") else 0, int(watts.group(1)) if watts else 0)

        return max(self.modes, key=rank, default=None)


@dataclass(frozen=True)
class Clock:
    """Megahertz and governor of one clock."""

    now: float
    least: float | None
    most: float | None
    governor: str | None

    @property
    def pinned(self) -> bool:
        """Whether it cannot go lower, as after jetson_clocks."""
        return self.least is not None and self.least == self.most


@dataclass(frozen=True)
class Heat:
    """Thermal zones in degrees Celsius, what throttles now, and over-current events since the board started."""

    zones: dict[str, float] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    over_current: dict[str, int] = field(default_factory=dict)

    @property
    def hottest(self) -> str | None:
        """Name of the zone."""
        return max(self.zones, key=self.zones.__getitem__, default=None)


@dataclass(frozen=True)
class Processor:
    """Cores are those that this process may use."""

    name: str
    cores: int
    flags: list[str]
    governors: list[str]


def read_jetson(probe: Probe) -> Jetson | None:
    """None where this is no Jetson. Docker hides the device tree; the number of the chip still shows."""
    compatible = (probe.text("proc/device-tree/compatible") or "").replace("\0", " ").split()
    chips = [name.partition(",")[2] for name in compatible if name.partition(",")[2] in CHIPS]
    if not chips and probe.text("sys/devices/soc0/family") == "Tegra":
        chips = [name for name, number in SOC_IDS.items() if probe.text("sys/devices/soc0/soc_id") == number]
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", probe.text("etc/nv_tegra_release") or "")
    if not chips and release is None:
        return None
    l4t = (int(release.group(1)), *(int(part) for part in release.group(2).split(".") if part)) if release else None
    parts = re.findall(r"p\d{4}-\d{4}", " ".join(compatible))
    chip = chips[0] if chips else "unknown"
    return Jetson(
        model=probe.text("proc/device-tree/model") or "a Jetson",
        chip=chip,
        module=next((MODULES[part] for part in parts if part in MODULES), None),
        compute_capability=CHIPS[chip][1] if chip in CHIPS else None,
        l4t=l4t,
        jetpack=find_jetpack(l4t) if l4t else None,
    )


def read_system(probe: Probe) -> System:
    """From os-release, and the marks that Docker, Podman and WSL leave."""
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', probe.text("etc/os-release") or "", re.MULTILINE)
    return System(
        name=name.group(1) if name else "an unknown system",
        kernel=probe.kernel,
        architecture=probe.architecture,
        container=probe.exists(".dockerenv") or probe.exists("run/.containerenv") or "container" in probe.environ,
        wsl=probe.exists("dev/dxg") or "microsoft" in probe.kernel.lower(),
    )


def read_memory(probe: Probe) -> Memory:
    """From /proc/meminfo, /proc/swaps and /proc/cmdline."""
    table = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", probe.text("proc/meminfo") or "", re.MULTILINE)}
    cma = re.search(r"(?:^|\s)cma=(\S+)", probe.text("proc/cmdline") or "")
    zram = re.findall(r"^/dev/zram\d+\s+\S+\s+(\d+)", probe.text("proc/swaps") or "", re.MULTILINE)
    total_cma = table.get("CmaTotal")
    return Memory(
        total=table.get("MemTotal", 0),
        available=table.get("MemAvailable", table.get("MemFree", 0)),
        cma_total=total_cma or None,
        cma_free=table.get("CmaFree") if total_cma else None,
        cma_argument=cma.group(1) if cma else None,
        swap_total=table.get("SwapTotal", 0),
        swap_free=table.get("SwapFree", 0),
        swap_zram=sum(int(kib) << 10 for kib in zram),
    )


def read_power_mode(probe: Probe) -> PowerMode | None:
    """From nvpmodel's own files, which need no rights; None where there is no nvpmodel."""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", probe.text("etc/nvpmodel.conf") or "", re.MULTILINE)
    if not found:
        return None
    current = re.search(r"pmode:(\d+)", probe.text("var/lib/nvpmodel/status") or "")
    return PowerMode(int(current.group(1)) if current else None, {int(number): name for number, name in found})


def read_clocks(probe: Probe) -> dict[str, Clock]:
    """`gpu` and `emc` (memory): 17000000.gpu on Orin, gpu-gpc-0 and bwmgr on Thor. Orin shows its memory's clock to root alone."""
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


def read_heat(probe: Probe) -> Heat:
    """Zones of parts that are switched off fail to read, or read 0 or -256, and are left out."""
    zones: dict[str, float] = {}
    for folder in probe.find("sys/class/thermal/thermal_zone*"):
        millidegrees = probe.number(f"{folder}/temp")
        if millidegrees is not None and millidegrees > 0:
            name = probe.text(f"{folder}/type") or folder.rpartition("/")[2]
            zones[name] = max(millidegrees / 1000, zones.get(name, 0))
    alerts = []
    for folder in probe.find("sys/class/thermal/cooling_device*"):
        kind = probe.text(f"{folder}/type") or ""
        if kind.endswith("-alert") and (probe.number(f"{folder}/cur_state") or 0) > 0:
            alerts.append(kind)
    events = {}
    for path in probe.find("sys/class/hwmon/*/oc*_event_cnt"):
        count = probe.number(path)
        if count is not None:
            events[path.rpartition("/")[2].partition("_")[0]] = int(count)
    return Heat(zones, alerts, events)


def read_processor(probe: Probe) -> Processor:
    """From /proc/cpuinfo; Arm's has no name."""
    fields: dict[str, str] = {}
    for line in (probe.text("proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    governors = {probe.text(path) for path in probe.find("sys/devices/system/cpu/cpufreq/policy*/scaling_governor")}
    return Processor(
        name=fields.get("model name") or f"{probe.architecture} processor",
        cores=probe.cores,
        flags=[flag for flag in FLAGS if flag in flags],
        governors=sorted(name for name in governors if name),
    )
