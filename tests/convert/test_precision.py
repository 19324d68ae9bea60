"""The plans, and that the bounds in the docs are those that conversions are held to."""

import dataclasses
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.convert.parity import BOUNDS, Bounds
from fastvlm_edge.convert.precision import PLANS, Magnitudes, fit, on_cpu, precision_plan

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
    assert fit(plan, {"stage2": 16_000.0, "stage5": 250_000.0}, found(residual=1e6)) == plan
    fitted = fit(plan, {"stage2": 17_000.0}, found())
    assert {stage for stage in plan.vision if fitted.vision[stage] != plan.vision[stage]} == {"stage2"}
    assert fitted.vision["stage2"] == "fp32"
    bf16 = precision_plan("bf16")
    assert fit(bf16, {"stage2": 1e9}, found(qkv=1e9, mlp=1e9)) == bf16


def found(**largest: float) -> Magnitudes:
    """Magnitudes of three layers: `largest` in the second, 1 elsewhere."""
    return Magnitudes(**{field.name: [1.0, largest.get(field.name, 1.0), 1.0] for field in dataclasses.fields(Magnitudes)})


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 32), ("int4", 32), ("bf16", 4)])
def test_scores_too_large_for_the_steps_of_the_type_stay_in_fp32(precision: str, largest: float) -> None:
    plan = precision_plan(precision)
    assert fit(plan, {}, found(scores=largest)).wide_scores == set()
    assert fit(plan, {}, found(scores=largest * 1.01)).wide_scores == {1}
    assert fit(precision_plan("fp32"), {}, found(scores=1e9)).wide_scores == set()
    kind = np.float16 if plan.decoder == "fp16" else ml_dtypes.bfloat16
    assert float(np.spacing(np.array(largest * 0.99, kind))) == 1 / 64


@pytest.mark.parametrize("name", ["product", "mlp"])
def test_an_mlp_too_large_for_fp16_is_divided_by_a_power_of_two(name: str) -> None:
    plan = precision_plan("int4")
    assert fit(plan, {}, found(**{name: 16_376})).up_shifts == {}
    assert fit(plan, {}, found(**{name: 16_377})).up_shifts == {1: 1}
    fitted = fit(plan, {}, found(**{name: 200_000}))
    assert fitted.up_shifts == {1: 4}
    assert 16_376 / 2 < 200_000 / 2 ** fitted.up_shift(1) <= 16_376


@pytest.mark.parametrize("name", ["qkv", "attention", "gate"])
def test_other_values_too_large_for_fp16_are_refused(name: str) -> None:
    with pytest.raises(FastVLMError, match=r"layer 1 of the LLM computes 16,400 .* --precision bf16 or fp32"):
        fit(precision_plan("fp16"), {}, found(**{name: 16_400}))


def test_the_last_stages_are_wide_in_fp16() -> None:
    plan = precision_plan("fp16")
    assert [stage for stage, kind in plan.vision.items() if kind == "fp32"] == ["stage5", "final_conv", "projector"]


def test_an_unknown_precision_is_named_with_the_known_ones() -> None:
    with pytest.raises(FastVLMError, match="unknown precision 'int2'; choose one of fp32, fp16, bf16, int8, int4"):
        precision_plan("int2")
