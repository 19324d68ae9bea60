"""The tables of README and docs, made from the recorded results: `python -m benchmarks.tables` writes them between their markers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fastvlm_edge.bench.compare import judge
from fastvlm_edge.bench.record import title_of, unit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A recorded result."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def peers(record: str = "peers") -> str:
    """A record of the peers as a table of medians: whole pipelines, then LLMs alone, then encoders alone."""
    document = load(record)
    machine, limits = document["machine"], document["limits"]
    fields = ("ttft_ms", "vision_ms", "prefill_ms", "decode_tokens_per_second", "peak_memory_mib", "load_ms")
    lines = [
        f"{machine['cpu']}, {document['threads']} threads, {machine['date']}; limits measured: {limits['matmul_gflops']:.0f} GFLOP/s in "
        f"FP32 products, {limits['read_gb_per_second']:.0f} GB/s read; {document['rounds']} processes each, with {document['runs']} runs:",
        "",
        "| | first token ms | vision ms | prefill ms | decode tokens/s | peak MiB | load ms |",
        "| --- " * (len(fields) + 1) + "|",
    ]
    for part, title in (("all", "picture to text"), ("llm", "LLM alone, 290 positions of text"), ("vision", "encoder alone")):
        lines.append(f"| **{title}** |" + " |" * len(fields))
        for name, found in document["results"].items():
            if found["part"] == part:
                cells = [rounded(found[field]["median"]) if field in found else "" for field in fields]
                lines.append(f"| {contender(name, found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PACKAGES = {
    "transformers": "transformers",
    "optimum-onnx": "optimum-onnx",
    "onnxruntime-genai": "onnxruntime-genai",
    "llama.cpp": "llama-cpp-python",
    "openvino": "openvino",
}
"""Peer -> the package whose version is shown."""


def contender(name: str, record: dict[str, Any]) -> str:
    """`llama.cpp q4_0 (llama-cpp-python 0.3.36)`"""
    peer, _, variant = name.partition(":")
    package = PACKAGES.get(peer)
    version = f" ({'' if package == peer else package + ' '}{record['versions'][package]})" if package else ""
    return f"{peer} {variant.removesuffix('-llm')}{version}"


def rounded(value: float) -> str:
    """A figure with three significant digits; such a measurement is not more exact."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


SUMMARY = {
    "fastvlm-edge:int4": "fastvlm-edge, INT4",
    "fastvlm-edge:int8": "fastvlm-edge, INT8",
    "transformers:float32": "transformers, float32",
}
"""Contenders of `peers.json` that the README shows -> how it calls them."""


def summary() -> str:
    """The few rows of `peers.json` that the README shows."""
    document = load("peers")
    fields = ("ttft_ms", "decode_tokens_per_second", "peak_memory_mib")
    lines = ["| | first token, ms | decoding, tokens/s | peak memory, MiB |", "| --- | --- | --- | --- |"]
    for name, title in SUMMARY.items():
        record = document["results"][name]
        lines.append(f"| {title} | {' | '.join(rounded(record[field]['median']) for field in fields)} |")
    machine = document["machine"]
    measured = f"{machine['cpu']}, {document['threads']} threads, {machine['date']}; {document['rounds']} processes each."
    return "\n".join([*lines, "", measured])


def headline() -> str:
    """The first part of `headline.json`: times to first token, ours beside the paper's."""
    document = load("headline")
    found, paper, machine = document["headline"], document["paper"], document["machine"]
    lines = [
        f"{machine['cpu']}, {document['threads']} threads, {machine['date']}, transformers {machine['versions']['transformers']}; "
        "medians; the paper's figures are from an Apple M1 Max:",
        "",
        "| | first token ms | vision ms | prefill ms | speed-up over LLaVA-OneVision |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in found["results"].items():
        cells = [rounded(result[field]["median"]) for field in ("ttft_ms", "vision_ms", "prefill_ms")]
        ratio = found["ttft_ratio"].get(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{ratio:.1f}x' if ratio else ''} |")
    for name, total in paper["ttft_ms"].items():
        parts = paper["parts_ms"][name]
        ratio = f"{paper['ttft_ratio']}x" if name.startswith("FastVLM") else ""
        lines.append(f"| paper: {name} | {total} | {rounded(parts['vision'])} | {rounded(parts['prefill'])} | {ratio} |")
    large, small = (found["encoder_parameters"][name] / 1e6 for name in ("SigLIP", "FastViTHD"))
    lines += [
        "",
        f"Parameters of the encoders: {large:.0f} M and {small:.0f} M, "
        f"a ratio of {found['encoder_ratio']} (paper: {paper['encoder_ratio']}).",
    ]
    return "\n".join(lines)


def resolutions() -> str:
    """The second part of `headline.json`: the sweep."""
    document = load("headline")
    lines = [
        "| pixels | visual tokens | first token ms | preprocess | vision | prefill | paper's vision ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in document["resolutions"]:
        size = record["model"]["image_size"]
        cells = [rounded(record[field]["median"]) for field in ("ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms")]
        theirs = document["paper"]["vision_ms_by_resolution"].get(str(size), "")
        lines.append(f"| {size} | {record['model']['visual_tokens']} | {' | '.join(cells)} | {theirs} |")
    return "\n".join(lines)


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
        "| | ms | of which |",
        "| --- | --- | --- |",
    ]
    for what, operators in document["where_the_time_goes"].items():
        parts = ", ".join(f"{name} {value}" for name, value in operators.items() if name not in ("all", "other"))
        lines.append(f"| {what} | {operators['all']} | {parts} |")
    return "\n".join(lines)


def engine_builds() -> str:
    """Decoders of `engine_builds.json`: what is in the engine and what the build cost, with the earlier graph in front of an arrow."""
    one_row = "two profiles, the second for one row"
    found = {(row["size"], row["precision"], row["profiles"], row["graph"]): row for row in load("engine_builds")["results"]}
    columns: tuple[tuple[str, str, float], ...] = (
        ("kernels", "kernels", 1),
        ("fused attentions", "attentions", 1),
        ("matrices written out", "written_out", 1),
        ("scratch MB", "scratch_bytes", 1e6),
        ("engine MB", "engine_bytes", 1e6),
        ("CPU s", "cpu_seconds", 1),
        ("builder MiB", "peak_anonymous_mib", 1),
    )
    lines = ["| | " + " | ".join(title for title, *_ in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for (size, precision, profiles, graph), now in found.items():
        if graph != "after" or profiles == one_row:
            continue
        earlier = found.get((size, precision, one_row if profiles == "two profiles" else profiles, "before"))
        rows = [earlier, now] if earlier else [now]
        cells = [" \u2192 ".join(f"{row[field] / unit:,.0f}" for row in rows) for _, field, unit in columns]
        lines.append(f"| {size} `{precision}`, {profiles} | {' | '.join(cells)} |")
    for (size, precision, profiles, graph), now in found.items():
        if graph == "after" and profiles == one_row:
            cells = [f"{now[field] / unit:,.0f}" for _, field, unit in columns]
            lines.append(f"| {size} `{precision}`, {one_row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def image_sizes() -> str:
    """Engines of `image_sizes.json`, with the sum of those for one size."""
    rows = [row for row in load("image_sizes")["results"] if "engine" in row]
    columns = (("engine_bytes", 1e6), ("scratch_bytes", 1e6), ("kernels", 1.0), ("cpu_seconds", 1.0))
    lines = ["| encoder | engine | MB | scratch MB | kernels | CPU s |", "| --- " * 6 + "|"]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        each = [row for row in rows if row["precision"] == precision]
        alone = [row for row in each if len(row["profiles"]) == 1 and len(set(row["profiles"][0])) == 1]
        whole = {name: (max if name == "scratch_bytes" else sum)(row[name] for row in alone) for name, _ in columns}
        for row in [*alone, {"engine": f"these {len(alone)} together", **whole}, *(row for row in each if row not in alone)]:
            cells = " | ".join(f"{row[name] / unit:,.0f}" for name, unit in columns)
            lines.append(f"| `{precision}` | {row['engine']} | {cells} |")
    return "\n".join(lines)


def image_sizes_on_cpu() -> str:
    """Memory and times of `image_sizes.json`: a graph for each size beside one dynamic graph."""
    rows = [row for row in load("image_sizes")["results"] if "on_cpu" in row]
    times = {row["precision"]: row["median_ms"] for row in rows if "median_ms" in row}
    sizes = [name.removesuffix(", fixed") for name in next(iter(times.values())) if name.endswith(", fixed")]
    lines = ["| encoder | | loaded MiB | after a picture of each size | " + " | ".join(f"{size}, ms" for size in sizes) + " |"]
    lines.append("| --- " * (4 + len(sizes)) + "|")
    for row in rows:
        if "loaded_mib" not in row:
            continue
        kind = "dynamic" if row["graphs"] == ["dynamic"] else "fixed"
        cells = " | ".join(f"{times[row['precision']][f'{size}, {kind}']:,}" for size in sizes)
        lines.append(f"| `{row['precision']}` | {row['on_cpu']} | {row['loaded_mib']:,} | {row['used_mib']:,} | {cells} |")
    return "\n".join(lines)


def calibration_sizes() -> str:
    """`calibration_sizes.json`: mean and worst loss at each size, by the sizes whose pictures were observed."""
    rows = load("calibration_sizes")["results"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(tuple(row["observed"]), row["size"]): row for row in rows}
    lines = ["| observed | " + " | ".join(f"at {size} px, mean (worst)" for size in sizes) + " |", "| --- " * (1 + len(sizes)) + "|"]
    for observed in dict.fromkeys(tuple(row["observed"]) for row in rows):
        cells = " | ".join("{mean:.1e} ({worst:.1e})".format(**found[observed, size]) for size in sizes)
        count = found[observed, sizes[0]]["pictures"]
        lines.append(f"| {count} pictures at {', '.join(map(str, observed))} px | {cells} |")
    return "\n".join(lines)


def tensorrt_types() -> str:
    """The FP16 cases of `tensorrt_types.json` as a table: one row for layers and weights that come out the same."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in load("tensorrt_types")["results"]:
        kind, _, block = row["weights"].partition("/")
        form = ("w8a8" if row["quantize_input"] else kind) + (" in blocks" if block else "")
        form += ", scale in FP32 and a Cast" if row["scale"] else ""
        if row["weights"] != "plain" and row["activations"] == "fp16" and not (row["scale"] and row["layer"] != "matmul"):
            form += ", 1 row" if row["rows"] in ("1", "dynamic 1") and kind == "int8" else ""
            groups.setdefault((form, computed(row)), []).append(row)
    lines = ["| weights | layers | bits/weight | computed |", "| --- | --- | --- | --- |"]
    for (form, words), rows in groups.items():
        bits = [row["bits_per_weight"] for row in rows if "bits_per_weight" in row]
        extent = f"{min(bits):.1f}" + (f" to {max(bits):.1f}" if max(bits) - min(bits) > 0.1 else "") if bits else "-"
        lines.append(f"| {form} | {', '.join(dict.fromkeys(row['layer'] for row in rows))} | {extent} | {words} |")
    return "\n".join(lines)


def computed(row: dict[str, Any]) -> str:
    """What the kernels of a row do with the weights, in words."""
    if "kernels" not in row:
        return "does not build"
    words = []
    for kernel in row["kernels"]:
        kind, _, types = kernel.partition(": ")
        kind, _, steps = kind.partition("[")
        if "Conc" in steps and "const" in types:
            words.append("pads groups")
        if kind == "runtime_fusion":
            words.append("product reads the integers")
        elif kind == "kgen" and "Gath" in steps:
            words.append("reads rows only")
        elif kind == "kgen" and re.search(r"Int[48] const.* -> (?!Int8)", types):
            words.append("dequantises into memory")
        elif kind in ("gemm", "correlation"):
            integers = types.startswith("Int8+Int8")
            words.append(f"INT8 {'convolution' if kind == 'correlation' else 'product'} -> {types.split(' ')[-1]}" if integers else "float")
    return ", ".join(dict.fromkeys(words))


def quantization() -> str:
    """`quantization.json` as a table: one row a contender."""
    results = load("quantization")["results"]
    kinds = list(next(iter(results.values()))["by_kind"])
    lines = [
        "| | weights MB | exact match % | worst kind against fp32, points | token agreement % | KL, nats/token "
        "| vision, fastest ms | decode tokens/s |",
        "| --- " * 8 + "|",
    ]
    base = results["fp32"]["by_kind"]
    for name, row in results.items():
        loss = max(100 * (base[kind]["exact_match"] - row["by_kind"][kind]["exact_match"]) for kind in kinds)
        speed = row.get("speed")
        cells = [f"{speed['vision_ms']['min']:.1f}", f"{speed['decode_tokens_per_second']['median']:.0f}"] if speed else ["-", "-"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.2f} | {100 * row['exact_match']:.2f} | {-loss:+.1f} | {100 * row['token_agreement']:.2f} | "
            f"{row['kl_divergence']:.1e} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def planted_faults() -> str:
    """`planted_faults.json`: right answers in percent, by fault and precision."""
    document = load("planted_faults")
    sides = {side: {(row["model"], row["fault"], row["scale"]): row for row in document[side]["results"]} for side in ("before", "after")}
    after = sides["after"]

    def points(side: str, key: tuple[str, str, float], precision: str) -> str:
        found = sides[side].get(key, {}).get(precision)
        return "-" if found is None else "refused" if "refused" in found else f"{100 * found['exact_match']:.1f}"

    columns = (*(("after", kind) for kind in ("fp32", "fp16", "bf16")), *((side, kind) for kind in ("int8", "int4") for side in sides))
    titles = " | ".join(precision + ", before" * (side == "before") for side, precision in columns)
    lines = [f"| checkpoint | fault | scale | {titles} |", "| --- " * (3 + len(columns)) + "|"]
    for key in after:
        cells = [points(side, key, precision) for side, precision in columns]
        scale = "-" if key[1] == "none" else f"{key[2]:,.0f}"
        lines.append(f"| {key[0]} | {key[1].replace('_', ' ')} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planted_faults_levels() -> str:
    """The same for the faults that emulated processors answered as well."""
    document = load("planted_faults")
    sides = {
        side: {(row["fault"], row["scale"]): row for row in document[side]["results"] if row["model"] == "demo"}
        for side in ("before", "after")
    }
    levels: list[str] = []
    for row in sides["after"].values():
        for precision in ("int8", "int4"):
            levels += [level for level in row.get(precision, {}).get("levels", {}) if level not in levels]
    if not levels:
        raise ValueError("planted_faults.json has no answers of emulated processors")
    lines = [
        f"| fault | scale | | {' | '.join(f'{level}, before | {level}' for level in levels)} |",
        "| --- " * (3 + 2 * len(levels)) + "|",
    ]
    for (fault, scale), row in sides["after"].items():
        for precision in ("int8", "int4"):
            if "levels" in row.get(precision, {}):
                found = [sides[side][fault, scale][precision] for side in sides]
                cells = [
                    "refused" if "refused" in one else f"{100 * one['levels'][level]['exact_match']:.0f}"
                    for level in levels
                    for one in found
                ]
                lines.append(f"| {fault.replace('_', ' ')} | {scale:,.0f} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prefill_w8a8() -> str:
    """Times of `prefill_w8a8.json` as a table."""
    many, one = load("prefill_w8a8")["time"]["sum_of_least_ms"].values()
    lines = ["| | 290 rows, ms | 1 row, ms |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {way} | {many[way]:.0f} | {one[way]:.1f} |" for way in many)])


def vision_libraries() -> str:
    """`vision_libraries.json` as a table: one row a way to quantise the encoder."""
    columns = ("exact match %", "worst kind loses, points", "error of the features", "token agreement %")
    lines = [f"| | {' | '.join(columns)} |", "| --- | --- | --- | --- | --- |"]
    for name, row in load("vision_libraries")["results"].items():
        if "failed" in row:
            lines.append(f"| {name} | fails | | | |")
            continue
        cells = [f"{100 * row['exact_match']:.2f}", f"{row['worst_kind_loses_points']:.1f}", f"{row['relative_error']:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['ids_agree']:.2f} |")
    return "\n".join(lines)


def quantization_choice() -> str:
    """The rows of 128 pictures of `quantization_choice.json`: what sparing some groups is worth."""
    document = load("quantization_choice")
    lines = [
        f"| of {document['questions']:,} development questions | INT8, % of the work | error of the features | answers changed |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in document["results"].items():
        observer, pictures, *rest = name.split(", ")
        if pictures != "128 pictures" or rest[0] != "bound 0.001":
            continue
        spared = rest[1].replace("disproportion inf", "none spared") if rest[1:] else "as by default"
        found = row["development"]
        lines.append(f"| {observer}, {spared} | {100 * row['int8_share']:.1f} | {found['relative_error']:.4f} | {found['changed']} |")
    return "\n".join(lines)


def calibration() -> str:
    """`calibration.json` as a table: one column a precision."""
    document = load("calibration")
    results, machine = document["results"], document["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; {document['examples']} examples, "
        f"{next(iter(results.values()))['image_size']} px; `{next(iter(results))}` first, with an empty cache:",
        "",
        "| | " + " | ".join(f"`{name}`" for name in results) + " |",
        "| --- " * (len(results) + 1) + "|",
    ]

    def line(what: str, cell: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {what} | {' | '.join(cell(row) for row in results.values())} |")

    for stage in ("encode", "observe vision", "measure vision", "calibrate decoder"):
        line(f"{stage}, s", lambda row, stage=stage: f"{row['calibrate']['stages'][stage]:.0f}")  # type: ignore[misc]
    line("whole conversion, s", lambda row: f"{row['calibrate']['seconds']:.0f}")
    line("peak memory of the conversion, MiB", lambda row: f"{row['calibrate']['peak_memory_mib']:,}")
    line("encoder's multiply-accumulates in INT8, %", lambda row: f"{100 * row['share_of_macs']['vision']['INT8']:.1f}")
    line("cosine of the image features, GPU graph", lambda row: f"{row['parity']['image_features_w8a8']['cosine']:.5f}")
    line("cosine of the logits", lambda row: f"{row['parity']['logits']['cosine']:.4f}")
    line(
        "engines for SM86: encoder, LLM, MB",
        lambda row: f"{row['engines_mb']['vision.engine']:.0f}, {row['engines_mb']['decoder.engine']:.0f}",
    )
    line("time to build the engines, s", lambda row: f"{row['build']['seconds']:.0f}")
    return "\n".join(lines)


def llm_libraries() -> str:
    """INT8, and INT4 in blocks of 128, of `llm_quantization.json` as a table."""
    part = load("llm_quantization")["demo, blocks of 128"]
    lines = [
        f"Decoder alone, features in FP32, {part['count']:,} held-out questions:",
        "",
        "| | KL, 1e-6 nats/token | 99th percentile | agreement % | exact match % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in part["rows"]:
        if "failed" in row:
            lines.append(f"| {row['method']} | fails | | | |")
            continue
        cells = [f"{1e3 * row['kl_1e-3']:.1f}", f"{1e3 * row['kl_1e-3_p99']:.0f}", f"{100 * row['agreement']:.2f}"]
        kind = f", INT{row['bits']}" if row.get("bits") else ""
        lines.append(f"| {row['method']}{kind} | {' | '.join(cells)} | {100 * row['exact_match']['all']:.2f} |")
    return "\n".join(lines)


def settings() -> str:
    """`settings.json` as a table of medians; a star marks what differs from the first row of its model by the rule of `bench compare`."""
    from benchmarks.verdicts import changed, enough

    fields = ("load_ms", "vision_ms", "prefill_ms", "decode_tokens_per_second", "peak_memory_mib")
    document = load("settings")
    lines = ["| | load ms | vision ms | prefill ms | decode tokens/s | peak MiB |", "| --- | --- | --- | --- | --- | --- |"]
    for model, results in document["results"].items():
        base = next(iter(results.values()))
        for way, found in results.items():
            cells = [rounded(found[field]["median"]) + (" *" if changed(field, base, found) else "") for field in fields]
            lines.append(f"| {model}, {way} | {' | '.join(cells)} |")
    processes = document["processes"]
    judged = f'A star marks what differs from "as shipped" by the rule of `fastvlm-edge bench compare`; {processes} processes each.'
    few = f"{processes} processes each, too few for a verdict by `fastvlm-edge bench compare`, which needs five."
    lines += ["", judged if enough(processes) else few]
    return "\n".join(lines)


def onnxruntime_versions() -> str:
    """`onnxruntime_versions.json`: speeds by version of onnxruntime, in the last column without its own operator."""
    from benchmarks.onnxruntime_versions import PRECISIONS, STANDARD

    document = load("onnxruntime_versions")
    machine = document["machine"]
    titles = [f"{precision}, {what}" for what in ("prefill ms", "decode tokens/s") for precision in PRECISIONS]
    lines = [
        f"{machine['cpu']}, {document['threads']} threads, {machine['date']}; medians of {document['processes']} process(es):",
        "",
        f"| onnxruntime | {' | '.join(titles)} | {STANDARD}: decode tokens/s |",
        "| --- " * (len(titles) + 2) + "|",
    ]
    for version, found in document["results"].items():
        cells = [rounded(found[way][field]["median"]) for field in ("prefill_ms", "decode_tokens_per_second") for way in PRECISIONS]
        lines.append(f"| {version} | {' | '.join(cells)} | {rounded(found[STANDARD]['decode_tokens_per_second']['median'])} |")
    return "\n".join(lines)


def chunks() -> str:
    """`chunks.json`: the largest difference of logits, by length of the chunks."""
    document = load("chunks")
    sizes = list(document["results"]["demo"]["fp32"]["chunks"])
    lines = [
        f"| | largest logit | {' | '.join(f'chunks of {size}' for size in sizes)} | other greedy tokens |",
        "| --- " * (len(sizes) + 3) + "|",
    ]
    for model, results in document["results"].items():
        for precision, found in results.items():
            each = list(found["chunks"].values())
            others = sum(one["other_greedy_tokens"] for one in each)
            cells = " | ".join(f"{one['largest_difference']:.2g}" for one in each)
            lines.append(f"| {model}, {precision} | {found['largest_logit']:.3g} | {cells} | {others} |")
    return "\n".join(lines)


def verdicts() -> str:
    """The claims about `peers.json`, each judged by the rule of `bench compare`."""
    from benchmarks.verdicts import table

    return table(load("peers"))


def versions() -> str:
    """`versions.json` as a table of medians, with the verdicts of `bench compare`. A part of a figure stands behind its name."""
    document = load("versions")
    machine, (before, after) = document["machine"], (document["commits"][side] for side in ("before", "after"))
    lines = [
        f"{machine['cpu']}, {document['threads']} threads, {machine['date']}; {document['processes']} processes each:",
        "",
        f"| | {before} | {after} | |",
        "| --- | --- | --- | --- |",
    ]
    for model, found in document["results"].items():
        whole = ""
        for field in found["after"]:
            sides, title = [found[side][field] for side in ("before", "after")], title_of(field)
            whole = whole if title.startswith(" ") else title
            named = title if title == whole else f"{whole}: {title.strip()}"
            verdict = judge(field, *(side["samples"] for side in sides)).verdict
            lines.append(f"| {model}, {named}, {unit(field)} | {' | '.join(rounded(side['median']) for side in sides)} | {verdict} |")
    return "\n".join(lines)


def plan_error() -> str:
    """`plan_error.json` as two tables."""
    document = load("plan_error")
    rows = ["| | other models, median % | other models, 80 % are within % | other boards, median % |", "| --- | --- | --- | --- |"]
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


FOR_SERVE = frozenset(
    {"starlette", "uvicorn", "msgspec", "prometheus-client", "anyio", "click", "h11", "idna", "typing-extensions", "exceptiongroup"}
)
"""Wheels of a bundle that only `fastvlm-edge serve` imports."""


def bundle_sizes() -> str:
    """`bundle_sizes.json` as a table: one row per target and Python."""
    document = load("bundle_sizes")
    limit = document["limit_bytes"] / 1e6
    lines = [
        f"| target | Python | file MB (limit {limit:.0f}) | of it for `serve` | unpacked MB | onnxruntime | numpy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["targets"]:
        serve = sum(wheel["bytes"] for name, wheel in row["wheels"].items() if name in FOR_SERVE)
        sizes = f"{row['runtime_bytes'] / 1e6:.1f} | {serve / 1e6:.1f} | {row['unpacked_bytes'] / 1e6:.1f}"
        versions = " | ".join(row["wheels"][name]["version"] for name in ("onnxruntime", "numpy"))
        lines.append(f"| `{row['target']}` | {row['python']} | {sizes} | {versions} |")
    return "\n".join(lines)


FIRST_TOKENS = {
    "first_question": "first question",
    "follow_up": "follow-up question",
    "repeated_picture": "another question about the same picture",
}
"""Parts of `conversations.json` -> how the table calls them."""
GUESSED = {
    "json": "JSON: three things with four fields",
    "copy": "text of the prompt, every twelfth word changed",
    "no_copy": "a reply that copies nothing",
}
"""Parts of `conversations.json` -> how the table calls them."""


def conversations() -> str:
    """`conversations.json`: speeds of conversations together, first tokens, and what guesses save."""
    document = load("conversations")
    machine, model = document["machine"], document["model"]
    speeds = {count: median(values) for count, values in document["tokens_per_second"].items()}
    alone = next(iter(speeds.values()))
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; {model['precision']}, {model['image_size']} px; medians:",
        "",
        "| conversations together | tokens/s in all | of each | times one | decode steps without the engine, tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for count, speed in speeds.items():
        bare = 1e3 * int(count) / median(document["bare_step_ms"][count])
        lines.append(f"| {count} | {rounded(speed)} | {rounded(speed / int(count))} | {speed / alone:.2f} | {rounded(bare)} |")
    times = {name: median(values) for name, values in document["first_token_ms"].items()}
    first = times["first_question"]
    lines += ["", "| time to first token | ms | of the first |", "| --- | --- | --- |"]
    for name, words in FIRST_TOKENS.items():
        lines.append(f"| {words} | {rounded(times[name])} | {times[name] / first:.3f} |")
    lines += ["", "| guesses | tokens | guessed | right | speed with, times without |", "| --- | --- | --- | --- | --- |"]
    for name, words in GUESSED.items():
        found = document["guesses"][name]
        speed = median(found["tokens_per_second"]["with"]) / median(found["tokens_per_second"]["without"])
        lines.append(f"| {words} | {found['tokens']} | {found['drafted_tokens']} | {found['accepted_tokens']} | {speed:.2f} |")
    found = document["demo_readings"]
    lines.append(
        f"| {found['questions']} readings of the demo | {found['tokens']} | {found['drafted_tokens']} | {found['accepted_tokens']} "
        f"| {found['seconds_without'] / found['seconds_with']:.2f} |"
    )
    return "\n".join(lines)


def batch() -> str:
    """`batch.json`: pictures per second of a loop, and of a batch by its slots."""
    document = load("batch")
    machine, slots = document["machine"], document["slots"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; {document['pictures']} pictures, {document['tokens']} new tokens "
        f"each; medians of {len(document['models'][0]['seconds']['loop'])} rounds, in pictures/s:",
        "",
        "| | loop over `generate` | " + " | ".join(f"`batch --slots {count}` | times" for count in slots) + " |",
        "| --- " * (2 + 2 * len(slots)) + "|",
    ]
    for found in document["models"]:
        model, speeds = found["model"], {side: document["pictures"] / median(values) for side, values in found["seconds"].items()}
        name = f"{model['name']}, {model['precision']}, {model['image_size']} px, {found['visual_tokens']} visual tokens"
        cells = [f"{speeds[count]:.2f} | {speeds[count] / speeds['loop']:.2f}" for count in slots]
        lines.append(f"| {name} | {speeds['loop']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def resolution() -> str:
    """`resolution.json`: accuracy and first token of the demo by size and of the cascade, for both kinds of pictures."""
    document = load("resolution")["demo"]
    machine, results = document["machine"], document["results"]
    fitted_to = results[0]["cascade"]["fitted_to"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; {results[0]['count']:,} held-out questions; `auto` was fitted to "
        f"{fitted_to['questions']:,} others with a bound of {document['bound']:g} points:",
        "",
        "| pictures | size | exact match % | first token, mean ms | % of the largest | 95th percentile ms | whole answer, mean ms |",
        "| --- " * 7 + "|",
    ]
    for found in results:
        ways = {f"{size} px": figures for size, figures in found["sizes"].items()} | {"`auto`": found["cascade"]}
        largest = list(found["sizes"].values())[-1]["first_token_ms"]["mean"]
        for title, way in ways.items():
            first = way["first_token_ms"]
            cells = [f"{100 * way['accuracy']:.2f}", rounded(first["mean"]), f"{100 * first['mean'] / largest:.0f}"]
            cells += [rounded(first["p95"]), rounded(way["answer_ms"])]
            lines.append(f"| {found['drawn']} px | {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(line for found in results for line in ("", about_cascade(found)))])


def about_cascade(found: dict[str, Any]) -> str:
    """What `auto` does for one kind of pictures, in sentences."""
    cascade, run = found["cascade"], found["run"]
    lost, (*tries, last) = cascade["lost_points"], cascade["sizes"]
    rule = f"always {last} px"
    if tries:
        under = f"while the {cascade['confidence']} probability is under {cascade['threshold']:.4g}"
        rule = f"{', then '.join(f'{size} px' for size in tries)} {under}, then {last} px"
    shares = ", ".join(f"{100 * share:.1f} % at {size} px" for size, share in cascade["answered_at"].items())
    points, low, high = (f"{-lost[end] + 0.0:+.2f}" for end in ("points", "high", "low"))
    auto, largest = (rounded(run["first_text_ms"][name]["mean"]) for name in ("auto", "largest"))
    text = (
        f"Pictures of {found['drawn']} px, `auto`: {rule}. It answers {shares}. Against the largest size it scores {points} points "
        f"(95 % interval {low} to {high}). Run in turns with the largest size, its first text took {auto} ms on "
        f"average, and that of the largest size {largest}: {100 * run['share']:.0f} %."
    )
    small, middle, *_, large = found["sizes"].values()
    right, firsts = small["accuracy"], [size["first_token_ms"]["mean"] for size in (small, middle, large)]
    perfect = (right * firsts[0] + (1 - right) * (small["answer_ms"] + firsts[1])) / firsts[2]
    text += f" A confidence that told right from wrong without fault would take {100 * perfect:.0f} %, by asking at the two smaller sizes."
    return text + (f" Nothing was fitted: {cascade['fitted_to']['why_not']}." if "why_not" in cascade["fitted_to"] else "")


def resolution_kinds() -> str:
    """`resolution.json`: exact match by kind of question."""
    results = load("resolution")["demo"]["results"]
    titles = [f"{size} px" for size in results[0]["sizes"]] + ["auto"]
    lines = [f"| pictures drawn with | kind | questions | {' | '.join(titles)} |", "| --- " * (3 + len(titles)) + "|"]
    for found in results:
        for kind, of_kind in found["by_kind"].items():
            ways = [*of_kind["sizes"].values(), of_kind["cascade"]]
            cells = [f"{100 * way['accuracy']:.1f}" for way in ways]
            lines.append(f"| {found['drawn']} px | {kind} | {of_kind['count']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def resolution_sizes() -> str:
    """`resolution.json`: one model directory at each of its sizes, and what the cascade itself costs."""
    document = load("resolution")["large"]
    machine, model, overhead = document["machine"], document["model"], document["overhead"]
    fields = ("ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms", "peak_memory_mib")
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; {model['name']}, {model['precision']}; "
        f"{document['rounds']} processes for each size, in turns; medians:",
        "",
        "| pixels | first token ms | preprocess | vision | prefill | peak MiB |",
        "| --- " * 6 + "|",
    ]
    for size, found in document["sizes"].items():
        lines.append(f"| {size} | {' | '.join(rounded(found[field]['median']) for field in fields)} |")
    auto, alone = (median(overhead[f"{name}_ms"]) for name in ("auto", "smallest"))
    lines += [
        "",
        f"A cascade that accepts every answer of the smallest size, against the smallest size, in turns: whole answers of "
        f"{overhead['tokens']} tokens took {rounded(auto)} and {rounded(alone)} ms (medians of {len(overhead['auto_ms'])}). "
        f"Overhead: {100 * overhead['overhead']:+.2f} %.",
    ]
    return "\n".join(lines)


SCRIPTS = (
    ("peers.run", "How fast is FastVLM-0.5B beside its peers on a CPU? (`make bench-peers`)", "peers", 120),
    ("peers.run", "The same on a processor with AVX-512 and BF16 instructions, an earlier run", "peers-avx512", 90),
    ("peers.run --device gpu", "The same on one GPU. **Not yet run on hardware.** (`make bench-gpu`)", "", 10),
    ("verdicts", "Who is ahead, by the rule of `fastvlm-edge bench compare`?", "peers", 0),
    ("cpu", "Where does the time go, by operator? (`make bench`)", "cpu", 15),
    ("headline", "Is the paper's comparison with LLaVA-OneVision true here? What does the image size cost?", "headline", 60),
    ("precisions", "What does each precision cost in speed and accuracy? (draws the pictures of performance.md)", "bench", 20),
    ("versions BEFORE", "Is this checkout as fast on a CPU as an earlier one?", "versions", 25),
    ("settings", "What does each setting of the runtime bring on a CPU?", "settings", 20),
    ("onnxruntime_versions", "How fast is each version of onnxruntime on a CPU? (needs a package index)", "onnxruntime_versions", 25),
    ("chunks", "How far are logits apart if a prompt is prefilled in one call, and in chunks?", "chunks", 3),
    (
        "resolution DEMO --large MODEL",
        "What does the size of pictures cost in accuracy, time and memory, and what does the cascade save?",
        "resolution",
        60,
    ),
    ("conversations MODEL", "What do several conversations at once, kept beginnings and pictures, and guesses save?", "conversations", 15),
    ("conversations MODEL", "The same on a processor with AVX2 only, an earlier run", "conversations-avx2", 15),
    ("batch MODEL", "How much faster is `batch` than a loop over the Python API?", "batch", 10),
    ("batch MODEL", "The same on a processor with AVX2 only, an earlier run", "batch-avx2", 10),
    ("ray_cluster MODEL", "Does Ray cost throughput, and does the memory of its driver grow? (extra `ray`)", "ray_cluster", 10),
    (
        "serve_load MODEL",
        "Does the server stay right and small under good, malformed, huge, slow and vanishing clients?",
        "serve_load",
        5,
    ),
    ("serve_latency MODEL", "What does asking through the server cost beside asking in Python?", "serve_latency", 5),
    ("serve_fuzz", "Does any request body, or any damaged picture, get more than an answer or a sentence?", "serve_fuzz", 30),
    ("demo_accuracy", "How many questions does the demo answer correctly, by precision?", "demo_accuracy", 5),
    ("quantization", "What does quantisation cost the demo in size, accuracy and speed?", "quantization", 15),
    ("planted_faults", "What do outliers as in trained LLMs cost in each precision?", "planted_faults", 15),
    ("calibration", "What does calibrating a checkpoint of real size take?", "calibration", 45),
    ("plan_error", "How far is `fastvlm-edge plan` from published measurements?", "plan_error", 0),
    ("engine_builds", "What does TensorRT for RTX make of the decoder, and what does its build cost?", "engine_builds", 20),
    ("bundle_sizes", "How large is a bundle, and how fast does it start beside PEX? (needs a package index)", "bundle_sizes", 15),
)
"""Module and options, the question it answers, its record, minutes that a run takes on two cores (0: under one)."""


def benchmarks() -> str:
    """The scripts of this directory, with the date of each record."""
    lines = ["| script | question | record | last run | minutes |", "| --- | --- | --- | --- | --- |"]
    for script, question, record, minutes in SCRIPTS:
        link = f"[{record}.json](results/{record}.json)" if record else ""
        lines.append(f"| `{script}` | {question} | {link} | {date_of(record) if record else 'never'} | {minutes or 'under 1'} |")
    return "\n".join(lines)


def date_of(record: str) -> str:
    """When a record was measured; `any day` for one that is arithmetic and has no machine."""
    document = load(record)
    parts = [document, *document.values(), *(each for each in document.get("results", ()) if isinstance(each, dict))]
    return max((part["machine"]["date"] for part in parts if isinstance(part, dict) and "machine" in part), default="any day")


def score_precision() -> str:
    """`score_precision.json`: the attention that goes to the wrong keys."""
    lines = ["| largest score | scores in FP16 | in BF16 | in FP32, keys and queries in FP16 | in FP32, keys and queries in BF16 |"]
    lines.append("| --- " * 5 + "|")
    for row in load("score_precision")["results"]:
        cells = [f"{row[kind][what]:.2%}" for what in ("scores", "keys_and_queries") for kind in ("fp16", "bf16")]
        lines.append(f"| {row['score']:,.0f} | " + " | ".join(cells).replace("%", " %") + " |")
    return "\n".join(lines)


def default_precision() -> str:
    """What speaks for the default of `convert`: `quantization.json`, and `fastvlm-edge` in both records of the peers."""
    lines = [
        "| | demo: exact match % | KL, nats/token | tokens/s | 0.5B, AVX-512: first token ms | tokens/s | peak MiB "
        "| 0.5B, AVX2: first token ms | tokens/s | peak MiB |",
        "| --- " * 10 + "|",
    ]
    for name, row in load("quantization")["results"].items():
        precision, _, way = name.partition(" ")
        if way in ("", "rounded"):
            demo = row["speed"]["decode_tokens_per_second"]["median"]
            cells = [f"{100 * row['exact_match']:.2f}", f"{row['kl_divergence']:.1e}", rounded(demo)]
            for record in ("peers-avx512", "peers"):
                found = load(record)["results"].get(f"fastvlm-edge:{precision}", {})
                fields = ("ttft_ms", "decode_tokens_per_second", "peak_memory_mib")
                cells += [rounded(found[field]["median"]) if found else "" for field in fields]
            lines.append(f"| `{precision}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def ray_cluster() -> str:
    """`ray_cluster.json`: throughput with and without Ray, and the memory of the driver."""
    record = load("ray_cluster")
    machine, found = record["machine"], record["driver"]
    overhead = record["ray"]["overhead"]["median"]
    memory = ", ".join(f"{mib:.0f} MiB after {int(rows):,}" for rows, mib in found["mib_after"].items())
    lines = [
        f"{machine['cpu']}, {machine['date']}, Ray {machine['versions']['ray']}, {record['model']}, {record['rows']:,} rows with a "
        f"picture each; medians, with the smallest and largest in brackets:",
        "",
        "| | rows/s | CPU ms/row, all processes |",
        "| --- | --- | --- |",
    ]
    for name, title in (("plain_loops", "plain loops"), ("ray", "workers of Ray")):
        cells = [
            f"{rounded(figure['median'])} ({rounded(figure['min'])} to {rounded(figure['max'])})"
            for figure in (record[name]["rows_per_second"], record[name]["cpu_ms_per_row"])
        ]
        lines.append(f"| {record['workers']} {title}, one thread each | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            f"| speed of Ray, relative to that of the loops | {record['ratio']:.2f} | {record['cpu_ratio']:.2f} |",
            "",
            f"Of the CPU time with Ray, {100 * overhead:.1f} % was that of the command and of Ray's own processes, "
            "and the rest that of the workers.",
            "",
            f"With workers that answer at once, the command reads, sends and writes {found['rows_per_second']:,.0f} rows/s. Its memory for "
            f"{found['rows']:,} rows: {memory}; {found['bytes_per_row']:.0f} bytes per row.",
        ]
    )


TABLES = {
    "benchmarks": benchmarks,
    "default_precision": default_precision,
    "summary": summary,
    "peers": peers,
    "peers_avx512": partial(peers, "peers-avx512"),
    "versions": versions,
    "headline": headline,
    "resolutions": resolutions,
    "resolution": resolution,
    "resolution_kinds": resolution_kinds,
    "resolution_sizes": resolution_sizes,
    "accuracy": accuracy,
    "where": where,
    "engine_builds": engine_builds,
    "image_sizes": image_sizes,
    "image_sizes_on_cpu": image_sizes_on_cpu,
    "calibration_sizes": calibration_sizes,
    "tensorrt_types": tensorrt_types,
    "quantization": quantization,
    "plan_error": plan_error,
    "prefill_w8a8": prefill_w8a8,
    "planted_faults": planted_faults,
    "planted_faults_levels": planted_faults_levels,
    "settings": settings,
    "onnxruntime_versions": onnxruntime_versions,
    "chunks": chunks,
    "conversations": conversations,
    "batch": batch,
    "verdicts": verdicts,
    "vision_libraries": vision_libraries,
    "quantization_choice": quantization_choice,
    "calibration": calibration,
    "llm_libraries": llm_libraries,
    "bundle_sizes": bundle_sizes,
    "ray_cluster": ray_cluster,
    "score_precision": score_precision,
}
PAGES = ("README.md", "benchmarks/README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))
"""Pages that may have tables; each table may stand on any of them."""


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
