"""Draw the comparison of image sizes: accuracy against the time to the first token, and accuracy by kind of question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_edge.bench.plot import save_figure

SIZE_COLOUR, CASCADE_COLOUR = "#2f6f9f", "#e08a3c"


def draw_sizes(prefix: Path, report: dict[str, Any]) -> list[Path]:
    """Write PREFIX-sizes.png and .svg from a report of `SizeComparison`. Returns the paths; errors as those of `bench.plot.draw`."""
    return save_figure(prefix, "sizes", lambda figure: paint_sizes(figure, report))


def paint_sizes(figure: Any, report: dict[str, Any]) -> None:
    """Paint both panels; the second one only if the questions have kinds."""
    by_kind = report["by_kind"]
    if by_kind:
        figure.set_size_inches(10.5, 4.2)
    left, *right = figure.subplots(1, 2 if by_kind else 1, squeeze=False)[0]
    for title, found, colour in ways(report):
        first = found["first_token_ms"]
        left.plot([first["mean"], first["p95"]], [100 * found["accuracy"]] * 2, "-", color=colour, alpha=0.4)
        left.plot(first["mean"], 100 * found["accuracy"], "o", color=colour)
        left.plot(first["p95"], 100 * found["accuracy"], "|", color=colour)
        beside = (4, -13) if title == "auto" else (4, 5)  # it may be at the same place as a size
        left.annotate(title, (first["mean"], 100 * found["accuracy"]), textcoords="offset points", xytext=beside, fontsize=9)
    left.set_xlabel("first token, ms: mean, and 95th percentile at the end of the line")
    left.set_ylabel(f"{report['metric'].replace('_', ' ')}, %")
    left.margins(0.12)
    left.grid(alpha=0.3)
    for axes in right:
        _paint_kinds(axes, by_kind)
    figure.suptitle(f"{report['name']}, {report['precision']}, {report['runs_on']}; {report['count']:,} questions", fontsize=9)


def ways(found: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Title, figures and colour of each size, and of the cascade if there is one."""
    sizes = [(f"{size} px", figures, SIZE_COLOUR) for size, figures in found["sizes"].items()]
    return sizes if found["cascade"] is None else [*sizes, ("auto", found["cascade"], CASCADE_COLOUR)]


def _paint_kinds(axes: Any, by_kind: dict[str, Any]) -> None:
    count = len(ways(next(iter(by_kind.values()))))
    width = 0.8 / count
    for at, kind in enumerate(by_kind):
        for number, (title, found, colour) in enumerate(ways(by_kind[kind])):
            place, shade = at - 0.4 + (number + 0.5) * width, 0.35 + 0.65 * (number + 1) / count
            label = title if at == 0 else None
            axes.bar(place, 100 * found["accuracy"], width, color=colour, alpha=shade, label=label)
    axes.set_xticks(range(len(by_kind)), by_kind, rotation=30, fontsize=8)
    lowest = min(100 * found["accuracy"] for kind in by_kind.values() for _, found, _ in ways(kind))
    axes.set_ylim(bottom=max(0.0, lowest - 5))
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    axes.grid(axis="y", alpha=0.3)
