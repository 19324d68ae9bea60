"""What do outliers of the kind that trained LLMs have cost in each precision, and on other processors?

    python -m benchmarks.planted_faults [--side after] [--count 200] [--work build/planted-faults] [--out FILE]

The demo checkpoint, also at about the widths of the 0.5B, with the faults of examples/checkpoints/planted_faults.py. Each is converted in
several precisions, and answers held-out questions with onnxruntime on this processor and on emulated ones (qemu-user). What was measured
at the same commit already is not measured again. `--side before` is for a run of this script at the commit that is compared with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.rounds import Failed, call
from examples.checkpoints.planted_faults import COPIES, FAULTS, LEVELS, plant, widen
from examples.demo_training.scenes import SEED, scene_questions
from fastvlm_edge import FastVLMError
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import Evaluation
from fastvlm_edge.evaluation.subject import Subject
from fastvlm_edge.model_dir.manifest import Manifest, sha256

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "demo" / "fastvlm-demo"
NARROW, WIDE = "demo", "demo, 896 wide"
NONE = "none"
SMALL, USUAL, LARGEST = 100.0, 300.0, 10_000.0
"""Scales: that of the outliers of OPT (arXiv 2211.10438, section 3), and larger ones."""
INTEGERS = ("int8", "int4")
FLOATS = ("fp16", "bf16")
IN_FLOATS = ("keys", "everywhere", "massive_residual", "massive_token", "key_biases")
"""Faults that concern float types as well."""


@dataclass(frozen=True)
class Case:
    """A checkpoint with a fault."""

    model: str
    fault: str
    scale: float
    precisions: tuple[str, ...]
    levels: bool = False
    """Whether emulated processors answer as well."""


def cases() -> Iterator[Case]:
    """Everything that is measured."""
    yield Case(NARROW, NONE, 1, (*FLOATS, *INTEGERS))
    yield Case(NARROW, "norms", SMALL, INTEGERS, levels=True)
    for name, fault in FAULTS.items():
        scale = USUAL if USUAL in fault.scales else fault.scales[-1]
        yield Case(NARROW, name, scale, (*(FLOATS if name in IN_FLOATS else ()), *INTEGERS), levels=name == "norms")
    for name in ("norms", "everywhere", "massive_token"):
        yield Case(NARROW, name, LARGEST, INTEGERS)
    for name in (NONE, "norms", "everywhere"):
        yield Case(WIDE, name, 1 if name == NONE else USUAL, INTEGERS)


class Run:
    """Measures cases, and keeps the record."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.side, self.work, self.few = options.out, options.side, options.work, options.emulated
        self.questions = scene_questions(self.work, "heldout", options.count)
        data = f"{options.count} scenes of the split heldout, seed {SEED}; {self.few} of them on emulated processors"
        commit = call(["git", "describe", "--always", "--dirty"]).strip()
        found = json.loads(self.out.read_text(encoding="utf-8")).get(self.side, {}) if self.out.is_file() else {}
        wanted = {(case.model, case.fault, case.scale) for case in cases()}
        kept = found["results"] if found.get("commit") == commit and found.get("data") == data and "dirty" not in commit else []
        self.results: list[dict[str, Any]] = [row for row in kept if (row["model"], row["fault"], row["scale"]) in wanted]
        self.about = {
            "commit": commit,
            "model_sha256": sha256(CHECKPOINT / "model.safetensors"),
            "data": data,
            "machine": machine.describe(),
        }

    def all(self) -> None:
        """Measure what the record lacks."""
        for case in cases():
            key = {"model": case.model, "fault": case.fault, "scale": case.scale}
            if any(key.items() <= row.items() for row in self.results):
                continue
            began = time.perf_counter()
            row = key | self.measure(case)
            self.results.append(row)
            self.write()
            shown = {name: found.get("exact_match", "refused") if isinstance(found, Mapping) else found for name, found in row.items()}
            print(f"{time.perf_counter() - began:5.1f} s {shown}", flush=True)

    def write(self) -> None:
        """Replace this side of the record."""
        document = json.loads(self.out.read_text(encoding="utf-8")) if self.out.is_file() else {}
        document["what"] = "the demo model with planted outliers on held-out questions, greedy, one question per picture, by onnxruntime"
        document["machine"] = self.about["machine"]
        document[self.side] = self.about | {"results": self.results}
        write_json(self.out, document)

    def measure(self, case: Case) -> dict[str, Any]:
        """Convert and ask one checkpoint in every precision; FP32 of the same checkpoint is the reference."""
        folder = self.work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoint = CHECKPOINT if case.model == NARROW else widen(CHECKPOINT, folder / "wide", *COPIES)
        if case.fault != NONE:
            checkpoint = plant(checkpoint, folder / "planted", case.fault, case.scale)
        reference = folder / "fp32"
        convert(str(checkpoint), reference, precision="fp32")
        row: dict[str, Any] = {"fp32": self.ask(reference, None)}
        for precision in case.precisions:
            try:
                manifest = convert(str(checkpoint), folder / precision, precision=precision)
            except FastVLMError as error:
                row[precision] = {"refused": error.what.replace(str(folder), "."), "instead": error.mend}
                continue
            row[precision] = self.ask(folder / precision, reference) | certificate(manifest)
            if case.levels and self.few and precision in INTEGERS:
                row[precision]["levels"] = {level: self.ask_emulated(folder / precision, reference, cpu) for level, cpu in LEVELS.items()}
        return row

    def ask(self, model: Path, reference: Path | None) -> dict[str, float]:
        """Exact match, and the distance from the reference, on this processor."""
        with Subject.load(model, "ort") as subject:
            if reference is None:
                evaluation = Evaluation(subject, open_data(self.questions), max_new_tokens=16)
                evaluation.run()
            else:
                with Subject.load(reference, "ort") as fp32:
                    evaluation = Evaluation(subject, open_data(self.questions), reference=fp32, max_new_tokens=16)
                    evaluation.run()
        return figures(evaluation.report())

    def ask_emulated(self, model: Path, reference: Path, cpu: str) -> dict[str, Any]:
        """The same for the first questions on a processor of qemu."""
        qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
        if qemu is None:
            return {"failed": "qemu-user is not installed"}
        command = [qemu, "-cpu", cpu, sys.executable, "-m", "fastvlm_edge", "eval", str(model.resolve())]
        options = {"--reference": reference.resolve(), "--data": self.questions.resolve(), "--limit": self.few, "--max-new-tokens": 16}
        command += [str(part) for pair in options.items() for part in pair]
        try:
            return figures(json.loads(call([*command, "--backend", "ort", "--json"])))
        except Failed as error:
            return {"failed": str(error)}


def certificate(manifest: Manifest) -> dict[str, Any]:
    """What the record keeps of the checks of a conversion."""
    certified = {name: manifest.parity[name] for name in ("rows_on_cpu", "rows_on_gpu") if name in manifest.parity}
    fine = manifest.activations.get("fine_inputs_on_cpu", {}).get("products", [])
    return certified | {"moved": sorted(manifest.activations.get("moved_channels", {})), "fine_inputs": fine}


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """What the record keeps of a report of `eval`."""
    names = ("exact_match", "token_agreement", "kl_divergence")
    return {name: digits(report[name]) for name in names if report.get(name) is not None}


def main() -> int:
    """Measure one side of the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("before", "after"), default="after")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument(
        "--emulated", type=int, default=20, help="questions for emulated processors; 0 leaves them out; default %(default)s"
    )
    parser.add_argument("--work", type=Path, default=Path("build/planted-faults"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planted_faults.json")
    run = Run(parser.parse_args())
    run.all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
