"""FastVLM-0.5B on a CPU beside transformers in one run, and where the time goes, by onnxruntime's own profiler.

    python -m benchmarks.cpu [--work DIR] [--out benchmarks/results/cpu.json]

The protocol is that of the peers (`benchmarks/peers/run.py`, which has more of them): random weights of the real 0.5B size, 256 visual and
34 text tokens at 1024 px, greedy, 2 threads, every contender in a process of its own, all of them once a round. Everything runs in the
environment of `make setup`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONTENDERS = {
    "transformers:float32": ("transformers_fastvlm", "float32"),
    "transformers:bfloat16": ("transformers_fastvlm", "bfloat16"),
    "fastvlm-edge:fp32": ("ours", "fp32"),
    "fastvlm-edge:int8": ("ours", "int8"),
    "fastvlm-edge:int4": ("ours", "int4"),
}


def main() -> int:
    """Run the benchmark and write its JSON."""
    from benchmarks import machine
    from benchmarks.peers.run import call, figures, print_table
    from benchmarks.peers.workload import prepare
    from fastvlm_edge.bench.record import write_json
    from fastvlm_edge.progress import stderr_progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where checkpoint and model directories are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2, help="timed runs a process after a warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=("0.5b", "tiny"), default="0.5b", help="tiny is a smoke test")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.work, options.size, stderr_progress())
    rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds):
        for name, (module, variant) in CONTENDERS.items():
            print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
            arguments = ["--work", str(options.work.resolve()), "--threads", str(options.threads), "--runs", str(options.runs)]
            out = call([sys.executable, "-m", f"benchmarks.peers.{module}", *arguments, "--measure", variant])
            rounds[name].append(json.loads(out.splitlines()[-1])["samples"])
    document: dict[str, Any] = {
        "what": f"FastVLM-{options.size} (random weights), 34 text tokens, greedy",
        "machine": machine.describe(),
        "limits": machine.limits(options.threads),
        "threads": options.threads,
        "results": {name: figures(found) for name, found in rounds.items()},
        "where_the_time_goes": where_the_time_goes(options.work, options.threads),
    }
    write_json(options.out, document)
    print_table(document)
    print(f"limits: {document['limits']}")
    return 0


def where_the_time_goes(work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds by operator of one picture (FP32 and INT8 encoder), one prefill of 290 and one decoded token (INT4)."""
    from benchmarks.operators import by_operator

    return {
        "vision, fp32": by_operator(work / "fp32", "vision", threads),
        "vision, int4": by_operator(work / "int4", "vision", threads),
        "prefill of 290, int4": by_operator(work / "int4", "prefill", threads),
        "decode at 300, int4": by_operator(work / "int4", "decode", threads),
    }


if __name__ == "__main__":
    sys.exit(main())
