"""The plans, and that the bounds in the docs are those that conversions are held to."""

import re
from pathlib import Path

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.convert.parity import BOUNDS
from fastvlm_edge.convert.precision import PLANS, on_cpu, precision_plan

DOCS = Path(__file__).resolve().parents[2] / "docs" / "precision.md"


def test_the_documented_bounds_are_the_ones_in_force():
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (\d+ %|-) \|", DOCS.read_text(encoding="utf-8"))
    documented = {name: (float(a), float(b), 0.0 if c == "-" else int(c.split()[0]) / 100) for name, a, b, c in rows}
    assert documented == {name: (bound.features, bound.logits, bound.greedy) for name, bound in BOUNDS.items()}


def test_only_bf16_differs_on_a_cpu():
    assert {name for name, plan in PLANS.items() if on_cpu(plan) != plan} == {"bf16"}
    assert on_cpu(PLANS["bf16"]).decoder == "fp32"


def test_the_last_stages_are_wide_in_fp16():
    plan = precision_plan("fp16")
    assert [stage for stage, kind in plan.vision.items() if kind == "fp32"] == ["stage5", "final_conv", "projector"]


def test_an_unknown_precision_is_named_with_the_known_ones():
    with pytest.raises(FastVLMError, match="unknown precision 'int2'; choose one of fp32, fp16, bf16, int8, int4"):
        precision_plan("int2")
