"""Thermal and clock state: what explains a figure that is slower today than yesterday. Read from Linux's sysfs, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_state(root: Path = Path("/")) -> dict[str, Any]:
    """Temperatures by zone in degrees Celsius, clocks in MHz, governors, power mode, load; what the machine does not tell is left out."""
    state: dict[str, Any] = {}
    temperatures = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        millidegrees = _number(zone / "temp")
        if millidegrees is not None and millidegrees > 0:  # a sensor that is switched off reads 0 or -256,000
            temperatures[_text(zone / "type") or zone.name] = round(millidegrees / 1000, 1)
    if temperatures:
        state["temperature_c"] = temperatures
    state |= _cpu_clocks(root)
    clocks = {}
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        hertz = _number(device / "cur_freq")
        if hertz:
            clocks[_text(device / "device/of_node/name") or device.name] = round(hertz / 1e6)
    if clocks:
        state["device_mhz"] = clocks
    mode = _text(root / "var/lib/nvpmodel/status")
    if mode:
        state["power_mode"] = mode  # Jetson: as nvpmodel keeps it, "pmode:0000"
    load = _text(root / "proc/loadavg")
    if load:
        state["load_average"] = float(load.split()[0])
    return state


def busy(state: dict[str, Any]) -> bool:
    """Whether other programs kept at least half a core busy during the last minute."""
    return bool(state.get("load_average", 0.0) >= 0.5)


def hottest(state: dict[str, Any]) -> float | None:
    """The hottest zone in degrees Celsius."""
    return max(state.get("temperature_c", {}).values(), default=None)


def _cpu_clocks(root: Path) -> dict[str, Any]:
    folders = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"), key=lambda folder: int(folder.parent.name[3:]))
    now = [_number(folder / "scaling_cur_freq") for folder in folders]
    if not any(now):
        lines = (_text(root / "proc/cpuinfo") or "").splitlines()
        shown = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return {"cpu_mhz": [round(value) for value in shown]} if shown else {}
    most = [_number(folder / "scaling_max_freq") for folder in folders]
    state: dict[str, Any] = {"cpu_mhz": [round((value or 0) / 1e3) for value in now]}
    if any(most):
        state["cpu_max_mhz"] = round(max(value or 0 for value in most) / 1e3)
    governors = sorted({name for folder in folders if (name := _text(folder / "scaling_governor"))})
    if governors:
        state["governor"] = ", ".join(governors)
    return state


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
