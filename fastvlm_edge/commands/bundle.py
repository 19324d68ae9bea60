"""`fastvlm-edge bundle`: write one executable file with the runtime, its packages and a model (docs/bundle.md)."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastvlm_edge.bundling.archive import check_new_file, write_bundle
from fastvlm_edge.bundling.wheels import collect_wheels
from fastvlm_edge.commands.arguments import given_path
from fastvlm_edge.machine.boards.systems import SYSTEMS
from fastvlm_edge.machine.boards.targets import BUNDLE_NAMES, bundle_target
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.progress import stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Write the bundle, and print its size."""
    options = parser().parse_args(arguments)
    target = bundle_target(options.target, options.python)
    read_manifest(options.model)  # a wrong directory is reported before anything is downloaded
    check_new_file(options.output, force=options.force)
    progress = stderr_progress()
    with tempfile.TemporaryDirectory() as scratch:
        progress.stage("collecting wheels")
        wheels = collect_wheels(target, options.wheels or Path(scratch))
        written = write_bundle(options.model, target, wheels, options.output, force=options.force, progress=progress)
    if options.json:
        rows = [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256} for wheel in written.wheels]
        figures = {"bytes": written.bytes, "model_bytes": written.model_bytes, "runtime_bytes": written.runtime_bytes}
        figures["runtime_unpacked_bytes"] = written.unpacked_bytes
        print(json.dumps({"path": str(written.path), "target": target.name, "python": list(target.python), **figures, "wheels": rows}))
        return 0
    python = "{}.{}".format(*target.python)
    parts = f"runtime {written.runtime_bytes / 1e6:.1f} MB, model {written.model_bytes / 1e6:.1f} MB"
    print(f"{written.path}: for {target.title}, Python {python}: {written.bytes / 1e6:.1f} MB ({parts})")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge bundle",
        description="Write one executable file with the runtime, its packages and a model, for a board without a network.",
        epilog="targets:\n"
        + "".join(f"  {row.name:10}{row.title}, Python {row.python[0]}.{row.python[1]}\n" for row in SYSTEMS.values())
        + f"also the names of one board, for the bundle of its system: {', '.join(name for name in BUNDLE_NAMES if name not in SYSTEMS)}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=given_path, help="model directory that fastvlm-edge convert wrote")
    parser.add_argument("-o", "--output", metavar="NAME", type=given_path, required=True, help="file to write")
    parser.add_argument("--target", metavar="NAME", required=True, help="the board or computer, see below")
    parser.add_argument("--python", metavar="3.X", type=_python, help="Python of the board, for aarch64 and x86_64 (default: this one's)")
    parser.add_argument(
        "--wheels",
        metavar="DIR",
        type=given_path,
        help="take the packages from this directory, without a network; an empty one is filled by downloading them",
    )
    parser.add_argument("--force", action="store_true", help="replace NAME if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _python(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a version such as 3.12")
    return int(found.group(1)), int(found.group(2))
