"""Calibrating the encoder for several sizes of pictures: at which sizes should its inputs be observed?

Question: Do the scales of INT8 activations that were calibrated at one size of pictures hold at others?
Verdict: those of 128 px double the loss at 256 px. Pictures at all sizes, half as many of each, have the least loss at every size. The
product observes every picture at all sizes.
Ran: 2026-11-29, at commit a6e7807 (record: benchmarks/results/calibration_sizes.json).
Command at that commit: python -m benchmarks.studies.calibration_sizes QUESTIONS

QUESTIONS is a file of 40 scenes of the demo's calibration split (`examples.demo_training.scenes.scene_questions`), of which the last TESTED
and the stored pictures judge: 1 - cosine of the image features to those of the demo's encoder in FP32. It was trained at 192 px.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import describe
from fastvlm_edge.backends.verification.conversation import stored_pictures
from fastvlm_edge.calib.encoder.search import VisionSearch, cosine_loss
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.parity import probe_activations
from fastvlm_edge.convert.precision import precision_plan
from fastvlm_edge.convert.rescaling import move_in_encoder, watch_encoder
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.inputs.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "calibration_sizes.json"
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
SIZES = (128, 192, 256)
ALONE, TOGETHER, TESTED = 32, 16, 8
"""Pictures of one size alone, and of each size if there are several."""
BOUND = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    options = parser.parse_args()
    torch.set_num_threads(2)
    source = open_checkpoint(str(DEMO))
    encoder, projector = load_vision(source), load_projector(source)
    with watch_encoder(encoder) as channels:
        for size in SIZES:
            probe_activations(encoder, projector, stored_pictures(size, "pad"))
    move_in_encoder(encoder, channels)
    images = [image for _, image in open_data(options.questions, limit=ALONE + TESTED).read(minimum=1)]
    tested = {
        size: [torch.from_numpy(preprocess(image, size, "pad")) for image in images[ALONE:]]
        + [torch.from_numpy(pixels) for pixels in stored_pictures(size, "pad")]
        for size in SIZES
    }
    document: dict[str, Any] = {"machine": describe(), "results": []}
    for observed in (*((size,) for size in SIZES), SIZES):
        count = ALONE if len(observed) == 1 else TOGETHER
        seen = [preprocess(image, size, "pad") for image in images[:count] for size in observed]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            search = VisionSearch(encoder, projector, precision_plan("int8"), folder=Path(folder))
            search.observe(seen)
            search.measure(seen[: 2 * len(observed)])
            chosen = search.choose(seen, bound=BOUND, measured=2 * len(observed))
            for size, pictures in tested.items():
                for unit in search.units:
                    unit.use("wide")
                expected = [search.run(pixels) for pixels in pictures]
                search.apply(chosen)
                losses = [cosine_loss(search.run(pixels), wanted) for pixels, wanted in zip(pictures, expected, strict=True)]
                row = {"observed": list(observed), "pictures": count, "size": size, "mean": sum(losses) / len(losses), "worst": max(losses)}
                print(row, flush=True)
                document["results"].append(row)
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
