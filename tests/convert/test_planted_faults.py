"""The demo with planted outliers: what `convert` writes answers like FP32, also on other processors, or `convert` refuses and is right.

`examples/checkpoints/planted_faults.py` has the faults. Answers are those of the runtime's own backend on a CPU to fixed questions.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.checkpoints.planted_faults import COPIES, FAULTS, LEVELS, plant, widen
from fastvlm_edge import FastVLM
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.convert.precision import PrecisionRefused
from fastvlm_edge.evaluation.data import open_data

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
COUNT = 200
MAY_LOSE = {"fp32": 0.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.5, "int4": 1.5}
"""Points of exact match that a precision may lose to FP32 of the same checkpoint."""
PLACE = re.compile(r"layer \d|llm\.|vision\.|stage\d|final_conv|projector")
"""A layer, product or stage in a message."""
SEES_AVX2 = """
import numpy
core = numpy._core if hasattr(numpy, "_core") else numpy.core
print(core._multiarray_umath.__cpu_features__["AVX2"])
"""
EMULATED = 60
"""Questions that an emulated processor answers; each takes about half a second."""


@dataclass(frozen=True)
class Examiner:
    """Asks model directories the same questions."""

    questions: Path

    def points(self, model: Path) -> float:
        """Right answers, in percent."""
        right = 0
        with FastVLM.load(model, "ort") as vlm:
            for example, image in open_data(self.questions).read():
                right += vlm.generate(str(example.prompt), image=image, max_new_tokens=16).text in example.answers
        return 100 * right / COUNT


@pytest.fixture(scope="module")
def examiner(demo_scenes: Callable[[str, int], Path]) -> Examiner:
    return Examiner(demo_scenes("heldout", COUNT))


@pytest.fixture(scope="module")
def healthy(examiner: Examiner, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Points of the demo in FP32, which are those of every exact fault in FP32, too (tests/examples/test_planted_faults.py)."""
    model = tmp_path_factory.mktemp("healthy") / "model"
    convert(str(DEMO), model, precision="fp32")
    points = examiner.points(model)
    assert points > 95
    return points


def points_in_fp32(checkpoint: Path, fault: str, examiner: Examiner, healthy: float, folder: Path) -> float:
    """What the other precisions are compared with."""
    if FAULTS[fault].exact:
        return healthy
    convert(str(checkpoint), folder / "in-fp32", precision="fp32")
    points = examiner.points(folder / "in-fp32")
    assert points > 0.9 * healthy, "the fault makes another model of it, about which nothing can be said"
    return points


def refusal_of(checkpoint: Path, output: Path, precision: str) -> PrecisionRefused | None:
    """Convert the checkpoint; None if that worked."""
    try:
        convert(str(checkpoint), output, precision=precision)
    except PrecisionRefused as refusal:
        return refusal
    return None


def check(checkpoint: Path, precision: str, examiner: Examiner, in_fp32: float, folder: Path) -> None:
    """Convert the checkpoint. The answers are right, or the refusal names the place, and a precision whose answers are right."""
    refusal = refusal_of(checkpoint, folder / precision, precision)
    if refusal is None:
        points = examiner.points(folder / precision)
        assert points >= in_fp32 - MAY_LOSE[precision], f"{points:.1f} % right, {in_fp32:.1f} % in FP32"
        return
    assert PLACE.search(refusal.what), refusal
    named = re.findall(r"\b(?:fp32|bf16|fp16|int8)\b", refusal.mend or "")
    assert named and precision not in named, refusal
    for other in named:
        convert(str(checkpoint), folder / f"instead-{other}", precision=other)
        points = examiner.points(folder / f"instead-{other}")
        assert points >= in_fp32 - MAY_LOSE[other], f"{refusal}: {points:.1f} % right in {other}, {in_fp32:.1f} % in FP32"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_outliers_everywhere_cost_no_answers(tmp_path: Path, examiner: Examiner, healthy: float, precision: str) -> None:
    """The faults that are exact, all at once, so that `make test` has them all."""
    checkpoint = plant(DEMO, tmp_path / "planted", "everywhere", 300)
    convert(str(checkpoint), tmp_path / "model", precision=precision)
    assert examiner.points(tmp_path / "model") >= healthy - MAY_LOSE[precision]


def test_a_massive_token_costs_no_answers(tmp_path: Path, examiner: Examiner, healthy: float) -> None:
    checkpoint = plant(DEMO, tmp_path / "planted", "massive_token", 300)
    check(checkpoint, "int8", examiner, points_in_fp32(checkpoint, "massive_token", examiner, healthy, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "fp16", "bf16"])
@pytest.mark.parametrize(("fault", "scale"), [(name, scale) for name, fault in FAULTS.items() for scale in fault.scales])
def test_every_fault_is_handled_or_refused(
    tmp_path: Path, examiner: Examiner, healthy: float, fault: str, scale: float, precision: str
) -> None:
    checkpoint = plant(DEMO, tmp_path / "planted", fault, scale)
    check(checkpoint, precision, examiner, points_in_fp32(checkpoint, fault, examiner, healthy, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("scale", [300.0, 10_000.0])
@pytest.mark.parametrize("fault", ["norms", "several_norm_channels", "final_norm", "everywhere", "massive_token"])
def test_every_fault_is_handled_or_refused_at_the_width_of_the_0_5b(
    tmp_path: Path, examiner: Examiner, healthy: float, fault: str, scale: float, precision: str
) -> None:
    checkpoint = plant(widen(DEMO, tmp_path / "wide", *COPIES), tmp_path / "planted", fault, scale)
    check(checkpoint, precision, examiner, points_in_fp32(checkpoint, fault, examiner, healthy, tmp_path), tmp_path)


@pytest.fixture(scope="module", params=LEVELS)
def processor(request: pytest.FixtureRequest) -> list[str]:
    """The beginning of a command that runs Python on an emulated processor."""
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if qemu is None or platform.machine() != "x86_64":
        pytest.skip("emulating another x86-64 processor needs an x86-64 machine with qemu-user: apt-get install qemu-user")
    command = [qemu, "-cpu", LEVELS[request.param], sys.executable]
    seen = subprocess.run([*command, "-c", SEES_AVX2], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == str(request.param == "AVX2")
    return command


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("fault", ["norms", "final_norm", "everywhere", "massive_token"])
def test_other_processors_answer_like_fp32(tmp_path: Path, examiner: Examiner, processor: list[str], fault: str, precision: str) -> None:
    """Converted on this processor, asked on another one."""
    checkpoint = plant(DEMO, tmp_path / "planted", fault, 300)
    points = {}
    for name, python in (("fp32", [sys.executable]), (precision, processor)):
        convert(str(checkpoint), tmp_path / name, precision=name)
        arguments = ["eval", str(tmp_path / name), "--data", str(examiner.questions), "--limit", str(EMULATED), "--json"]
        command = [*python, "-m", "fastvlm_edge", *arguments, "--backend", "ort", "--max-new-tokens", "16"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        points[name] = 100 * json.loads(done.stdout)["exact_match"]
    assert points[precision] >= points["fp32"] - MAY_LOSE[precision]
