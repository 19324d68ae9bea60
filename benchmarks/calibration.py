"""Calibrating a checkpoint of real size: seconds of every stage, peak memory, types of the products, and the engines built from it.

    python -m benchmarks.calibration [--work build/bench] [--examples 128] [--precision int8 int4]

Random weights of the 0.5B size at the image size it was trained at, pictures and questions of the demo. The first precision starts with an
empty cache, the others use what it left there. Every step is a process of its own. Engines are built by TensorRT for RTX, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.checkpoint import random_checkpoint
from examples.demo_training.scenes import scene_questions
from fastvlm_edge.model_dir.manifest import read_manifest

RESULT = Path(__file__).resolve().parent / "results" / "calibration.json"
TARGET = "sm86"


def main() -> int:
    """Calibrate and build every precision, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the random checkpoint is kept")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    options = parser.parse_args()
    checkpoint, folder = random_checkpoint(options.work), options.work / "calibrated"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "FASTVLM_EDGE_CACHE": str(folder / "cache")}
    document: dict[str, Any] = {
        "what": __doc__.split("\n\n")[2].replace("\n", " ").strip(),
        "examples": options.examples,
        "machine": machine.describe(),
        "results": {},
    }
    data = scene_questions(options.work, "calibration", options.examples)
    for precision in options.precision:
        model = folder / precision
        calibrate = ["convert", checkpoint, "-o", model, "--precision", precision, "--calib", data, "--calib-limit", options.examples]
        row: dict[str, Any] = {"calibrate": run(calibrate, environment)}
        report = json.loads((model / "quantization.json").read_text(encoding="utf-8"))
        groups, manifest = report["vision"]["groups"], read_manifest(model)
        row |= {
            "image_size": manifest.vision.image_size,
            "parity": manifest.parity,
            "share_of_macs": {part: shares(macs) for part, macs in report["placement"].items()},
            "groups_not_int8": [group["name"] for group in groups if group["relative_error"] and group["decision"] != "int8"],
            "weights_mb": {path.name: megabytes(path) for path in sorted(model.glob("*.weights"))},
            "build": run(["build", model, "--target", TARGET], environment),
            "engines_mb": {path.name: megabytes(path) for path in sorted(model.glob("engines/*/*.engine"))},
        }
        document["results"][precision] = row
        print(precision, json.dumps(row), flush=True)
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def run(command: Sequence[object], environment: dict[str, str]) -> dict[str, Any]:
    """Run `fastvlm-edge` with these arguments: seconds in total and by stage, and peak memory in MiB. Exits if it fails."""
    began = time.monotonic()
    words = [sys.executable, "-m", "fastvlm_edge", *map(str, command)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{said}")
    stages = {name: float(seconds) for name, seconds in re.findall(r"^(.+?)  ([\d.]+) s$", said, re.MULTILINE)}
    return {"seconds": round(time.monotonic() - began, 1), "stages": stages, "peak_memory_mib": usage.ru_maxrss // 1024}


def shares(macs: dict[str, int]) -> dict[str, float]:
    """Type that computes -> its share of all multiply-accumulates."""
    return {name: round(count / sum(macs.values()), 4) for name, count in macs.items()}


def megabytes(path: Path) -> float:
    """Size of a file in MB."""
    return round(path.stat().st_size / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())
