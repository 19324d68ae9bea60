"""The tables of README and docs, made from the recorded results: `python -m benchmarks.tables` writes them between their markers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A recorded result."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def speed() -> str:
    """`cpu.json` as a table of medians."""
    document = load("cpu")
    machine = document["machine"]
    lines = [
        f"{machine['cpu']}, {document['threads']} threads, {machine['date']}, onnxruntime {machine['versions']['onnxruntime']}, "
        f"torch {machine['versions']['torch']}, transformers {machine['versions']['transformers']}:",
        "",
        "| | first token ms | preprocess | vision | prefill | decode tokens/s | peak MiB | load ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fields = ("ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_tokens_per_second", "peak_memory_mib", "load_ms")
    for name, figures in document["results"].items():
        cells = [figures[field]["median"] for field in fields]
        lines.append(
            f"| {name.replace(':', ' ')} | " + " | ".join(f"{cell:.0f}" if cell >= 100 else f"{cell:.1f}" for cell in cells) + " |"
        )
    return "\n".join(lines)


def llama() -> str:
    """`llama_cpp.json` as a sentence."""
    results = load("llama_cpp")["results"]
    ours, theirs = results["fastvlm-edge"], results["llama.cpp"]
    decode, prefill = "decode_tokens_per_second", "prefill_ms"
    return (
        f"decode {ours[decode]['median']} tokens/s ({ours[decode]['min']} to {ours[decode]['max']}) against {theirs[decode]['median']} "
        f"({theirs[decode]['min']} to {theirs[decode]['max']}),\nprefill of 290 tokens {ours[prefill]['median']} ms against "
        f"{theirs[prefill]['median']}."
    )


def accuracy() -> str:
    """`demo_accuracy.json` as a table of percent."""
    results = load("demo_accuracy")["results"]
    lines = ["| | " + " | ".join(results) + " |", "| --- " * (len(results) + 1) + "|"]
    for kind in next(iter(results.values()))["scores"]:
        cells = " | ".join(f"{100 * result['scores'][kind]['exact_match']:.1f}" for result in results.values())
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines)


def where() -> str:
    """Operators of `cpu.json` as a table of milliseconds, with the machine's measured limits."""
    document = load("cpu")
    limits = document["limits"]
    lines = [
        f"Limits measured in the same run: {limits['matmul_gflops']} GFLOP/s in FP32 products, {limits['read_gb_per_second']} GB/s read.",
        "",
        "| | ms | of them |",
        "| --- | --- | --- |",
    ]
    for what, operators in document["where_the_time_goes"].items():
        parts = ", ".join(f"{name} {value}" for name, value in operators.items() if name not in ("all", "other"))
        lines.append(f"| {what} | {operators['all']} | {parts} |")
    return "\n".join(lines)


def profiles() -> str:
    """The decoder's rows of `engine_builds.json`: megabytes of engine and of activations by layout of the profiles."""
    rows = {
        (row["precision"], row["layout"]): row
        for row in load("engine_builds")["results"]
        if row["group"] == "layout" and row["engine_bytes"] and not row["flags"]
    }

    def cell(precision: str, layout: str) -> str:
        row = rows[precision, layout]
        return f"{row['engine_bytes'] / 1e6:,.0f} / {row['activation_bytes'] / 1e6:,.0f}"

    lines = [
        "| engine MB / activation MB | one profile | two profiles | prefill alone | decoding alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for precision in ("int4", "int8", "fp16"):
        cells = [cell(precision, layout) for layout in ("one profile", "two profiles", "prefill alone", "decode alone")]
        lines.append(f"| `{precision}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tensorrt_types() -> str:
    """`tensorrt_types.json` as a table."""
    from benchmarks.tensorrt_types import table

    return table()


def quantization() -> str:
    """`quantization.json` as a table: one row a contender."""
    results = load("quantization")["results"]
    kinds = list(next(iter(results.values()))["by_kind"])
    lines = [
        "| | weights MB | exact match % | worst kind against fp32 | token agreement % | KL, nats a token | vision ms | decode tokens/s |",
        "| --- " * 8 + "|",
    ]
    base = results["fp32"]["by_kind"]
    for name, row in results.items():
        loss = max(100 * (base[kind]["exact_match"] - row["by_kind"][kind]["exact_match"]) for kind in kinds)
        speed = row.get("speed")
        cells = [f"{speed['vision_ms']['median']:.1f}", f"{speed['decode_tokens_per_second']['median']:.0f}"] if speed else ["-", "-"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.2f} | {100 * row['exact_match']:.2f} | {-loss:+.1f} | {100 * row['token_agreement']:.2f} | "
            f"{row['kl_divergence']:.1e} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plan_error() -> str:
    """`plan_error.json` as two tables."""
    document = load("plan_error")
    rows = ["| | other models, median % | four of five within % | other boards, median % |", "| --- | --- | --- | --- |"]
    for stage, figures in document["stages"].items():
        cells = [f"{100 * figures[name]:.0f}" for name in ("median_error", "four_of_five_within", "median_error_by_board")]
        rows.append(f"| {stage} | {' | '.join(cells)} |")
    rows += ["", "| | model | board, mode | measured ms | predicted ms | error % |", "| --- | --- | --- | --- | --- | --- |"]
    parts = [*((stage, figures["rows"]) for stage, figures in document["stages"].items()), ("not fitted", document["contradicting"])]
    for part, of_part in parts:
        for row in of_part:
            what = f"{row.get('stage', '')} {part}".strip() if part == "not fitted" else part
            times = f"{row['measured_ms']:.1f} | {row['predicted_ms']:.1f} | {100 * row['error']:+.0f}"
            rows.append(f"| {what} | {row['model']} | {row['board']}, {row['mode']} | {times} |")
    return "\n".join(rows)


TABLES = {
    "speed": speed,
    "llama": llama,
    "accuracy": accuracy,
    "where": where,
    "profiles": profiles,
    "tensorrt_types": tensorrt_types,
    "quantization": quantization,
    "plan_error": plan_error,
}
PAGES = ("README.md", "docs/performance.md", "docs/tensorrt.md", "docs/tensorrt-types.md", "docs/quantization.md", "docs/plan.md")


def filled(text: str) -> str:
    """`text` with every `<!-- NAME -->` ... `<!-- /NAME -->` filled anew."""
    for name, make in TABLES.items():
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, n=name, m=make: f"<!-- {n} -->\n{m()}\n<!-- /{n} -->", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> int:
    """Fill the pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
