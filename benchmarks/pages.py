"""Whether weights in huge pages decode faster: `fastvlm-edge bench` with and without them, processes in turns.

    python -m benchmarks.pages [--work build/bench] [--processes 5] [--out benchmarks/results/pages.json]

FastVLM-0.5B with random weights in INT4 at 1024 px, made by `make bench`. Needs Linux's `madvise` setting and glibc 2.35 or newer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.peers.run import figures
from benchmarks.peers.workload import prepare
from fastvlm_edge.bench.measure import Settings
from fastvlm_edge.bench.processes import Measurement
from fastvlm_edge.bench.record import write_json
from fastvlm_edge.progress import stderr_progress

FIGURES = ("load_ms", "vision_ms", "prefill_ms", "decode_tokens_per_second", "peak_memory_mib")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WAYS = {"small pages": "0", "huge pages": "1"}


def main() -> int:
    """Measure both and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pages.json")
    options = parser.parse_args()
    prepare(options.work, "0.5b", stderr_progress())
    rounds: dict[str, list[dict[str, list[float]]]] = {way: [] for way in WAYS}
    for _ in range(options.processes):
        for way, value in WAYS.items():
            os.environ["GLIBC_TUNABLES"] = f"glibc.malloc.hugetlb={value}"
            measurement = Measurement(options.work / "int4", Settings("ort", options.threads, 2, depths=()), 1)
            for _ in measurement.run(stderr_progress()):
                pass
            document = measurement.document()
            rounds[way].append({name: [value for process in document[name]["samples"] for value in process] for name in FIGURES})
    results: dict[str, Any] = {way: figures(found) for way, found in rounds.items()}
    write_json(
        options.out,
        {
            "what": "FastVLM-0.5b, random weights, int4, 1024 px: the same processes with malloc in small and in huge pages",
            "machine": machine.describe(),
            "setting": SETTING.read_text(encoding="ascii").strip(),
            "threads": options.threads,
            "processes": options.processes,
            "results": results,
        },
    )
    print({way: {name: figure["median"] for name, figure in found.items()} for way, found in results.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
