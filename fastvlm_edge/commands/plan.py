"""`fastvlm-edge plan`: predict whether a model fits a board and how fast it will be, before anything is built."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm_edge.bench.plot import check_matplotlib
from fastvlm_edge.commands.arguments import given, given_path, image_sizes, positive
from fastvlm_edge.engines.memory import predicted_peak
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.rates import BOARDS, Board, Mode
from fastvlm_edge.machine.boards.targets import plan_board
from fastvlm_edge.model_dir.limits import DEFAULT_CONTEXT, IMAGE_SIZES, SIZES_IN_WORDS, check_context, check_image_size
from fastvlm_edge.model_dir.manifest import read_manifest, visual_tokens
from fastvlm_edge.planning.predict import MEDIAN_ERROR, SPREAD, Prediction, predict
from fastvlm_edge.planning.recommend import recommend
from fastvlm_edge.planning.workload import PRECISIONS, SIZES, Shape, shape_of, weight_bytes

DEFAULT_SIZE = 1024
CONTEXTS = (2048, 1024)
"""Contexts that are tried if nothing fits with the model's own."""
RESOLUTIONS = range(256, IMAGE_SIZES.stop, 128)


def main(arguments: Sequence[str]) -> int:
    """Print the predictions. Returns 1 if nothing fits."""
    command = parser()
    options = command.parse_args(arguments)
    shape, own_sizes, context = _subject(options.model)
    sizes, context = options.image_size or own_sizes, options.context or context
    for size in sizes:
        if size not in own_sizes:
            check_image_size(size, own_sizes[0], shape.name)
    check_context(context, shape.max_positions, max(sizes), shape.name)
    board = plan_board(options.target)
    mode = board.mode(options.power)
    precisions = [options.precision] if options.precision else [name for name in PRECISIONS if name != "bf16"]  # as fast as fp16
    smaller = [] if options.context else [positions for positions in CONTEXTS if positions < context]
    for positions in (context, *smaller):
        predictions = [predict_one(shape, board, mode, precision, sizes[0], positions, sizes[1:]) for precision in precisions]
        chosen, why = recommend(predictions)
        if chosen:
            break
    if chosen is None and options.precision:
        rest = [name for name in PRECISIONS if name != options.precision]
        others = [predict_one(shape, board, mode, name, sizes[0], context, sizes[1:]) for name in rest]
        instead = recommend(others)[0]
        if instead:
            why = f"{options.precision} does not fit; --precision {instead.precision} fits in {instead.run_bytes / 1e9:.1f} GB"
    if options.plot:
        draw(shape, chosen.precision if chosen else precisions[-1], options.plot)
    by_size = [predict_one(shape, board, mode, predictions[0].precision, size, predictions[0].context) for size in sizes]
    if options.json:
        print(json.dumps(_document(shape, board, mode, predictions, by_size, chosen, why)))
    else:
        print(_table(shape, board, mode, predictions, by_size))
        print(f"Recommended: {chosen.precision} at {sizes[0]} px, context {chosen.context}: {why}" if chosen else why)
    return 0 if chosen else 1


def predict_one(
    shape: Shape, board: Board, mode: Mode, precision: str, image_size: int, context: int, other_sizes: Sequence[int] = ()
) -> Prediction:
    """One row of the table. The build is that of the larger graph with TensorRT, as on a Jetson."""
    build = predicted_peak(int(max(weight_bytes(shape, PRECISIONS[precision], image_size).values())), "tensorrt")
    return predict(shape, board, mode, precision, image_size, context, build, other_sizes)


def _subject(model: str) -> tuple[Shape, list[int], int]:
    """Shape, image sizes (the default one first) and context of a model directory, or of a released size."""
    if model.lower() in SIZES:
        return SIZES[model.lower()], [DEFAULT_SIZE], DEFAULT_CONTEXT
    if not Path(model).is_dir():
        raise FastVLMError(
            f"{model} is neither a model directory nor a released size", f"give a model directory, or one of: {', '.join(SIZES)}"
        )
    manifest = read_manifest(Path(model))
    return shape_of(manifest), [manifest.vision.image_size, *manifest.vision.other_sizes], manifest.decoder.context


def _table(shape: Shape, board: Board, mode: Mode, predictions: list[Prediction], by_size: list[Prediction]) -> str:
    head = ("precision", "run GB", "build GB", "vision ms", "prefill ms", "first token ms", "tokens/s", "J/token")
    rows = [head]
    for each in predictions:
        rows.append(
            (
                each.precision,
                f"{each.run_bytes / 1e9:.1f}{'' if each.runs else ' (too large)'}",
                f"{each.build_bytes / 1e9:.1f}{'' if each.builds else ' (needs swap)'}",
                f"{each.vision_ms:.0f}",
                f"{each.prefill_ms:.0f}",
                _first_token(each),
                "{:.0f} ({:.0f} to {:.0f})".format(each.tokens_per_second, *each.tokens_per_second_range),
                f"{each.joules_per_token:.2f}",
            )
        )
    first = predictions[0]
    several = len(by_size) > 1
    sizes = [("image size px", "visual tokens", "vision ms", "prefill ms", "first token ms")]
    sizes += [
        (
            str(each.image_size),
            str(visual_tokens(each.image_size)),
            f"{each.vision_ms:.0f}",
            f"{each.prefill_ms:.0f}",
            _first_token(each),
        )
        for each in by_size
    ]
    lines = [
        f"{shape.name} on {board.title}, power mode {mode.name}: {first.image_size} px, context {first.context}, "
        f"{first.available_bytes / 1e9:.1f} GB of memory. A prediction, not yet run on hardware.",
        *_aligned(rows),
        *(["Memory is that of all image sizes; the times are those of the first:", *_aligned(sizes)] if several else []),
        "Ranges in parentheses cover 80 % of the models that were not in the fit (docs/plan.md). tokens/s assumes kernels like those of",
        "the programs in the fit, which were written by hand; its lower end assumes that TensorRT reads integer weights as FP16.",
    ]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _first_token(each: Prediction) -> str:
    return "{:.0f} ({:.0f} to {:.0f})".format(each.ttft_ms, *each.ttft_range_ms)


def _document(
    shape: Shape,
    board: Board,
    mode: Mode,
    predictions: list[Prediction],
    by_size: list[Prediction],
    chosen: Prediction | None,
    why: str,
) -> dict[str, Any]:
    derived = ("ttft_ms", "runs", "builds")
    ranges = ("ttft_range_ms", "tokens_per_second_range")
    rows = [
        {
            **asdict(each),
            **{name: getattr(each, name) for name in derived},
            **{name: [round(value, 1) for value in getattr(each, name)] for name in ranges},
        }
        for each in predictions
    ]
    rounded = [{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return {
        "prediction": True,
        "model": shape.name,
        "target": board.name,
        "power_mode": mode.name,
        "rows": rounded,
        "image_sizes": [
            {
                "image_size": each.image_size,
                "visual_tokens": visual_tokens(each.image_size),
                **{name: round(getattr(each, name), 3) for name in ("vision_ms", "prefill_ms", "ttft_ms")},
                "ttft_range_ms": [round(value, 1) for value in each.ttft_range_ms],
            }
            for each in by_size
        ],
        "recommended": {name: getattr(chosen, name) for name in ("precision", "image_size", "context")} if chosen else None,
        "reason": why,
        "median_error": MEDIAN_ERROR,
        "spread": SPREAD,
        "source_of_board": board.source,
    }


def draw(shape: Shape, precision: str, path: Path) -> None:
    """Draw time to first token against resolution, one line for each board in its fastest mode, into a PNG or SVG file."""
    check_matplotlib()
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for board in BOARDS.values():
        mode = board.modes[-1]
        times = [predict_one(shape, board, mode, precision, size, DEFAULT_CONTEXT).ttft_ms for size in RESOLUTIONS]
        axes.plot(list(RESOLUTIONS), times, marker="o", markersize=3, label=f"{board.title}, {mode.name}")
    axes.set(xlabel="image size, pixels", ylabel="time to first token, ms", ylim=(0, None), xticks=list(RESOLUTIONS)[::2])
    axes.set_title(f"FastVLM {shape.name}, {precision}: predicted, not yet run on hardware", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise FastVLMError(f"{path} could not be written ({error})", "give --plot a name that ends in .png or .svg") from None
    finally:
        plt.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge plan",
        description="Predict memory, time to first token, speed and energy of a model on a board, before anything is built (docs/plan.md).",
        epilog="targets and power modes:\n"
        + "".join(f"  {board.name:10}{board.title}: {', '.join(mode.name for mode in board.modes)}\n" for board in BOARDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=given, help=f"model directory, or a released size: {', '.join(SIZES)}")
    parser.add_argument("--target", metavar="NAME", required=True, help="the board, see below")
    parser.add_argument("--power", metavar="MODE", help="power mode (default: the fastest)")
    parser.add_argument("--precision", choices=PRECISIONS, help="predict only this one (default: all, with a recommendation)")
    parser.add_argument(
        "--image-size", metavar="PX[,PX]", type=image_sizes, help=f"{SIZES_IN_WORDS} (default: those of the model); times are for the first"
    )
    parser.add_argument("--context", metavar="N", type=positive, help="positions of the KV cache (default: those of the model)")
    parser.add_argument(
        "--plot", metavar="FILE", type=given_path, help="draw time to first token against resolution for all boards (PNG or SVG)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser
