"""`fastvlm-edge doctor`: what this machine is, what is missing, and the commands that put it right. Needs only Python."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fastvlm_edge.commands.arguments import given
from fastvlm_edge.doctor.check_board import check_board
from fastvlm_edge.doctor.check_model import check_model
from fastvlm_edge.doctor.check_onnxruntime import check_onnxruntime
from fastvlm_edge.doctor.check_software import check_software
from fastvlm_edge.doctor.facts import read_facts
from fastvlm_edge.doctor.findings import worst
from fastvlm_edge.doctor.report import to_json, to_text
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str], probe: Probe | None = None) -> int:
    """Print the report. Returns 1 if there is a problem, otherwise 0. `probe` is this machine, unless a test gives another."""
    options = parser().parse_args(arguments)
    model = Path(options.model) if options.model else None
    progress = SilentProgress() if options.json else stderr_progress()
    progress.stage("importing every package")
    try:
        facts = read_facts(probe or Probe(), model)
    finally:
        progress.done()
    findings = check_board(facts) + check_software(facts) + check_onnxruntime(facts)
    if model is not None:
        progress.stage("reading every file of the model")
        try:
            findings += check_model(model, facts)
        finally:
            progress.done()
    print(json.dumps(to_json(facts, findings), ensure_ascii=False) if options.json else to_text(findings))
    return 1 if worst(findings) == "problem" else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge doctor",
        description="Examine this machine, and say what keeps FastVLM from running well. The exit status is 1 if there is a problem.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=given,
        nargs="?",
        help="model directory: also check that it is complete and that its engines run on this machine",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser
