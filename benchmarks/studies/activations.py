"""The largest activations of encoder and LLM against what FP16 holds: a record and a picture, from what `convert` finds and acts on.

Question: How near do the largest activations of encoder and decoder come to the limit of FP16?
Verdict: a factor of 25 below the magnitude at which conversion widens a stage, for the demo model and for random weights of the 0.5B.
This says nothing about the released weights, so conversion probes every checkpoint itself (docs/precision.md).
Ran: 2026-11-21, at commit b6e204d (record: benchmarks/results/activations.json).
Command at that commit: python benchmarks/activations.py

The demo checkpoint has trained weights. The 0.5B has random ones that are drawn so that activations stay small
(examples/checkpoints/random_checkpoint.py): it shows the depth of the real size, and nothing of what released weights do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
RESULT = ROOT / "benchmarks" / "results" / "activations.json"
PICTURE = ROOT / "docs" / "images" / "activations.png"
CHEAPEST = "int4"
"""Activations are probed in FP32 before anything is rounded, so they are the same for every precision; this one writes least."""
KINDS = {"residual": "residual stream", "product": "gate times up", "scores": "attention scores", "qkv": "q, k, v"}
COLOURS = {"demo": "tab:orange", "0.5B, random weights": "tab:blue"}
MARKERS = {"residual": "o", "product": "s", "scores": "^", "qkv": "v"}


def main() -> int:
    """Convert, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the random checkpoint is kept")
    parser.add_argument("--draw", action="store_true", help="only draw the picture again, from the record")
    options = parser.parse_args()
    if not options.draw:
        RESULT.write_text(json.dumps(measure(options.work), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULT.read_text(encoding="utf-8")), PICTURE)
    return 0


def measure(work: Path) -> dict[str, Any]:
    """The record of both models."""
    from benchmarks.common import machine
    from benchmarks.common.checkpoint import random_checkpoint
    from fastvlm_edge.convert.precision import FP16_MAX, FP16_SAFE

    random = random_checkpoint(work)
    return {
        "what": "largest magnitude on the stored pictures and conversation, in PyTorch in FP32, as convert writes it to fastvlm.json",
        "fp16_max": FP16_MAX,
        "widened_above": FP16_SAFE,
        "machine": machine.describe(),
        "models": {"demo": probe(DEMO, work), "0.5B, random weights": probe(random, work)},
    }


def probe(checkpoint: Path, work: Path) -> dict[str, Any]:
    """Activations of a checkpoint, and the types that `--precision fp16` gets from them."""
    from fastvlm_edge.convert.pipeline import convert
    from fastvlm_edge.convert.precision import Magnitudes, fit, precision_plan
    from fastvlm_edge.progress import stderr_progress

    with tempfile.TemporaryDirectory(dir=work) as folder:
        manifest = convert(str(checkpoint), Path(folder) / "model", precision=CHEAPEST, progress=stderr_progress())
    stages, layers = manifest.activations["largest"], manifest.activations["decoder"]
    plan = fit(precision_plan("fp16"), stages, Magnitudes(**layers))
    return {
        "model_sha256": manifest.source.files["model.safetensors"],
        "image_size": manifest.vision.image_size,
        "pictures": manifest.activations["pictures"],
        "vision": {stage: rounded(value) for stage, value in stages.items()},
        "decoder": {kind: [rounded(value) for value in values] for kind, values in layers.items()},
        "fp16_plan": plan.describe(),
    }


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Stages of the encoder on the left, layers of the LLM on the right, one logarithmic scale."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, width_ratios=(2, 3), layout="constrained")
    for name, model in document["models"].items():
        stages = model["vision"]
        left.plot(range(len(stages)), list(stages.values()), marker="o", markersize=4, color=COLOURS[name])
        left.set_xticks(range(len(stages)), [stage.replace("_", " ") for stage in stages], rotation=40, ha="right")
        for kind in KINDS:
            values = model["decoder"][kind]
            right.plot(range(len(values)), values, marker=MARKERS[kind], markersize=3.5, linewidth=0.9, color=COLOURS[name])
    left.set_title("encoder, largest of each stage")
    left.set_ylabel("magnitude")
    right.set_title("LLM, largest of each layer")
    right.set_xlabel("layer")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(1, 3 * document["fp16_max"])
        axes.axhline(document["fp16_max"], color="tab:red", linewidth=1.4)
        axes.axhline(document["widened_above"], color="tab:red", linewidth=1.2, linestyle="--")
        axes.grid(alpha=0.3)
    right.text(0, document["fp16_max"] * 1.15, f"FP16 ends at {document['fp16_max']:.0f}", color="tab:red", fontsize=9)
    right.text(0, document["widened_above"] / 1.9, "a quarter of it: wider type from here on", color="tab:red", fontsize=9)
    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in document["models"]]
    handles += [Line2D([], [], color="grey", marker=MARKERS[kind], markersize=4, linewidth=0.9, label=KINDS[kind]) for kind in KINDS]
    right.legend(handles=handles, ncols=2, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.62))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
