"""The plans, and that the bounds in the docs are those that conversions are held to."""

import re
from pathlib import Path

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.convert.parity import BOUNDS, Bounds
from fastvlm_edge.convert.precision import PLANS, fit, on_cpu, precision_plan

DOCS = Path(__file__).resolve().parents[2] / "docs" / "precision.md"


def test_the_documented_bounds_are_the_ones_in_force() -> None:
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (?:(\d+) %|-) \| (?:([\d.]+)|-) \|", DOCS.read_text(encoding="utf-8"))
    documented = {
        name: Bounds(float(features), float(logits), float(greedy or 0) / 100, float(stored) if stored else None)
        for name, features, logits, greedy, stored in rows
    }
    assert documented == BOUNDS


def test_a_cpu_computes_floats_beside_integers_and_bf16_in_fp32() -> None:
    assert {name for name, plan in PLANS.items() if on_cpu(plan) != plan} == {"bf16", "int8", "int4"}
    for name in ("bf16", "int8", "int4"):
        assert on_cpu(PLANS[name]).floats() == {"fp32"}
        assert on_cpu(PLANS[name]).body == PLANS[name].body


def test_what_fp16_may_not_hold_becomes_wider() -> None:
    plan = precision_plan("int4")
    assert fit(plan, {"stage2": 16_000.0, "stage5": 250_000.0}, 16_000.0) == plan
    fitted = fit(plan, {"stage2": 17_000.0}, 17_000.0)
    assert {stage for stage in plan.vision if fitted.vision[stage] != plan.vision[stage]} == {"stage2"}
    assert fitted.vision["stage2"] == "fp32"
    assert fitted.decoder == "bf16"
    bf16 = precision_plan("bf16")
    assert fit(bf16, {"stage2": 1e9}, 1e9) == bf16


def test_the_last_stages_are_wide_in_fp16() -> None:
    plan = precision_plan("fp16")
    assert [stage for stage, kind in plan.vision.items() if kind == "fp32"] == ["stage5", "final_conv", "projector"]


def test_an_unknown_precision_is_named_with_the_known_ones() -> None:
    with pytest.raises(FastVLMError, match="unknown precision 'int2'; choose one of fp32, fp16, bf16, int8, int4"):
        precision_plan("int2")
