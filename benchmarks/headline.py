"""The paper's headline on one machine: FastVLM-0.5B at 1024 px against LLaVA-OneVision-0.5B at 1152 px, and a sweep of resolutions.

    python -m benchmarks.headline [--rounds 5] [--threads 2] [--out FILE] [--plot PREFIX] [--sweep]

Time to first token of the toolkit (INT4) and of transformers' own FastVLM (BF16), against LLaVA-OneVision in transformers (BF16); random
weights, 34 tokens of text, by the runner of `benchmarks/peers/run.py`. Then the toolkit's INT4 model at 256 to 1536 px. The record has the
paper's figures beside ours. Those were measured on an M1 Max, with the encoder on its Neural Engine, and without text. Needs 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.peers.run import RESULTS, Run, contender, parser, settle
from benchmarks.peers.runtimes.llava_onevision import ROW_ENDS, VISUAL_TOKENS
from benchmarks.peers.workload import converter_digest, prepare
from fastvlm_edge.bench.measure import Settings
from fastvlm_edge.bench.plot import PARTS
from fastvlm_edge.bench.processes import Measurement
from fastvlm_edge.bench.record import write_json
from fastvlm_edge.bench.table import aligned, number
from fastvlm_edge.machine.state import read_state
from fastvlm_edge.progress import stderr_progress

SIZES = {"0.5b": (256, 512, 768, 1024, 1536), "1.5b": (256, 512, 768, 1024, 1536), "tiny": (256, 512)}
PAPER: dict[str, Any] = {
    "source": "FastVLM, arXiv 2412.13303v2; M1 Max: encoder on the Neural Engine, LLM by MLX in FP16 on its GPU; no text, no projector",
    "ttft_ms": {"FastVLM-0.5B, 1024 px": 166, "LLaVA-OneVision-0.5B, 1152 px": 14124},  # Table 6, R4 and R2
    "ttft_ratio": 85,
    "parts_ms": {  # Table 10
        "FastVLM-0.5B, 1024 px": {"vision": 116.3, "prefill": 50.5},
        "LLaVA-OneVision-0.5B, 1152 px": {"vision": 2721.4, "prefill": 11402.4},
    },
    "encoder_ratio": 3.4,  # 125M against 430M parameters
    "vision_ms_by_resolution": {"256": 10.1, "512": 33.5, "768": 122.6, "1024": 235.6},  # Table 4; slower than Table 10's run of the same
}
CONTENDERS = {
    "fastvlm-edge int4": ("ours", "int4"),
    "transformers FastVLM bfloat16": ("transformers_fastvlm", "bfloat16"),
    "transformers LLaVA-OneVision bfloat16": ("llava_onevision", "bfloat16"),
}
"""Name in the record -> module in benchmarks/peers/runtimes and its variant."""
OTHER = "transformers LLaVA-OneVision bfloat16"


def main() -> int:
    """Measure both parts, write the record, print a table and draw."""
    made = parser("benchmarks.headline", __doc__, RESULTS / "headline.json")
    made.set_defaults(runs=2)
    made.add_argument("--plot", type=Path, help="write PREFIX.png and PREFIX.svg")
    made.add_argument("--sweep", action="store_true", help="measure only the resolutions, and keep the first part of the record")
    options = settle(made.parse_args())
    before = read_state()
    document: dict[str, Any]
    if options.sweep:
        prepare(options.work, options.size, stderr_progress())
        document = json.loads(options.out.read_text(encoding="utf-8")) | {"sweep_machine": machine.describe()}
    else:
        found = headline(options)
        document = {
            "what": f"FastVLM-{options.size} against LLaVA-OneVision of the same LLM size, random weights, 34 tokens of text, first token",
            **{key: found.pop(key) for key in ("machine", "limits", "threads", "rounds", "runs")},
            "paper": PAPER,
            "headline": found,
        }
        write_json(options.out, document)
    document["resolutions"] = resolutions(options)
    document["state"] = {"before": before, "after": read_state()}
    write_json(options.out, document)
    print(tables(document))
    if options.plot is not None:
        plot(options.plot, document)
    return 0


def headline(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turns, and the two ratios. Exits if one of them failed."""
    measured = argparse.Namespace(**{**vars(options), "out": options.work / "headline.json"})
    run = Run(measured, [contender(name, module, variant) for name, (module, variant) in CONTENDERS.items()])
    if run.run():
        raise SystemExit("headline: a contender failed; the same command tries it again")
    document = run.document()
    results = document["results"]
    slow = results[OTHER]["ttft_ms"]["median"]
    parameters = run.state["rounds"][OTHER][0]["encoder_parameters"][0]
    encoders = {"FastViTHD": encoder_parameters(options.work / "checkpoint"), "SigLIP": int(parameters)}
    return {
        **{key: document[key] for key in ("machine", "limits", "threads", "rounds", "runs")},
        "results": results,
        "visual_tokens": {"FastVLM": json.loads((options.work / "workload.json").read_text())["visual_tokens"], "LLaVA": VISUAL_TOKENS},
        "row_ends": ROW_ENDS,
        "ttft_ratio": {name: round(slow / result["ttft_ms"]["median"], 2) for name, result in results.items() if name != OTHER},
        "encoder_parameters": encoders,
        "encoder_ratio": round(encoders["SigLIP"] / encoders["FastViTHD"], 2),
    }


def encoder_parameters(checkpoint: Path) -> int:
    """Parameters of the vision tower in a native checkpoint, from the header of its safetensors file; buffers are not counted."""
    with (checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    total = 0
    for name, entry in header.items():
        if name.startswith("model.vision_tower.") and not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            count = 1
            for side in entry["shape"]:
                count *= side
            total += count
    return total


def resolutions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of `fastvlm-edge bench` by image size, smallest first, without decoding at depth."""
    from fastvlm_edge.convert.pipeline import convert

    records = []
    for size in SIZES[options.size]:
        directory, made_by = options.work / f"int4-{size}px", options.work / f"int4-{size}px.made-by"
        if not made_by.is_file() or made_by.read_text(encoding="ascii") != converter_digest():
            shutil.rmtree(directory, ignore_errors=True)
            convert(
                str(options.work / "checkpoint"), directory, precision="int4", image_size=size, context=2048, progress=stderr_progress()
            )
            made_by.write_text(converter_digest(), encoding="ascii")
        measurement = Measurement(directory, Settings("ort", options.threads, options.runs, depths=()), options.rounds)
        for _ in measurement.run(stderr_progress()):
            pass
        record = measurement.document()
        record["model"]["directory"] = directory.name
        records.append(record)
    return records


def tables(document: dict[str, Any]) -> str:
    """The headline and the sweep as text, ours beside the paper's."""
    found, paper = document["headline"], document["paper"]
    rows: list[tuple[str, ...]] = [("", "first token ms", "preprocess", "vision", "prefill", "LLaVA-OneVision takes", "")]
    for name, result in found["results"].items():
        cells = [number(result[key]["median"]) for key in ("ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms")]
        ratio = found["ttft_ratio"].get(name)
        rows.append((name, *cells, f"{ratio:g} times as long" if ratio else "", ""))
    for name, total in paper["ttft_ms"].items():
        parts = paper["parts_ms"][name]
        ratio_text = f"{paper['ttft_ratio']} times as long" if name.startswith("FastVLM") else ""
        rows.append((f"paper: {name}", number(total), "", number(parts["vision"]), number(parts["prefill"]), ratio_text, ""))
    large, small = (found["encoder_parameters"][name] / 1e6 for name in ("SigLIP", "FastViTHD"))
    ratio_text = f"{found['encoder_ratio']:g} times (paper: {paper['encoder_ratio']:g})"
    lines = [*aligned(rows), f"encoders: {large:.0f}M against {small:.0f}M parameters, {ratio_text}", ""]
    sweep: list[tuple[str, ...]] = [("pixels", "tokens", "first token ms", "preprocess", "vision", "prefill", "paper's vision ms", "")]
    for record in document["resolutions"]:
        size = record["model"]["image_size"]
        cells = [number(record[key]["median"]) for key in ("ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms")]
        theirs = paper["vision_ms_by_resolution"].get(str(size))
        sweep.append((str(size), str(record["model"]["visual_tokens"]), *cells, "" if theirs is None else number(theirs), ""))
    return "\n".join([*lines, *aligned(sweep), "", paper["source"]])


def plot(prefix: Path, document: dict[str, Any]) -> None:
    """Draw our first token by resolution in its parts, and how the encoder's time grows with resolution, ours and the paper's."""
    from matplotlib.figure import Figure

    records = document["resolutions"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    stacked, relative = figure.subplots(1, 2)
    places = range(len(records))
    bottom = [0.0] * len(records)
    for key, label, colour in PARTS:
        heights = [record[key]["median"] for record in records]
        stacked.bar(places, heights, bottom=bottom, color=colour, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for at, top in zip(places, bottom, strict=True):
        stacked.annotate(f"{records[at]['model']['visual_tokens']} tokens", (at, top), ha="center", va="bottom", fontsize=8)
    stacked.set_xticks(list(places), [str(record["model"]["image_size"]) for record in records])
    stacked.set_ylabel("time to first token, ms")
    stacked.legend(frameon=False, fontsize=8)
    here = {record["model"]["image_size"]: record["vision_ms"]["median"] for record in records}
    paper = {int(size): value for size, value in document["paper"]["vision_ms_by_resolution"].items()}
    base = max(set(here) & set(paper))
    for label, found in (("here", here), ("paper, Table 4 (M1 Max)", paper)):
        sizes = sorted(found)
        relative.plot(sizes, [found[size] / found[base] for size in sizes], "o-", label=label)
    relative.set_ylabel(f"encoder's time, {base} px = 1")
    relative.legend(frameon=False, fontsize=8)
    for axes in (stacked, relative):
        axes.set_xlabel("pixels a side")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{document['machine']['cpu']}, {document['threads']} threads, {document['machine']['date']}", fontsize=9)
    for kind in ("png", "svg"):
        figure.savefig(prefix.with_name(f"{prefix.name}.{kind}"), dpi=150, metadata={"Date": None} if kind == "svg" else {})


if __name__ == "__main__":
    sys.exit(main())
