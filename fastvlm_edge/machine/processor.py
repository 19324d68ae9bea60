"""The processor, from /proc/cpuinfo and the clocks in /sys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.probe import Probe

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve")
"""Flags in /proc/cpuinfo that decide how fast matrix products are."""


@dataclass(frozen=True)
class Processor:
    """Name, usable cores, flags (those of FLAGS) and clock governors."""

    name: str
    cores: int
    """Cores that this process may use."""
    flags: list[str]
    governors: list[str]


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says."""

    name: str | None
    """None on Arm, where the file has no name."""
    flags: list[str]
    """Those of FLAGS, in that order."""
    mhz: list[float]
    """Current clock of each core; empty on Arm."""


def read_cpuinfo(probe: Probe) -> CpuInfo:
    """Read /proc/cpuinfo. A field that is repeated for each core is that of the last core."""
    lines = [line.partition(":") for line in (probe.text("proc/cpuinfo") or "").splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in lines}
    found = set(fields.get("flags", fields.get("Features", "")).split())
    return CpuInfo(
        name=fields.get("model name") or None,
        flags=[flag for flag in FLAGS if flag in found],
        mhz=[float(value) for key, _, value in lines if key.startswith("cpu MHz") and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value)],
    )


def read_processor(probe: Probe) -> Processor:
    """From /proc/cpuinfo and the clock governors in /sys."""
    info = read_cpuinfo(probe)
    governors = {probe.text(path) for path in probe.find("sys/devices/system/cpu/cpufreq/policy*/scaling_governor")}
    return Processor(
        name=info.name or f"{probe.architecture} processor",
        cores=probe.cores,
        flags=info.flags,
        governors=sorted(name for name in governors if name),
    )


def cpu_clocks(probe: Probe) -> dict[str, Any]:
    """`cpu_mhz` (a list, one value per core), `cpu_max_mhz` and `governor`; what the system does not report is left out."""
    folders = sorted(probe.find("sys/devices/system/cpu/cpu[0-9]*/cpufreq"), key=lambda folder: int(Path(folder).parent.name[3:]))
    now = [probe.number(f"{folder}/scaling_cur_freq") for folder in folders]
    if not any(now):
        shown = read_cpuinfo(probe).mhz
        return {"cpu_mhz": [round(value) for value in shown]} if shown else {}
    most = [probe.number(f"{folder}/scaling_max_freq") for folder in folders]
    clocks: dict[str, Any] = {"cpu_mhz": [round((value or 0) / 1e3) for value in now]}
    if any(most):
        clocks["cpu_max_mhz"] = round(max(value or 0 for value in most) / 1e3)
    governors = sorted({name for folder in folders if (name := probe.text(f"{folder}/scaling_governor"))})
    if governors:
        clocks["governor"] = ", ".join(governors)
    return clocks
