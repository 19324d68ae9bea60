"""Exact match of the demo model on held-out questions, in every precision, through the runtime that answers them.

python -m benchmarks.demo_accuracy [--count 2000] [--out benchmarks/results/demo_accuracy.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.peers.demo import DEMO
from examples.demo_training.evaluate import score
from examples.demo_training.scenes import make_scene
from fastvlm_edge import FastVLM
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.model_dir.manifest import PRECISIONS, sha256

SEED = 2026
"""A seed that the checks during training do not use."""


def main() -> int:
    """Measure every precision, write the record and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_accuracy.json")
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    options = parser.parse_args()
    document = {
        "what": "exact match of the demo model, greedy, one question a picture, by the onnxruntime backend",
        "model_sha256": sha256(options.checkpoint / "model.safetensors"),
        "split": "heldout",
        "seed": SEED,
        "count": options.count,
        "machine": machine.describe(),
        "results": {precision: measure(options.checkpoint, precision, options.count) for precision in PRECISIONS},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_table(document["results"])
    return 0


def measure(checkpoint: Path, precision: str, count: int) -> dict[str, Any]:
    """Size of the model directory, exact match by kind, and agreement of the graphs with PyTorch."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = convert(str(checkpoint), Path(folder) / "model", precision=precision)
        with FastVLM.load(Path(folder) / "model") as vlm:
            for index in range(count):
                scene = make_scene("heldout", SEED, index, size=manifest.vision.image_size)
                pairs.append((scene, vlm.generate(scene.questions[0].prompt, image=scene.image, max_new_tokens=16).text))
                if index % 50 == 49:
                    print(f"\r{precision}: {index + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"bytes": sum(record.bytes for record in manifest.files.values()), "parity": manifest.parity, "scores": score(pairs)}


def print_table(results: dict[str, Any]) -> None:
    """Print percent correct by kind of question and precision."""
    kinds = list(next(iter(results.values()))["scores"])
    print(f"{'':22}" + "".join(f"{precision:>8}" for precision in results))
    for kind in kinds:
        print(f"{kind:22}" + "".join(f"{100 * result['scores'][kind]['exact_match']:8.1f}" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
