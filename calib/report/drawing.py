"""Building blocks of the report's page: formatted numbers, SVG charts and tables. Nothing here is about quantisation."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Text -----------------------------------------------------------------------------------------------------------------------------


def escape(value: object) -> str:
    return html.escape(str(value))


def figure(value: Any) -> str:
    """A number with three digits, small and large ones as powers of ten; anything else as text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)[:80]
    if isinstance(value, int):
        return f"{value:,}"
    if 0.99 <= value < 1:  # cosines: the distance from 1 matters
        return f"{value:.{min(8, 1 - math.floor(math.log10(1 - value)))}f}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def amount(value: float, unit: str = "") -> str:
    """A number with a decimal prefix, such as 15.2 GB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def percent(share: float) -> str:
    if not math.isfinite(share):
        return "–"
    text = f"{100 * share:.0f}" if share in (0, 1) else f"{100 * share:.1f}"
    text = "< 0.1" if 0 < share < 0.001 else "> 99.9" if 0.9995 < share < 1 else text
    return f"{text}\u00a0%"  # a non-breaking space


# Pictures -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A bar up to `high`; with `low`, a line from `high` (ring) to `low` (dot)."""

    section: str
    high: float
    colour: str
    title: str
    low: float | None = None


_HEIGHT, _ROW = 230, 15
_NARROW = 300
"""Width of a picture on a phone, in pixels; names of sections must not overlap there."""


def draw_chart(marks: Sequence[Mark], what: str, line: float | None = None, line_text: str = "") -> str:
    """Marks from left to right on a logarithmic scale, above the names of their sections; `line` is a horizontal limit."""
    known = [value for mark in marks for value in (mark.low, mark.high) if value is not None and 0 < value < math.inf]
    known += [line] if line and math.isfinite(line) else []
    if not known:
        return '<p class="note">Nothing was measured.</p>'
    top = math.log10(max(known)) + 0.15
    bottom = max(math.log10(min(known)) - 0.15, top - 8)
    step = 100 / len(marks)

    def y(value: float) -> float:
        place = (top - math.log10(value)) / (top - bottom) if 0 < value < math.inf else 1.0
        return round(10 + (_HEIGHT - 10) * min(max(place, 0.0), 1.0), 1)

    parts: list[str] = []
    taken: list[float] = []  # the right end of the names in each row
    for number, (name, section) in enumerate(itertools.groupby(enumerate(marks), lambda pair: pair[1].section)):
        places = [place for place, _ in section]
        left, right = places[0] * step, (places[-1] + 1) * step
        if number % 2 == 0:
            parts.append(f'<rect class="band" x="{left:.2f}%" width="{right - left:.2f}%" y="0" height="{_HEIGHT}"/>')
        wide = 100 * (7 * len(name) + 6) / _NARROW
        start = min(max((left + right - wide) / 2, 0.0), 100 - wide)
        row = next((row for row, end in enumerate(taken) if end <= start), len(taken))
        taken[row : row + 1] = [start + wide]
        at, anchor = (0.0, "start") if start <= 0 else (100.0, "end") if start >= 100 - wide else ((left + right) / 2, "middle")
        parts.append(f'<text x="{at:.2f}%" y="{_HEIGHT + _ROW * (row + 1)}" text-anchor="{anchor}">{escape(name)}</text>')
    fine = (1, 2, 5) if top - bottom < 2.6 else (1,)
    for power, digit in itertools.product(range(math.floor(bottom), math.ceil(top)), fine):
        value = digit * 10.0**power
        if bottom < math.log10(value) < top:
            parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y(value)}" y2="{y(value)}"/>')
            parts.append(f'<text x="-6" y="{y(value) + 4}" text-anchor="end">{figure(value)}</text>')
    for place, mark in enumerate(marks):
        left, x, high = place * step, f"{(place + 0.5) * step:.2f}%", y(mark.high)
        hit = f'<rect class="hit" x="{left:.2f}%" width="{step:.2f}%" y="0" height="{_HEIGHT}"/><title>{escape(mark.title)}</title>'
        if mark.low is None:
            shape = f'<rect x="{left + 0.1 * step:.2f}%" width="{0.8 * step:.2f}%" y="{high}" height="{_HEIGHT - high:.1f}"/>'
        else:
            shape = f'<line x1="{x}" x2="{x}" y1="{high}" y2="{y(mark.low)}"/><circle class="from" cx="{x}" cy="{high}" r="2.5"/>'
            shape += f'<circle cx="{x}" cy="{y(mark.low)}" r="2.5"/>'
        parts.append(f'<g class="m {mark.colour}">{hit}{shape}</g>')
    if line and math.isfinite(line):
        parts.append(f'<line class="limit" x1="0" x2="100%" y1="{y(line)}" y2="{y(line)}"/>')
        parts.append(f'<text class="limit" x="4" y="{y(line) - 5}">{escape(line_text)}</text>')
    svg = f'<svg class="chart" role="img" aria-label="{escape(what)}" height="{_HEIGHT + _ROW * len(taken) + 5}">{"".join(parts)}</svg>'
    return f'<div class="plot">{svg}</div><p class="tip" aria-hidden="true">&#160;</p>'


_COLOURS = {"INT8": "int8", "INT4": "int4", "FP16": "fp16", "BF16": "fp16", "FP32": "fp32", "floats": "fp16"}
_ORDER = ("int8", "weights", "int4", "fp16", "fp32", "rest")


def colour(kind: str) -> str:
    return "weights" if kind.startswith("INT8 weights") else _COLOURS.get(kind.split()[0] if kind.strip() else "", "rest")


def draw_stack(title: str, shares: Mapping[str, float], unit: str = "") -> str:
    """One bar of 100 % with a key of its parts."""
    whole = sum(shares.values())
    if not whole > 0:
        return ""
    shares = dict(sorted(shares.items(), key=lambda item: _ORDER.index(colour(item[0]))))
    bar, keys, left = "", "", 0.0
    for kind, value in shares.items():
        text = f"{kind}: {percent(value / whole)}, {amount(value, unit)}"
        width = 100 * value / whole
        bar += f'<rect class="{colour(kind)}" x="{left:.2f}%" width="{width:.2f}%" height="22"><title>{escape(text)}</title></rect>'
        keys += f'<li><i class="{colour(kind)}"></i>{escape(text)}</li>'
        left += width
    label = f"{title}: " + "; ".join(f"{kind} {percent(value / whole)}" for kind, value in shares.items())
    svg = f'<svg class="stack" role="img" aria-label="{escape(label)}" height="22">{bar}</svg>'
    return f'<figure><figcaption>{escape(title)} <b>{amount(whole, unit)}</b></figcaption>{svg}<ul class="key">{keys}</ul></figure>'


def draw_key(entries: Iterable[tuple[str, str]]) -> str:
    return '<ul class="key">' + "".join(f'<li><i class="{colour}"></i>{escape(text)}</li>' for colour, text in entries) + "</ul>"


def draw_table(what: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A sortable table. A cell may be a pair: the text, and the number to sort by. The first column names the row."""
    body: list[str] = []
    numeric: set[int] = set()
    for row in rows:
        cells = [f"<th scope='row'>{escape(row[0])}</th>"]
        for column, cell in enumerate(row[1:], start=1):
            if isinstance(cell, tuple):
                numeric.add(column)
                key = cell[1] if isinstance(cell[1], int | float) and math.isfinite(cell[1]) else -1
                cells.append(f"<td class=n data-v='{key:.6g}'>{escape(cell[0])}</td>")
            else:
                cells.append(f"<td>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th scope='col'{' class=n' if place in numeric else ''}>{escape(name)}</th>" for place, name in enumerate(columns))
    table = f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{chr(10).join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(what)}">{table}</div>'


def draw_details(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"
