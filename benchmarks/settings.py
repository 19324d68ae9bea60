"""What each of the runtime's settings brings on a CPU: the same questions with and without it, processes in turns.

    python -m benchmarks.settings [--work build/bench] [--processes 5] [--out benchmarks/results/settings.json]

FastVLM-0.5B with random weights in INT4 at 1024 px, made by `make bench`, and the demo model in INT4, whose calls are short. Huge
pages need glibc 2.35 and Linux's setting `madvise`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.rounds import call, figures, take_turns
from benchmarks.peers.demo import DEMO
from benchmarks.peers.protocol import Samples
from benchmarks.peers.runtimes.ours import samples_of
from benchmarks.peers.workload import prepare
from fastvlm_edge.bench.measure import Settings
from fastvlm_edge.bench.record import write_json
from fastvlm_edge.progress import stderr_progress

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
AS_SHIPPED, HEAP, SPINNING, HUGE = "as shipped", "heap left to glibc", "spinning left to onnxruntime", "weights in huge pages"
WAYS = (AS_SHIPPED, HEAP, SPINNING, HUGE)


def main() -> int:
    """Measure every setting on both models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "settings.json")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "MODEL", "RUNS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_process(options.one[0], Path(options.one[1]), int(options.one[2]), options.threads)
        return 0
    prepare(options.work, "0.5b", stderr_progress())
    models = {"0.5b": (options.work / "int4", 3), "demo": (demo(options.work), 40)}
    results: dict[str, Any] = {}
    for name, (directory, runs) in models.items():

        def measure(way: str, directory: Path = directory, runs: int = runs) -> Samples:
            command = [sys.executable, "-m", "benchmarks.settings", "--threads", str(options.threads)]
            huge = {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(way == HUGE)}"}
            samples: Samples = json.loads(call([*command, "--one", way, str(directory.resolve()), str(runs)], environment=huge))
            return samples

        print(name, file=sys.stderr, flush=True)
        results[name] = {way: figures(found) for way, found in take_turns(WAYS, options.processes, measure, rotate=True).items()}
        print(name, {way: {field: figure["median"] for field, figure in found.items()} for way, found in results[name].items()})
    document = {
        "what": "FastVLM-0.5b, random weights, 1024 px, and the demo model, both int4: the same processes with and without a setting",
        "machine": machine.describe(),
        "huge_pages": HUGE_PAGES.read_text(encoding="ascii").strip() if HUGE_PAGES.is_file() else None,
        "threads": options.threads,
        "processes": options.processes,
        "runs": {name: runs for name, (_, runs) in models.items()},
        "results": results,
    }
    write_json(options.out, document)
    return 0


def demo(work: Path) -> Path:
    """The demo model in INT4, converted anew, which takes a second."""
    from fastvlm_edge.convert.pipeline import convert

    convert(str(DEMO), work / "demo-int4", precision="int4", force=True, progress=stderr_progress())
    return work / "demo-int4"


def one_process(way: str, directory: Path, runs: int, threads: int) -> None:
    """Measure one way in this process and print the samples."""
    from fastvlm_edge.backends import malloc, ort_session

    if way == HEAP:
        malloc.loading = contextlib.nullcontext  # type: ignore[assignment]
    if way == SPINNING:
        ort_session.SPIN_MICROSECONDS = -1
    print(json.dumps(samples_of(directory, Settings("ort", threads, runs, depths=()))))


if __name__ == "__main__":
    sys.exit(main())
