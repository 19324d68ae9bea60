"""FastVLM-0.5B on a CPU beside transformers in one run, and where the time goes, by onnxruntime's own profiler.

    python -m benchmarks.cpu [--rounds 3] [--runs 2] [--threads 2] [--out FILE]

Five contenders of `benchmarks/peers/run.py`, which has more of them. Here they all run in the environment of `make setup`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common.operators import by_operator
from benchmarks.peers.run import RESULTS, Run, contenders, parser, settle
from fastvlm_edge.bench.record import write_json

CONTENDERS = ("transformers:float32", "transformers:bfloat16", "fastvlm-edge:fp32", "fastvlm-edge:int8", "fastvlm-edge:int4")


def main() -> int:
    """Run the benchmark and write its JSON."""
    made = parser("benchmarks.cpu", __doc__, RESULTS / "cpu.json")
    made.set_defaults(rounds=3, runs=2)
    options = settle(made.parse_args())
    options.envs = None
    run = Run(options, contenders(CONTENDERS))
    status = run.run()
    write_json(options.out, run.document() | {"where_the_time_goes": where_the_time_goes(options.work, options.threads)})
    return status


def where_the_time_goes(work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds by operator of one picture (FP32 and INT8 encoder), one prefill of 290 positions and one decoded token (INT4)."""
    return {
        "vision, fp32": by_operator(work / "fp32", "vision", threads),
        "vision, int4": by_operator(work / "int4", "vision", threads),
        "prefill of 290, int4": by_operator(work / "int4", "prefill", threads),
        "decode at 300, int4": by_operator(work / "int4", "decode", threads),
    }


if __name__ == "__main__":
    sys.exit(main())
