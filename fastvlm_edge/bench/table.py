"""Print a record as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvlm_edge.bench.record import figures_of, title_of, unit
from fastvlm_edge.machine.state import busy


def format_record(document: dict[str, Any]) -> str:
    """Text of a record: a table of the figures, then model, machine and settings."""
    model, machine, settings = document["model"], document["machine"], document["settings"]
    rows: list[tuple[str, ...]] = [("", "median", "min", "max", "")]
    for name, figure in figures_of(document).items():
        rows.append((title_of(name), *(number(figure[key]) for key in ("median", "min", "max")), unit(name)))
    lines = [
        f"{model['name']} ({model['precision']}), {model['image_size']} px; {document.get('runs_on', 'not loaded')}",
        f"{document['prompt_tokens']} positions for picture and question",
    ]
    if "warm_prefilled_tokens" in document:
        lines[-1] += f", {document['warm_prefilled_tokens']} of them computed if the picture is in the cache"
    missing = [slots for slots in settings.get("slots", ()) if slots > document.get("slots", slots)]
    lines += ["", *aligned(rows), ""]
    if missing:
        lines.append(f"{document['backend']} answers at most {document['slots']} at once: {', '.join(map(str, missing))} not measured")
    lines += [*map(_engines, document["engines"])]
    lines += [_power(document["power"]), *_state(document["state"])]
    memory = f"{machine['memory_gib']} GiB"
    lines.append(f"{machine.get('board', machine['cpu'])}, {machine['cores']} cores, {memory}, {machine['date']}")
    if "gpu" in machine:
        lines[-1] += f", {machine['gpu'].get('name', 'GPU unknown')}"
    lines.append(f"{settings['processes']} processes of {settings['runs']} runs each after a warm-up")
    if document["partial"]:
        lines[-1] += f"; incomplete: stopped after {document['processes_done']}"
    return "\n".join(line.rstrip() for line in lines)


def aligned(rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Rows as lines of text. Columns in `left` and the last one are aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = (*left, len(widths) - 1)

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if at in words else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )

    return [line(row).rstrip() for row in rows]


def number(value: float) -> str:
    """A number with four significant digits, and from 1000 on without decimals."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _engines(engines: dict[str, Any]) -> str:
    cached = engines["from_cache"]
    parts = [f"{part} {'from the cache' if cached.get(part) else f'{seconds} s'}" for part, seconds in engines["build_seconds"].items()]
    return f"engines for {engines['target']} ({engines['library']} {engines['version']}), built: {', '.join(parts)}"


def _power(power: dict[str, Any]) -> str:
    if power["sensor"] is None:
        return f"power: not measured ({power['reason']})"
    mean = "" if power["mean_w"] is None else f"{power['mean_w']:.1f} W, "
    line = f"power: {mean}peak {power['peak_w']:.1f} W ({power['sensor']})"
    if power["temperature_c"] is not None:
        line += f", {power['temperature_c']:.0f} °C"
    return line + (", THROTTLED: clocks were lowered" if power["throttled"] else "")


def _state(state: dict[str, Any]) -> list[str]:
    before, after = state["before"], state["after"]
    parts = []
    for name, label in (("cpu_mhz", "CPU MHz"), ("device_mhz", "device MHz"), ("temperature_c", "highest °C")):
        if name in before and name in after:
            first, last = (max(each[name].values() if isinstance(each[name], dict) else each[name], default=0) for each in (before, after))
            parts.append(f"{label} {first:g} before, {last:g} after")
    if "governor" in before:
        parts.append(f"governor {before['governor']}")
    if "power_mode" in before:
        parts.append(f"power mode {before['power_mode']}")
    lines = ["; ".join(parts)] if parts else []
    if busy(before):
        lines.append(f"the machine was busy before the measurement (load {before['load_average']:g}): measure again when it is idle")
    return lines
