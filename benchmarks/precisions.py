"""`fastvlm-edge bench` of every precision at real size, drawn with what the precision costs in accuracy.

    python -m benchmarks.precisions [--work build/bench] [--out benchmarks/results/bench.json] [--plot docs/images/cpu]

Speeds are those of random weights of the 0.5B size, which are as fast as trained ones but have no right answers. Accuracy is that of the
demo model, from quantization.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.workload import prepare
from fastvlm_edge.bench.plot import draw
from fastvlm_edge.progress import stderr_progress

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = {"fp32": "fp32", "int8": "int8 calibrated", "int4": "int4 calibrated"}
"""Precision -> the row of quantization.json with its accuracy."""


def main() -> int:
    """Measure every precision, write the record and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where checkpoint and model directories are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/cpu"))
    parser.add_argument("--draw", action="store_true", help="only draw what is recorded")
    options = parser.parse_args()
    if not options.draw:
        prepare(options.work, "0.5b", stderr_progress())
        models = [str(options.work / precision) for precision in PRECISIONS]
        subprocess.run([sys.executable, "-m", "fastvlm_edge", "bench", *models, "-o", str(options.out)], check=True)
    records = json.loads(options.out.read_text(encoding="utf-8"))["results"]
    for path in draw(options.plot, records, evaluations()):
        print(path)
    return 0


def evaluations() -> list[dict[str, Any]]:
    """The accuracies of quantization.json in the form that `fastvlm-edge eval --json` prints."""
    results = json.loads((RESULTS / "quantization.json").read_text(encoding="utf-8"))["results"]
    return [{**results[contender], "precision": precision} for precision, contender in PRECISIONS.items()]


if __name__ == "__main__":
    sys.exit(main())
