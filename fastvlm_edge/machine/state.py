"""Thermal and clock state: what explains a figure that is slower today than yesterday. Read from Linux's sysfs, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_edge.machine.host import read_heat
from fastvlm_edge.machine.probe import Probe


def read_state(root: Path = Path("/")) -> dict[str, Any]:
    """Temperatures by zone in degrees Celsius, clocks in MHz, governors, power mode, load; what the machine does not tell is left out."""
    probe = Probe(root)
    state: dict[str, Any] = {}
    temperatures = read_heat(probe).zones
    if temperatures:
        state["temperature_c"] = {zone: round(degrees, 1) for zone, degrees in temperatures.items()}
    state |= _cpu_clocks(probe)
    clocks = {}
    for device in probe.find("sys/class/devfreq/*"):
        hertz = probe.number(f"{device}/cur_freq")
        if hertz:
            clocks[probe.text(f"{device}/device/of_node/name") or Path(device).name] = round(hertz / 1e6)
    if clocks:
        state["device_mhz"] = clocks
    mode = probe.text("var/lib/nvpmodel/status")
    if mode:
        state["power_mode"] = mode  # Jetson: as nvpmodel keeps it, "pmode:0000"
    load = probe.text("proc/loadavg")
    if load:
        state["load_average"] = float(load.split()[0])
    return state


def busy(state: dict[str, Any]) -> bool:
    """Whether other programs kept at least half a core busy during the last minute."""
    return bool(state.get("load_average", 0.0) >= 0.5)


def hottest(state: dict[str, Any]) -> float | None:
    """The hottest zone in degrees Celsius."""
    return max(state.get("temperature_c", {}).values(), default=None)


def _cpu_clocks(probe: Probe) -> dict[str, Any]:
    folders = sorted(probe.find("sys/devices/system/cpu/cpu[0-9]*/cpufreq"), key=lambda folder: int(Path(folder).parent.name[3:]))
    now = [probe.number(f"{folder}/scaling_cur_freq") for folder in folders]
    if not any(now):
        lines = (probe.text("proc/cpuinfo") or "").splitlines()
        shown = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return {"cpu_mhz": [round(value) for value in shown]} if shown else {}
    most = [probe.number(f"{folder}/scaling_max_freq") for folder in folders]
    state: dict[str, Any] = {"cpu_mhz": [round((value or 0) / 1e3) for value in now]}
    if any(most):
        state["cpu_max_mhz"] = round(max(value or 0 for value in most) / 1e3)
    governors = sorted({name for folder in folders if (name := probe.text(f"{folder}/scaling_governor"))})
    if governors:
        state["governor"] = ", ".join(governors)
    return state
