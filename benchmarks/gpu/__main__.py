"""FastVLM-0.5B on one NVIDIA GPU, side by side in one run: our backends, transformers eager and compiled, and what the GPU allows at most.

    python -m benchmarks.gpu [--checkpoint DIR] [--precisions fp16,int8,int4] [--runs 5] [--only NAME,NAME] [--out FILE]

Parity comes first: greedy replies of the demo model against onnxruntime on the CPU, and the cosines of `fastvlm-edge build`. Then one
picture of 1024 px and 34 tokens of text, 128 decoded tokens behind 290 and behind 1,900 positions. Every step runs in a process of its
own, so its device memory is its own. The record is written after every figure: a run that is cut off keeps what it has, and the next one
finds checkpoint, model directories and engines in `--work`. Random weights stand in for the released ones, as in benchmarks/cpu.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.run import Run
from benchmarks.gpu.steps import be_step
from benchmarks.gpu.workload import Task
from fastvlm_edge.model_dir.manifest import PRECISIONS


def main() -> int:
    """Run the benchmark, or be one step of it."""
    options = parse(sys.argv[1:])
    task = Task(options.work, options.checkpoint or options.work / "checkpoint", tuple(options.precisions.split(",")), options.runs)
    if options.step:
        return be_step(options.step, task)
    return Run(task, options.out, options.only.split(",") if options.only else None, options.limit, prepare=options.prepare).run()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Exits with a sentence where a precision or a number is none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="native layout; default: the random 0.5B, made in --work")
    parser.add_argument("--precisions", default="fp16,int8,int4", help="of the model directories; default: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="timed runs after the warm-up; default: %(default)s")
    parser.add_argument(
        "--only", help="names or beginnings of contenders, such as tensorrt,ort-cuda; the others keep their recorded figures"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    parser.add_argument("--work", type=Path, default=Path("build/bench-gpu"), help="where checkpoint, models and engines are kept")
    parser.add_argument(
        "--limit", type=float, default=470, help="seconds in all; what has not begun by then is left out; default: %(default)s"
    )
    parser.add_argument("--prepare", action="store_true", help="only convert and build, so that a later run has the whole limit to measure")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for precision in options.precisions.split(","):
        if precision not in PRECISIONS:
            parser.error(f"precision {precision!r} is unknown; choose from {', '.join(PRECISIONS)}")
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; give at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
