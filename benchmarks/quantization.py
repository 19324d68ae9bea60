"""What quantisation costs the demo model: size, exact match by kind, agreement with FP32, CPU speed; rounded and calibrated side by side.

    python -m benchmarks.quantization [--count 2000] [--out benchmarks/results/quantization.json] [--speed]

`--speed` only measures the speeds of a record again, on a machine that does nothing else. `gpu graphs` are those that TensorRT gets, with
INT8 activations where the plan has them, computed by onnxruntime on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.rounds import figures, take_turns
from benchmarks.peers.demo import DEMO
from benchmarks.peers.protocol import Samples
from examples.demo_training.scenes import SEED, scene_questions
from fastvlm_edge import FastVLM
from fastvlm_edge.calib.quantizer import Options, Quantizer
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import Evaluation
from fastvlm_edge.evaluation.subject import Subject
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest, sha256
from fastvlm_edge.progress import stderr_progress

CALIBRATION = 512
ROUNDS, WARM_UP, TIMED = 5, 3, 10
"""Of every variant, for its speed: variants take turns, so that noise hits all of them alike."""


@dataclass(frozen=True)
class Variant:
    """A precision, rounded to nearest or calibrated, and which of its graphs runs."""

    precision: str
    calibrated: bool = False
    gpu_graphs: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        how = "" if self.precision in ("fp32", "fp16", "bf16") else " calibrated" if self.calibrated else " rounded"
        return f"{self.precision}{how}{', gpu graphs' if self.gpu_graphs else ''}"


VARIANTS = (
    Variant("fp32"),
    Variant("fp16"),
    Variant("bf16"),
    Variant("int8"),
    Variant("int8", calibrated=True),
    Variant("int8", calibrated=True, gpu_graphs=True),
    Variant("int4"),
    Variant("int4", calibrated=True),
    Variant("int4", calibrated=True, gpu_graphs=True),
)


def main() -> int:
    """Measure every variant and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantization.json")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    if options.speed:
        with tempfile.TemporaryDirectory() as folder:
            measure_speed(json.loads(options.out.read_text(encoding="utf-8")), options.checkpoint, Path(folder), options.out)
        return 0
    document: dict[str, Any] = {
        "what": "the demo model on held-out questions, greedy, one question per picture, compared with itself in FP32",
        "model_sha256": sha256(options.checkpoint / "model.safetensors"),
        "data": f"{options.count} scenes of the split heldout, seed {SEED}",
        "calibration": f"{CALIBRATION} scenes of the split calibration, seed {SEED}",
        "machine": machine.describe(),
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "fp32"
        for variant in VARIANTS:
            document["results"][variant.name] = measure(variant, options.checkpoint, Path(folder), reference, options.count)
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print_row(variant.name, document["results"][variant.name])
        measure_speed(document, options.checkpoint, Path(folder), options.out)
    return 0


def measure_speed(document: dict[str, Any], checkpoint: Path, folder: Path, out: Path) -> None:
    """Measure the speeds of all variants in turns, and put them into a record."""
    models = {each.name: make_model(each, checkpoint, folder) for each in VARIANTS if not each.gpu_graphs}
    for name, found in speeds(models, scene_questions(folder, "heldout", WARM_UP + TIMED)).items():
        document["results"][name]["speed"] = found
    document["speed_machine"] = machine.describe()
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def make_model(variant: Variant, checkpoint: Path, folder: Path) -> Path:
    """The variant's model directory, made where it is not there yet."""
    model = folder / f"{variant.precision}{'-calibrated' if variant.calibrated else ''}"
    if not model.exists():
        calibrate = (
            Quantizer(Options(str(scene_questions(folder, "calibration", CALIBRATION)), limit=CALIBRATION)).calibrate
            if variant.calibrated
            else None
        )
        convert(str(checkpoint), model, precision=variant.precision, calibrate=calibrate, progress=stderr_progress())
    return model


def measure(variant: Variant, checkpoint: Path, folder: Path, reference: Path, count: int) -> dict[str, Any]:
    """Accuracy and agreement of one variant."""
    model = make_model(variant, checkpoint, folder)
    manifest = read_manifest(model)
    row: dict[str, Any] = {
        "bytes": sum(manifest.files[name].bytes for name in ("vision.weights", "decoder.weights")),
        "parity": manifest.parity,
    }
    if variant.calibrated:
        report = json.loads((model / "quantization.json").read_text(encoding="utf-8"))
        macs = report["placement"]["vision"]
        row["int8_share_of_vision"] = macs.get("INT8", 0) / sum(macs.values())
    if variant.gpu_graphs:
        model = without_cpu_graphs(model, folder / f"{model.name}-gpu", manifest)
    with Subject.load(model, "ort") as subject, Subject.load(reference, "ort") as fp32:
        evaluation = Evaluation(subject, open_data(scene_questions(folder, "heldout", count)), reference=fp32, max_new_tokens=16)
        evaluation.run(progress=stderr_progress())
    figures = evaluation.report()
    return row | {name: figures[name] for name in ("exact_match", "by_kind", "count", "token_agreement", "kl_divergence", "perplexity")}


def without_cpu_graphs(model: Path, copy: Path, manifest: Manifest) -> Path:
    """The same model directory, in which the runtime finds the graphs for a GPU alone."""
    copy.mkdir()
    kept = {name: record for name, record in manifest.files.items() if not name.endswith(".cpu.onnx")}
    for name in kept:
        os.link(model / name, copy / name)
    replace(manifest, files=kept).write(copy)
    return copy


def speeds(models: dict[str, Path], questions: Path) -> dict[str, dict[str, Any]]:
    """Milliseconds of vision and prefill, tokens/s of decoding: median, minimum, maximum and samples; models loaded anew, in turns."""
    fields = ("vision_ms", "prefill_ms", "decode_tokens_per_second")

    def measure(name: str) -> Samples:
        with FastVLM.load(models[name], "ort", tune_process=True) as vlm:
            timings = [reply.timings for reply in _replies(vlm, questions)][WARM_UP:]
        return {each: [getattr(timing, each) for timing in timings] for each in fields}

    return {name: figures(found, fields) for name, found in take_turns(list(models), ROUNDS, measure).items()}


def _replies(vlm: FastVLM, questions: Path) -> Iterator[Any]:
    for _, image in open_data(questions).read():
        yield vlm.generate("Describe the picture in one sentence.", image=image, max_new_tokens=16)


def print_row(name: str, row: dict[str, Any]) -> None:
    """One line a variant."""
    print(
        f"{name:28} {row['bytes'] / 1e6:7.2f} MB  exact {100 * row['exact_match']:.2f} %  agreement {100 * row['token_agreement']:.2f} %  "
        f"KL {row['kl_divergence']:.2e}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
