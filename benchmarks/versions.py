"""Is this checkout as fast on a CPU as an earlier one? The same questions with both, processes in turns.

    python -m benchmarks.versions BEFORE [--work build/bench] [--processes 7] [--precision int4] [--out benchmarks/results/versions.json]

BEFORE is a clone at the earlier commit. Both checkouts convert the demo and FastVLM-0.5B with random weights, and each runs its
own `fastvlm-edge bench` on what it converted, in this Python environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.checkpoint import random_checkpoint
from benchmarks.common.rounds import figures, take_turns
from benchmarks.peers.demo import DEMO
from benchmarks.peers.protocol import ROOT, Samples
from fastvlm_edge.bench.record import figures_of, write_json

BEFORE, AFTER = "before", "after"


def main() -> int:
    """Convert and measure both models with both checkouts, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "versions.json")
    options = parser.parse_args()
    checkouts = {BEFORE: options.before.resolve(), AFTER: ROOT}
    results: dict[str, Any] = {}
    for name, checkpoint, runs in (("0.5b", random_checkpoint(options.work, "0.5b"), 3), ("demo", DEMO, 40)):
        models = {side: convert(checkout, checkpoint, options, f"{name}-{side}") for side, checkout in checkouts.items()}

        def measure(side: str, models: dict[str, Path] = models, runs: int = runs) -> Samples:
            arguments = ["bench", str(models[side]), "--processes", "1", "--runs", str(runs), "--threads", str(options.threads)]
            document = json.loads(command(checkouts[side], *arguments, "--backend", "ort", "--json"))
            return {field: found["samples"][0] for field, found in figures_of(document).items()}

        print(name, file=sys.stderr, flush=True)
        found = take_turns((BEFORE, AFTER), options.processes, measure, rotate=True)
        results[name] = {side: figures(samples, [*samples[0]]) for side, samples in found.items()}
        print(name, {side: {field: figure["median"] for field, figure in each.items()} for side, each in results[name].items()})
    document = {
        "what": f"FastVLM-0.5b with random weights at 1024 px, and the demo, {options.precision}: this checkout and an earlier one",
        "machine": machine.describe(),
        "commits": {side: commit(checkout) for side, checkout in checkouts.items()},
        "threads": options.threads,
        "processes": options.processes,
        "results": results,
    }
    write_json(options.out, document)
    return 0


def convert(checkout: Path, checkpoint: Path, options: argparse.Namespace, name: str) -> Path:
    """The model directory that a checkout makes of a checkpoint."""
    target: Path = (options.work / "versions" / f"{name}-{commit(checkout)}").resolve()
    if not target.is_dir():
        command(checkout, "convert", str(checkpoint.resolve()), "-o", str(target), "--precision", options.precision)
    return target


def command(checkout: Path, *arguments: str) -> str:
    """What a command of the toolkit prints in a checkout. Raises CalledProcessError if it fails; its messages are on stderr."""
    return subprocess.run(
        [sys.executable, "-m", "fastvlm_edge", *arguments], cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def commit(checkout: Path) -> str:
    """Short hash of a checkout's commit, with a plus sign if files are changed."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
