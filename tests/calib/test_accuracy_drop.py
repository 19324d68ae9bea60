"""`--accuracy-drop` keeps its word on questions that neither calibrated the model nor chose its plan."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlm_edge import FastVLM
from fastvlm_edge.calib.quantizer import HELD_OUT, Options, Quantizer
from fastvlm_edge.convert.graphs.placement import check_placement
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.metrics import exact_match
from fastvlm_edge.model_dir.manifest import read_manifest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
PROMISE = 1.0
"""Percentage points."""
CALIBRATION, QUESTIONS = 128, 600
SIGMAS = 2.33
"""One-sided 99 % of the normal distribution."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The demo's layers only lose time to several threads, a lot of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right(model: Path, questions: Path) -> list[bool]:
    """Which questions the model answers right, in their order."""
    found = []
    with FastVLM.load(model, "ort", threads=1) as vlm:
        for example, picture in open_data(questions).read():
            assert example.prompt is not None
            reply = vlm.generate(example.prompt, picture, max_new_tokens=16)
            found.append(exact_match(reply.text, example.answers) == 1)
    assert len(found) == QUESTIONS
    return found


def without_cpu_graphs(model: Path, copy: Path) -> Path:
    """The same model directory with only the graphs for a GPU, where the encoder has INT8 activations."""
    copy.mkdir()
    manifest = read_manifest(model)
    kept = {name: record for name, record in manifest.files.items() if not name.endswith(".cpu.onnx")}
    for name in kept:
        os.link(model / name, copy / name)
    replace(manifest, files=kept).write(copy)
    return copy


@pytest.mark.slow
def test_the_measured_drop_is_within_the_promise(tmp_path: Path, demo_scenes: Callable[[str, int], Path]) -> None:
    """The margin is that of two samples of paired answers: HELD_OUT questions chose the plan, QUESTIONS others measure it.

    A question changes the drop only if exactly one of the two models answers it right. With a share q of such questions, the drop measured
    on n of them has a standard deviation of at most sqrt(q / n).
    """
    questions = demo_scenes("heldout", QUESTIONS)
    quantizer = Quantizer(Options(str(demo_scenes("calibration", CALIBRATION + HELD_OUT)), limit=CALIBRATION, accuracy_drop=PROMISE))
    convert(str(DEMO), tmp_path / "fp32")
    convert(str(DEMO), tmp_path / "int8", precision="int8", calibrate=quantizer.calibrate)
    assert check_placement(tmp_path / "int8" / "vision.onnx").share("INT8") > 0.5, "nothing was risked"

    before = right(tmp_path / "fp32", questions)
    for name, model in (("CPU", tmp_path / "int8"), ("GPU", without_cpu_graphs(tmp_path / "int8", tmp_path / "gpu"))):
        after = right(model, questions)
        drop = 100 * (sum(before) - sum(after)) / QUESTIONS
        changed = sum(a != b for a, b in zip(before, after, strict=True)) / QUESTIONS
        margin = 100 * SIGMAS * math.sqrt(changed / QUESTIONS + changed / HELD_OUT)
        print(f"graphs for a {name}: {sum(before)} and {sum(after)} of {QUESTIONS} right, drop {drop:.2f}, margin {margin:.2f} points")
        assert drop <= PROMISE + margin
