"""Size of a bundle's runtime for every target and Python, the wheels that were resolved, and the time of a start beside PEX.

    python -m benchmarks.bundle_sizes
    python -m benchmarks.bundle_sizes --sizes    # renews the sizes and keeps the starts

Needs a package index. Writes benchmarks/results/bundle_sizes.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.common.checkpoint import random_checkpoint
from benchmarks.common.machine import describe
from fastvlm_edge.bundling.archive import Written, write_bundle
from fastvlm_edge.bundling.wheels import collect_wheels
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.machine.boards.systems import SYSTEMS
from fastvlm_edge.machine.boards.targets import bundle_target

RESULT = Path(__file__).parent / "results" / "bundle_sizes.json"
PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13))
LIMIT = 120_000_000
"""Bytes that the runtime in a bundle may take."""
STARTS = 7
PADDING = 1_000_000_000
"""Bytes beside the tiny model in the comparison of starts, as large as a 0.5B model in FP16."""


def measure_sizes(work: Path, model: Path) -> list[dict[str, Any]]:
    """One row per target and Python version. Raises AssertionError if a runtime is larger than LIMIT."""
    rows = []
    for name, row in SYSTEMS.items():
        for python in (None,) if row.cuda is not None else PYTHONS:
            target = bundle_target(name, python)
            label = "{}.{}".format(*target.python)
            wheels = collect_wheels(target, work / f"wheels-{name}-{label}")
            written = write_bundle(model, target, wheels, work / f"{name}-{label}")
            assert written.runtime_bytes <= LIMIT, f"{name}: {written.runtime_bytes}"
            listed = {
                wheel.name: {"version": wheel.version, "sha256": wheel.sha256, "bytes": wheel.path.stat().st_size} for wheel in wheels
            }
            rows.append({"target": name, "python": label, **_sizes(written), "wheels": listed})
            print(
                f"{name:10}{label:6}{written.runtime_bytes / 1e6:7.1f} MB, unpacked {written.unpacked_bytes / 1e6:.1f} MB", file=sys.stderr
            )
            written.path.unlink()
    return rows


def _sizes(written: Written) -> dict[str, int]:
    return {"runtime_bytes": written.runtime_bytes, "unpacked_bytes": written.unpacked_bytes}


@dataclass(frozen=True)
class Program:
    """A file that is started again and again with a state directory of its own."""

    file: Path
    command: list[str]
    made_s: float


def compare_starts(work: Path, model: Path) -> dict[str, Any]:
    """A bundle and two PEX files with the same wheels and model, started in turns: size, seconds to make and to start, bytes unpacked.

    `pex` has PEX's defaults. `pex_venv` was made with --venv: it installs itself at the first start, and does not boot through its own
    runtime at later ones.
    """
    target = bundle_target("x86_64", None)
    wheels = work / "wheels-x86_64-{}.{}".format(*target.python)
    with (model / "LICENSE.padding").open("wb") as file:
        for _ in range(PADDING // 1_000_000):
            file.write(os.urandom(1_000_000))
    question = ["--prompt", "What is it?", "--max-new-tokens", "4"]
    began = time.perf_counter()
    ours = write_bundle(model, target, collect_wheels(target, wheels), work / "ours").path
    programs = {"bundle": Program(ours, [str(ours), "run", *question], time.perf_counter() - began)}
    _lay_out_pex(work, model)
    files = [str(path) for path in wheels.glob("*.whl")]
    programs["pex"] = _make_pex(work, "pex", [], files, question)
    programs["pex_venv"] = _make_pex(work, "pex_venv", ["--venv"], files, question)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(STARTS):
        for name, program in programs.items():
            state = work / f"state-{name}"
            environment = {**os.environ, "FASTVLM_EDGE_STATE": str(state), "PEX_ROOT": str(state)}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a PEX would compile everything at every start
            began = time.perf_counter()
            subprocess.run(program.command, env=environment, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return {name: _row(program, seconds[name], work / f"state-{name}") for name, program in programs.items()}


def _lay_out_pex(work: Path, model: Path) -> None:
    """Write what goes into a PEX besides the wheels: our own wheel into `own`, the model and the entry point into `sources`."""
    repository = Path(__file__).parents[1]
    own = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(repository), "-w", str(work / "own")]
    subprocess.run(own, check=True, capture_output=True)
    sources = work / "sources"
    (sources / "bundled").mkdir(parents=True)
    (sources / "bundled" / "__init__.py").touch()
    entry = "import sys, os; from fastvlm_edge import cli; import bundled; "
    entry += "sys.exit(cli.main(['run', os.path.join(os.path.dirname(bundled.__file__), 'model'), *sys.argv[1:]]))"
    (sources / "pex_main.py").write_text(entry + "\n", encoding="utf-8")
    shutil.copytree(model, sources / "bundled" / "model", copy_function=os.link)


def _make_pex(work: Path, name: str, options: list[str], wheels: list[str], question: list[str]) -> Program:
    file = work / f"{name}.pex"
    fixed = ["--no-pypi", "--intransitive", "--no-compress", "-D", str(work / "sources"), "-m", "pex_main", "-o", str(file)]
    began = time.perf_counter()
    command = [sys.executable, "-m", "pex", *options, *fixed, *wheels, *map(str, (work / "own").glob("*.whl"))]
    subprocess.run(command, check=True, capture_output=True)
    # The interpreter that a board has: with that of a virtual environment, a PEX boots once more to leave the environment.
    python = os.path.realpath(sys.executable)
    return Program(file, [python, str(file), *question], time.perf_counter() - began)


def _row(program: Program, seconds: list[float], state: Path) -> dict[str, Any]:
    unpacked = int(subprocess.run(["du", "-sB1", str(state)], capture_output=True, text=True, check=True).stdout.split()[0])
    return {
        "bytes": program.file.stat().st_size,
        "made_s": round(program.made_s, 2),
        "first_start_s": round(seconds[0], 2),
        "later_start_s": round(statistics.median(seconds[1:]), 2),
        "later_starts_s": [round(each, 2) for each in seconds[1:]],
        "unpacked_bytes": unpacked,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure everything, or with `--sizes` only the sizes, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "model"
        convert(str(random_checkpoint(work, "tiny")), model, precision="fp32")
        rows = measure_sizes(work, model)
        today = date.today().isoformat()
        if list(arguments) == ["--sizes"]:
            before = json.loads(RESULT.read_text(encoding="utf-8"))
            starts, starts_measured = before["starts"], before["starts_measured"]
        else:
            starts, starts_measured = compare_starts(work, model), today
    document = {"date": today, "machine": describe(), "limit_bytes": LIMIT, "targets": rows}
    document |= {"starts": starts, "starts_measured": starts_measured}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
