"""Temperatures, clocks and load, read before and after a measurement: they explain why a figure is slower today than yesterday."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_edge.machine.heat import read_heat
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.machine.processor import cpu_clocks


def read_state(root: Path = Path("/")) -> dict[str, Any]:
    """Temperature of each zone in degrees Celsius, clocks in MHz, governor, power mode and load, as far as the machine reports them."""
    probe = Probe(root)
    state: dict[str, Any] = {}
    temperatures = read_heat(probe).zones
    if temperatures:
        state["temperature_c"] = {zone: round(degrees, 1) for zone, degrees in temperatures.items()}
    state |= cpu_clocks(probe)
    clocks = {}
    for device in probe.find("sys/class/devfreq/*"):
        hertz = probe.number(f"{device}/cur_freq")
        if hertz:
            clocks[probe.text(f"{device}/device/of_node/name") or Path(device).name] = round(hertz / 1e6)
    if clocks:
        state["device_mhz"] = clocks
    mode = probe.text("var/lib/nvpmodel/status")
    if mode:
        state["power_mode"] = mode  # of a Jetson, as nvpmodel writes it: "pmode:0000"
    load = probe.text("proc/loadavg")
    if load:
        state["load_average"] = float(load.split()[0])
    return state


def busy(state: dict[str, Any]) -> bool:
    """Whether other programs kept at least half a core busy during the last minute."""
    return bool(state.get("load_average", 0.0) >= 0.5)


def hottest(state: dict[str, Any]) -> float | None:
    """Degrees Celsius of the hottest zone; None if no zone was read."""
    return max(state.get("temperature_c", {}).values(), default=None)
