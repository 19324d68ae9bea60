"""Draw records, as PNG and SVG. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastvlm_edge.bench.record import DECODE
from fastvlm_edge.bench.table import number
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.model_dir.atomic import whole_file

FORMATS = ("png", "svg")
DRAWINGS = ("ttft", "decode", "slots", "accuracy")
PARTS = (
    ("preprocess_ms", "preprocess", "#9aa7b4"),
    ("vision_ms", "vision", "#2f6f9f"),
    ("prefill_ms", "prefill", "#e08a3c"),
    ("first_sample_ms", "first sample", "#7c4d8b"),
)
WARM_PARTS = (("warm_prefill_ms", "prefill"), ("warm_first_sample_ms", "first sample"))
_SIZE = (7.0, 4.2)


def check_matplotlib() -> None:
    """Raise FastVLMError if matplotlib is not installed or broken, before minutes are spent on measurements."""
    with package_errors("--plot needs"):
        import matplotlib  # noqa: F401


def plot_files(prefix: Path, drawings: Sequence[str] = DRAWINGS) -> list[Path]:
    """The files that `draw` may write. Raises FastVLMError if the prefix has no name, such as `.`."""
    if not prefix.name:
        raise FastVLMError(f"--plot {prefix} is a directory", f"add a beginning for the names of the files: --plot {prefix / 'bench'}")
    return [prefix.with_name(f"{prefix.name}-{name}.{kind}") for name in drawings for kind in FORMATS]


def draw(prefix: Path, records: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write PREFIX-ttft, PREFIX-decode, PREFIX-slots if that was measured, and with results of `fastvlm-edge eval` PREFIX-accuracy.

    Returns the paths.

    Raises FastVLMError if matplotlib is missing, the disk is full, or an evaluation belongs to none of the measured models.
    """
    written: list[Path] = []
    if any("ttft_cold_ms" in record for record in records):
        written += save_figure(prefix, "ttft", lambda figure: draw_ttft(figure, [record for record in records if "ttft_cold_ms" in record]))
    if any("decode_by_depth" in record for record in records):
        written += save_figure(
            prefix, "decode", lambda figure: draw_decode(figure, [each for each in records if "decode_by_depth" in each])
        )
    if any("by_slots" in record for record in records):
        written += save_figure(prefix, "slots", lambda figure: draw_slots(figure, [each for each in records if "by_slots" in each]))
    if evaluations:
        points = accuracy_points(records, evaluations)
        written += save_figure(prefix, "accuracy", lambda figure: draw_accuracy(figure, points))
    return written


def draw_ttft(figure: Any, records: Sequence[dict[str, Any]]) -> None:
    """Draw time to first token by resolution, as stacked parts, and beside it a bar for a picture that is in the cache."""
    axes = figure.add_subplot()
    ordered = sorted(records, key=lambda record: (record["model"]["image_size"], record["model"]["precision"]))
    several = len({record["model"]["precision"] for record in ordered}) > 1
    for at, record in enumerate(ordered):
        bottom = 0.0
        for name, label, colour in PARTS:
            height = record[name]["median"]
            axes.bar(at - 0.19, height, 0.36, bottom=bottom, color=colour, label=label if at == 0 else None)
            bottom += height
        cold = record["ttft_cold_ms"]
        reach = [[max(0.0, cold["median"] - cold["min"])], [max(0.0, cold["max"] - cold["median"])]]
        axes.errorbar(at - 0.19, cold["median"], yerr=reach, color="black", capsize=3, linewidth=1)
        axes.annotate(number(cold["median"]), (at - 0.19, cold["max"]), ha="center", va="bottom", fontsize=8)
        bottom = 0.0
        colours = {label: colour for _, label, colour in PARTS}
        for name, label in WARM_PARTS:
            if name in record:
                axes.bar(at + 0.19, record[name]["median"], 0.36, bottom=bottom, color=colours[label], alpha=0.55)
                bottom += record[name]["median"]
        if bottom:
            axes.annotate(f"{number(record['ttft_warm_ms']['median'])}\nwarm", (at + 0.19, bottom), ha="center", va="bottom", fontsize=8)
    names = [f"{record['model']['image_size']}" + (f"\n{record['model']['precision']}" if several else "") for record in ordered]
    axes.set_xticks(range(len(ordered)), names)
    axes.set_xlabel("image size, pixels")
    axes.set_ylabel("time to first token, ms")
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, records)


def draw_decode(figure: Any, records: Sequence[dict[str, Any]]) -> None:
    """Draw decoded tokens/s by depth of context; bars go from minimum to maximum."""
    axes = figure.add_subplot()
    for record in records:
        entries = record["decode_by_depth"]
        speeds = [entry["tokens_per_second"] for entry in entries]
        medians = [speed["median"] for speed in speeds]
        reach = [[max(0.0, s["median"] - s["min"]) for s in speeds], [max(0.0, s["max"] - s["median"]) for s in speeds]]
        axes.errorbar([entry["depth"] for entry in entries], medians, yerr=reach, marker="o", capsize=3, label=_label(record))
    axes.set_xlabel("positions in the context")
    axes.set_ylabel("decoded tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, records)


def draw_slots(figure: Any, records: Sequence[dict[str, Any]]) -> None:
    """Draw decoded tokens/s by the number of conversations at once: of all together, and dashed of each."""
    axes = figure.add_subplot()
    for record in records:
        entries = [entry for entry in record["by_slots"] if "tokens_per_second_each" in entry]
        numbers = [entry["slots"] for entry in entries]
        (line,) = axes.plot(numbers, [entry["tokens_per_second"]["median"] for entry in entries], marker="o", label=_label(record))
        each = [entry["tokens_per_second_each"]["median"] for entry in entries]
        axes.plot(numbers, each, "--", marker="o", color=line.get_color(), label="each conversation")
    axes.set_xlabel("conversations at once")
    axes.set_ylabel("decoded tokens/s")
    axes.set_xticks(sorted({entry["slots"] for record in records for entry in record["by_slots"]}))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, records)


def _label(record: dict[str, Any]) -> str:
    model = record["model"]
    return f"{model['precision']}, {model['image_size']} px, {record.get('backend', '')}"


def accuracy_points(records: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each evaluation its accuracy, and the speeds of the record with the same model directory, or else the same precision.

    Raises FastVLMError for an evaluation without such a record.
    """
    points = []
    for evaluation in evaluations:
        same = [each for each in records if each["model"]["directory"] == evaluation.get("model")]
        same = same or [each for each in records if each["model"]["precision"] == evaluation.get("precision")]
        if evaluation.get("exact_match") is None or not same or DECODE not in same[0] or "ttft_cold_ms" not in same[0]:
            raise FastVLMError(
                f"the evaluation of {evaluation.get('model')} ({evaluation.get('precision')}) belongs to none of the measured models",
                "give --eval the output of fastvlm-edge eval --json for one of them",
            )
        points.append(
            {
                "precision": evaluation["precision"],
                "accuracy": 100 * evaluation["exact_match"],
                "ttft_ms": same[0]["ttft_cold_ms"]["median"],
                "tokens_per_second": same[0][DECODE]["median"],
                "questions": evaluation.get("count"),
            }
        )
    return points


def draw_accuracy(figure: Any, points: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy against both speeds, with one dot for each precision."""
    figure.set_size_inches(9.0, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("ttft_ms", "tokens_per_second"), ("time to first token, ms", "decoded tokens/s"), strict=True):
        for place, point in enumerate(sorted(points, key=itemgetter(key))):
            axes.plot(point[key], point["accuracy"], "o", color="#2f6f9f")
            side = (6, 4) if place % 2 else (6, -12)  # neighbouring dots may overlap
            axes.annotate(point["precision"], (point[key], point["accuracy"]), textcoords="offset points", xytext=side, fontsize=9)
        axes.set_xlabel(label)
        axes.margins(0.2)
        axes.grid(alpha=0.3)
    values = [point["accuracy"] for point in points]
    margin = max(1.0, 0.2 * (max(values) - min(values)))  # a difference of a few answers must not look like a cliff
    panels[0].set_ylim(min(values) - margin, min(max(values) + margin, 100.1))
    panels[0].set_ylabel("exact match, %")
    counts = {point["questions"] for point in points}
    figure.suptitle(f"{', '.join(map(str, sorted(filter(None, counts))))} questions", fontsize=9)


def _finish(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    machine = records[0]["machine"]
    threads = records[0]["settings"]["threads"]
    where = machine.get("gpu", {}).get("name") or machine.get("board") or machine["cpu"]
    axes.set_title(f"{where}, {threads or machine['cores']} threads, {machine['date']}", fontsize=9)


def save_figure(prefix: Path, name: str, paint: Callable[[Any], None]) -> list[Path]:
    """Write the figure that `paint` draws to PREFIX-name.png and .svg. Returns the paths.

    Raises FastVLMError if matplotlib is missing, or a file cannot be written.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context({"svg.hashsalt": "fastvlm-edge", "svg.fonttype": "none"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        paint(figure)
        for path, kind in zip(plot_files(prefix, [name]), FORMATS, strict=True):
            try:
                with whole_file(path) as partial:
                    figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
            except OSError as error:
                raise FastVLMError(f"{path} cannot be written ({error.strerror})", "give --plot another prefix") from None
            written.append(path)
    return written
