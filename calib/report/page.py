"""`quantization.html` from a `QuantizationReport`.

The page is one file that loads nothing and works without JavaScript. Horizontal coordinates of its SVG are percentages and vertical ones
pixels, so that pictures shrink to a phone while their text keeps its size. Every text from outside goes through `escape`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastvlm_edge.calib.report.document import (
    JSON_NAME,
    Decision,
    DecoderReport,
    GroupReport,
    LayerReport,
    MatrixReport,
    QuantizationReport,
    VisionReport,
)
from fastvlm_edge.calib.report.drawing import (
    Mark,
    amount,
    draw_chart,
    draw_details,
    draw_key,
    draw_stack,
    draw_table,
    escape,
    figure,
    percent,
)


def _figures(evaluation: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Figures as (name, before, after); before is None for a single figure."""
    for key, value in evaluation.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        stem = key.removesuffix("_before")
        if stem != key and f"{stem}_after" in evaluation:
            yield name.removesuffix(" before"), value, evaluation[f"{stem}_after"]
        elif key.endswith("_after") and f"{key.removesuffix('_after')}_before" in evaluation:
            continue
        elif isinstance(value, dict) and {"before", "after"} <= set(value):
            yield name, value["before"], value["after"]
        elif isinstance(value, dict):
            yield from _figures(value, f"{name}, ")
        else:
            yield name, None, value


def _pair(document: QuantizationReport) -> tuple[str, str, str] | None:
    """The first figure that has a before and an after; shares of questions as percentages."""
    for name, before, after in _figures(document.evaluation):
        if isinstance(before, int | float) and isinstance(after, int | float):
            if 0 <= before <= 1 and 0 <= after <= 1:
                return name, percent(before), percent(after)
            return name, figure(before), figure(after)
    return None


# Sections -------------------------------------------------------------------------------------------------------------------------

_DECISIONS: dict[Decision, tuple[str, str, str]] = {
    "int8": ("int8", "INT8", "compute in INT8"),
    "int8 weights": ("weights", "INT8 weights, computed in floats", "have INT8 weights and compute in floats"),
    "wide": ("wide", "floats", "stay in floats"),
}
"""Decision -> colour, text in a key, verb for some layers."""
_PARTS = {"vision": "encoder", "decoder": "decoder"}
_ONCE = {"vision": ", per picture", "decoder": ", per token"}
_NAMED = 50
"""Skipped examples that the page lists; there may be thousands."""


def _layers(vision: VisionReport) -> list[tuple[GroupReport, LayerReport]]:
    return [(group, layer) for group in vision.groups for layer in group.layers]


def _count(things: Sequence[Any], noun: str, plural: str = "") -> str:
    return f"{len(things):,} {noun if len(things) == 1 else plural or noun + 's'}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 120:
        return f"{figure(seconds)} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _tiles(document: QuantizationReport) -> str:
    tiles = []
    macs = document.placement.get("vision", {})
    if document.vision and sum(macs.values()):
        tiles.append((percent(macs.get("INT8", 0) / sum(macs.values())), "of the encoder's multiply-accumulates in INT8"))
    if document.vision:
        tiles.append((figure(document.vision.measured_cosine), "cosine between the image features and those of the floating-point encoder"))
    if pair := _pair(document):
        tiles.append((pair[2], f"{pair[0]}; {pair[1]} before"))
    if document.bytes:
        tiles.append((amount(sum(document.bytes.values()), "B"), "in all files"))
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(text)}</dt></div>" for value, text in tiles)
    return f'<dl class="tiles">{cells}</dl>' if tiles else ""


def _summary(document: QuantizationReport) -> str:
    data, evaluation = document.calibration, document.evaluation
    text = f"Calibration used {_count(range(data.used), 'example')} from {data.source} and took {_duration(data.seconds)}."
    if data.skipped:
        text += f" {len(data.skipped):,} more could not be used; the end of this page lists them."
    if document.accuracy_drop is not None:
        text += f" The accepted loss of accuracy was {document.accuracy_drop:g} percentage points."
    if isinstance(evaluation.get("points_lost"), int | float):
        text += f" By the arithmetic of a GPU, the measured loss is {figure(evaluation['points_lost'])} percentage points."
    if isinstance(evaluation.get("cpu_points_lost"), int | float):
        text += f" On the CPU of the conversion, it is {figure(evaluation['cpu_points_lost'])}."
    if pair := _pair(document):
        text += f" {pair[0][:1].upper()}{pair[0][1:]} was {pair[1]} before quantisation and is {pair[2]} after it."
    about_vision = "The encoder was not calibrated; the precision plan alone gives its types."
    about_decoder, reasons = "The decoder was not calibrated.", ""
    if document.vision:
        about_vision, reasons = _about_vision(document.vision), _why(document.vision)
    if document.decoder:
        matrices = document.decoder.matrices
        better = sorted(each.error / each.error_rounded for each in matrices if each.error_rounded > 0 and each.error >= 0)
        about_decoder = f"{_count(matrices, 'matrix', 'matrices')} of the decoder were quantised with {document.decoder.method}."
        if better:
            median = percent(better[len(better) // 2])
            about_decoder += f" The median error of their outputs is {median} of the error of rounding to nearest."
    return "".join(f"<p>{escape(each)}</p>" for each in (text, about_vision, about_decoder)) + reasons


def _about_vision(vision: VisionReport) -> str:
    layers = [layer for _, layer in _layers(vision)]
    counts = []
    for decision, (_, _, what) in _DECISIONS.items():
        if chosen := [layer for layer in layers if layer.decision == decision]:
            counts.append(f"{len(chosen)} ({_work(chosen, layers)}) {what}")
    text = f"Of the {len(layers)} layers of the encoder, {', '.join(counts)}. " if counts else ""
    text += f"The cosine between the image features and those of the floating-point encoder is {figure(vision.measured_cosine)}"
    text += f"; the bound on 1 - cosine was {figure(vision.bound)}." if vision.bound is not None else "."
    return f"{text} The relative squared error is {figure(vision.measured_relative)} (predicted: {figure(vision.predicted)})."


def _why(vision: VisionReport) -> str:
    layers = [layer for _, layer in _layers(vision)]
    reasons: dict[tuple[Decision, str], list[LayerReport]] = {}
    for layer in layers:
        if layer.decision != "int8":
            reasons.setdefault((layer.decision, layer.reason), []).append(layer)
    items = [
        f'<li><i class="{_DECISIONS[decision][0]}"></i>{_count(chosen, "layer")}, {_work(chosen, layers)}: {escape(reason)}</li>'
        for (decision, reason), chosen in sorted(reasons.items(), key=lambda item: -sum(layer.macs for layer in item[1]))
    ]
    return f'<p>Why some layers do not compute in INT8:</p><ul class="why">{"".join(items)}</ul>' if items else ""


def _work(some: Sequence[LayerReport], layers: Sequence[LayerReport]) -> str:
    return f"{percent(sum(layer.macs for layer in some) / (sum(layer.macs for layer in layers) or 1))} of the work"


def _shares(document: QuantizationReport) -> str:
    bars = [
        draw_stack(f"Computation, {_PARTS.get(part, part)}{_ONCE.get(part, '')}", macs, " MACs")
        for part, macs in document.placement.items()
    ]
    stored: dict[str, dict[str, float]] = {}
    for _, layer in _layers(document.vision) if document.vision else ():
        _add(stored, "vision", "floats" if layer.decision == "wide" else "INT8", layer.weight_bytes)
    for matrix in document.decoder.matrices if document.decoder else ():
        _add(stored, "decoder", f"INT{matrix.bits}", matrix.bytes)
    for part, kinds in stored.items():
        rest = sum(size for name, size in document.bytes.items() if name.startswith(part)) - sum(kinds.values())
        if rest > 0:
            _add(stored, part, "embedding, scales, norms, graph" if part == "decoder" else "scales, biases, graph", rest)
        bars.append(draw_stack(f"Storage, {_PARTS[part]}", kinds, "B"))
    files = draw_table("sizes of files", ("file", "bytes"), [(name, (f"{size:,}", size)) for name, size in document.bytes.items()])
    text = "Multiply-accumulates (MACs) by the type of the computation, and bytes by the type in storage."
    return f"<p>{text}</p>" + "".join(bars) + (draw_details("Files", files) if document.bytes else "")


def _add(sums: dict[str, dict[str, float]], part: str, kind: str, value: float) -> None:
    kinds = sums.setdefault(part, {})
    kinds[kind] = kinds.get(kind, 0) + value


def _sensitivity(vision: VisionReport) -> str:
    tried = [group for group in vision.groups if group.cosine_loss > 0]
    marks = []
    for group in tried:
        colour, decision, _ = _DECISIONS[group.decision]
        marks.append(Mark(group.stage, group.cosine_loss, colour, f"{group.name}: {figure(group.cosine_loss)}, {decision}"))
    text = "Loss of the image features (1 - cosine) when only one group of layers is INT8, in the order of the network. The losses add up"
    text += "; the line is the limit for their sum." if vision.bound is not None else "."
    if len(tried) < len(vision.groups):
        text += f" Left out: {_count(vision.groups[len(tried) :], 'group')} without a loss, or not tried."
    what = f"Loss of each of {len(tried)} groups on a logarithmic scale; the table below has the figures"
    limit = "" if vision.bound is None else f"bound for the whole plan, {figure(vision.bound)}"
    columns = ("group", "stage", "kind", "MACs", "weights", "1 - cosine", "relative error", "decision", "reason")
    rows = [
        (each.name, each.stage, each.kind, *_sizes(each), _number(each.cosine_loss), _number(each.relative_error), *_decided(each))
        for each in vision.groups
    ]
    table = draw_details(f"All {_count(vision.groups, 'group')}", draw_table("groups", columns, rows))
    return f"<p>{escape(text)}</p>{_decisions_key(marks)}{draw_chart(marks, what, vision.bound, limit)}{table}"


def _ranges(vision: VisionReport) -> str:
    marks = []
    for group, layer in _layers(vision):
        if layer.observed_max is not None:
            colour, decision, _ = _DECISIONS[layer.decision]
            clip = "not clipped" if layer.clip is None else f"clipped at {figure(layer.clip)}"
            title = f"{layer.name}: up to {figure(layer.observed_max)}, {clip}, {decision}"
            marks.append(Mark(group.stage, layer.observed_max, colour, title, layer.observed_max if layer.clip is None else layer.clip))
    text = "The largest observed input of each layer (ring), and the clip value, at which INT8 ends or would end (dot), chosen by "
    text += f"{_observer(vision)}. A long line is a layer with outliers: clipping them gives all other values finer steps."
    what = f"Observed maximum and clip value of {_count(marks, 'layer')} on a logarithmic scale; the table of layers has the figures"
    return f"<p>{escape(text)}</p>{_decisions_key(marks)}{draw_chart(marks, what)}"


def _observer(vision: VisionReport) -> str:
    return "the least mean squared error" if vision.observer == "mse" else vision.observer


def _decisions_key(marks: Sequence[Mark]) -> str:
    used = {mark.colour for mark in marks}
    return draw_key((colour, text) for colour, text, _ in _DECISIONS.values() if colour in used)


def _number(value: float | None) -> tuple[str, float | None]:
    return figure(value), value


def _sizes(part: GroupReport | LayerReport) -> tuple[tuple[str, int], tuple[str, int]]:
    return (amount(part.macs), part.macs), (amount(part.weight_bytes, "B"), part.weight_bytes)


def _decided(part: GroupReport | LayerReport) -> tuple[str, str]:
    return part.decision.replace("int8", "INT8").replace("wide", "floats"), part.reason


def _decoder(decoder: DecoderReport) -> str:
    kinds: dict[str, list[MatrixReport]] = {}
    for matrix in decoder.matrices:
        match = re.search(r"(?:^|\.)\d+\.(.+)$", matrix.name)
        kinds.setdefault(match.group(1) if match else matrix.name.rpartition(".")[2], []).append(matrix)
    marks = []
    for kind, matrices in kinds.items():
        for matrix in matrices:
            colour = "wide" if matrix.error > matrix.error_rounded else f"int{matrix.bits}"
            title = f"{matrix.name}, INT{matrix.bits}: {figure(matrix.error_rounded)} rounded, {figure(matrix.error)} chosen"
            marks.append(Mark(kind, matrix.error_rounded, colour, title, matrix.error))
    text = "Relative error of the outputs of each matrix, with weights rounded to nearest (ring) and as chosen with "
    text += f"{decoder.method} (dot). Matrices of one kind are side by side, from the first layer to the last."
    entries = {mark.colour: "worse than rounded" if mark.colour == "wide" else mark.colour.upper() for mark in marks}
    columns = ("matrix", "bits", "block", "bytes", "error rounded", "error chosen", "chosen / rounded")
    rows = [
        (each.name, *stored, _number(each.error_rounded), _number(each.error), (percent(ratio), ratio))
        for each in decoder.matrices
        for stored in [(_number(each.bits), (str(each.block or "channel"), each.block), (amount(each.bytes, "B"), each.bytes))]
        for ratio in [each.error / each.error_rounded if each.error_rounded else math.nan]
    ]
    what = f"Error of {_count(marks, 'matrix', 'matrices')}, rounded and chosen; the table below has the figures"
    table = draw_details(f"All {_count(decoder.matrices, 'matrix', 'matrices')}", draw_table("matrices", columns, rows))
    return f"<p>{escape(text)}</p>{draw_key(sorted(entries.items()))}{draw_chart(marks, what)}{table}"


def _layer_table(vision: VisionReport) -> str:
    columns = ("layer", "stage", "kind", "MACs", "weights", "largest input", "clip", "decision", "reason")
    rows = [
        (each.name, group.stage, each.kind, *_sizes(each), _number(each.observed_max), _number(each.clip), *_decided(each))
        for group, each in _layers(vision)
    ]
    return draw_table("layers of the encoder", columns, rows)


def _fallbacks(fallbacks: Sequence[Mapping[str, Any]]) -> str:
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for each in fallbacks:
        reasons.setdefault(str(each.get("reason", "")), []).append(each)
    parts = []
    for reason, nodes in sorted(reasons.items(), key=lambda item: -sum(node.get("macs", 0) for node in item[1])):
        macs = sum(node.get("macs", 0) for node in nodes)
        names = "".join(f"<li><code>{escape(node.get('node', ''))}</code> {escape(node.get('op', ''))}</li>" for node in nodes)
        work = f", {amount(macs)} MACs" if macs else ""
        parts.append(draw_details(f"{reason} ({_count(nodes, 'node')}{work})", f'<ul class="names">{names}</ul>'))
    return "<p>Nodes that the graph does not ask TensorRT to compute in INT8, by reason.</p>" + "".join(parts)


def _evaluation(document: QuantizationReport) -> str:
    rows = [
        (name, *((figure(value), value if isinstance(value, int | float) else None) for value in (before, after)))
        for name, before, after in _figures(document.evaluation)
    ]
    return draw_table("measurements", ("figure", "before", "after"), rows)


def _reproduce(document: QuantizationReport) -> str:
    data = document.calibration
    command = f"fastvlm-edge convert CHECKPOINT -o MODEL --precision {document.precision} --calib {shlex.quote(data.source)}"
    if document.accuracy_drop is not None:
        command += f" --accuracy-drop {document.accuracy_drop:g}"
    facts = {
        "model": document.model,
        "precision": document.precision,
        "data": f"{data.source}: {data.used:,} used, {len(data.skipped):,} skipped",
        "clip values": _observer(document.vision) if document.vision else "–",
        "decoder": document.decoder.method if document.decoder else "–",
        "fastvlm-edge": document.toolkit_version,
        "date": document.date,
    }
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    skipped = [f"<li>{escape(each)}</li>" for each in data.skipped[:_NAMED]]
    if len(data.skipped) > _NAMED:
        skipped.append(f"<li>and {len(data.skipped) - _NAMED:,} more; {JSON_NAME} lists all of them</li>")
    lost = draw_details(f"{_count(data.skipped, 'example')} that could not be used", f'<ul class="names">{"".join(skipped)}</ul>')
    return f'<pre tabindex="0"><code>{escape(command)}</code></pre><dl class="facts">{rows}</dl>{lost if skipped else ""}'


def render(document: QuantizationReport) -> str:
    """The whole page."""
    vision, decoder = document.vision, document.decoder
    sections = [("Summary", _tiles(document) + _summary(document)), ("Shares of work and bytes", _shares(document))]
    if vision:
        sections += [("Sensitivity of the encoder", _sensitivity(vision)), ("Ranges of the encoder", _ranges(vision))]
    if decoder:
        sections.append(("Error of the decoder", _decoder(decoder)))
    if document.evaluation:
        sections.append(("Measurements", _evaluation(document)))
    if vision:
        sections.append(("Layers of the encoder", _layer_table(vision)))
    if document.fallbacks:
        sections.append(("Not computed in INT8", _fallbacks(document.fallbacks)))
    sections.append(("How to reproduce", _reproduce(document)))
    body = "\n".join(f"<section><h2>{title}</h2>{inside}</section>" for title, inside in sections if inside)
    title = escape(f"{document.model}: {document.precision} quantisation")
    parts = {"style": _STYLE, "script": _SCRIPT, "title": title, "body": body}
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], _TEMPLATE)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

# The colours of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any colour vision can distinguish.
_STYLE = """
:root { --text: #1c2024; --soft: #5b6570; --page: #fff; --card: #f4f6f8; --line: #d5dae0; --band: #f4f6f8; --limit: #b3261e;
  --int8: #0072b2; --weights: #56b4e9; --int4: #009e73; --fp16: #e69f00; --fp32: #d55e00; --rest: #9aa3ad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #9ba6b2; --page: #14181c; --card: #1e242a; --line: #39424b; --band: #1b2026; --limit: #ff8a80;
    --int8: #3d9fdc; --weights: #9bd3f5; --int4: #22b98d; --fp16: #efb12e; --fp32: #ee7a33; --rest: #7b8691; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
code, pre, tbody th { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); padding: .75rem; border-radius: .4rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; }
figcaption b { color: var(--soft); font-weight: 400; float: right; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tiles div { flex: 1 1 9.5rem; max-width: 20rem; background: var(--card); border-radius: .5rem; padding: .75rem .9rem; }
.tiles div { display: flex; flex-direction: column; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; overflow-wrap: anywhere; }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.facts div { display: flex; gap: 1rem; }
.facts dt { flex: 0 0 7rem; color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.key, .why, .names { list-style: none; padding: 0; margin: .4rem 0; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; font-size: .85rem; color: var(--soft); }
.why li { padding-left: 1.2rem; text-indent: -1.2rem; margin: .2rem 0; max-width: 46rem; }
.names { font-size: .8rem; columns: 22rem; overflow-wrap: anywhere; }
i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .45rem; background: currentColor; }
svg { display: block; overflow: visible; }
.stack { width: 100%; margin-top: .25rem; }
.stack rect { fill: currentColor; stroke: var(--page); stroke-width: 1; }
.int8 { color: var(--int8); } .weights { color: var(--weights); } .int4 { color: var(--int4); } .fp16 { color: var(--fp16); }
.fp32, .wide { color: var(--fp32); } .rest { color: var(--rest); }
.plot { padding: .5rem 0 0 3.2rem; }
.chart { width: 100%; }
.chart text { font-size: 12px; fill: var(--soft); }
.band { fill: var(--band); }
.grid { stroke: var(--line); stroke-width: 1; }
.hit { fill: transparent; }
.m > rect:not(.hit), .m > circle { fill: currentColor; }
.m > line { stroke: currentColor; stroke-width: 1.5; opacity: .55; }
.m > circle.from { fill: var(--page); stroke: currentColor; stroke-width: 1.5; }
.m:hover .hit { fill: var(--soft); opacity: .25; }
line.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
.chart text.limit { fill: var(--limit); paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.tip { font-size: .85rem; color: var(--soft); min-height: 1.3em; margin: .2rem 0; max-width: none; }
.note { color: var(--soft); }
details { margin: .4rem 0; }
summary { cursor: pointer; padding: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody th { font-weight: 400; font-size: .78rem; white-space: nowrap; }
tbody tr:hover { background: var(--card); }
td { min-width: 4.5rem; }
td:last-child:not(.n) { min-width: 14rem; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; background: var(--card); white-space: nowrap; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--int8); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
@media (max-width: 40rem) { td:last-child:not(.n) { white-space: nowrap; } }
@media print { .scroll { max-height: none; overflow: visible; } .tip { display: none; } }
"""

# Column headings become buttons that sort. The text of the mark under the pointer is shown below its picture.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const compare = (a, b) => a.dataset.v !== undefined && b.dataset.v !== undefined ? a.dataset.v - b.dataset.v
        : a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column])));
    });
  });
}
for (const mark of document.querySelectorAll(".m")) {
  mark.addEventListener("pointerenter", () => {
    mark.closest(".plot").nextElementSibling.textContent = mark.querySelector("title").textContent;
  });
}
"""
