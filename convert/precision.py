"""Precision plans (`--precision`): the type that every stage of the model computes in, and the type that its weights are stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fastvlm_edge.errors import FastVLMError


class PrecisionRefused(FastVLMError):
    """A model cannot be held by the precision that was asked for; another one can."""


FLOAT_TYPES: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
NUMPY_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

FP16_MAX = 65504.0
FP16_SAFE = FP16_MAX / 4
"""The largest magnitude that a probe may find where FP16 is kept: the few pictures of the probe are not the worst ones."""

LARGEST_SCORE = {"fp16": 32.0, "bf16": 4.0}
"""The largest attention score that a probe may find where scores pass through the decoder's float type. Steps of the type are 1/64 there,
so a share of the attention is off by 1 % at most. Other questions may have scores twice as large, with twice the error
(docs/precision.md)."""

VISION_STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "stage5", "final_conv", "projector")


@dataclass(frozen=True)
class WeightType:
    """How the weights of a stage are stored: as floats in the type that the stage computes in, or as integers with scales.

    `bits` is 0 for floats. `block` is the number of consecutive inputs that share a scale, or 0 for per-channel scales (one for each
    output).
    """

    bits: int = 0
    block: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"/{self.block}" if self.block else "") if self.bits else "plain"


PLAIN = WeightType()
INT8_CHANNEL = WeightType(bits=8)
INT4_BLOCK = WeightType(bits=4, block=128)
"""4.125 bits per weight with FP16 scales, which are read for every token as well. Blocks of 64 are not more accurate when calibrated
(`benchmarks/results/llm_quantization.json`), and onnxruntime's kernels are slower with them."""


@dataclass(frozen=True)
class PrecisionPlan:
    """The types of one conversion. `vision` and `decoder` hold keys of FLOAT_TYPES: the types that are computed in."""

    name: str
    vision: dict[str, str]
    """Float type of each of VISION_STAGES."""
    decoder: str
    """Float type of the decoder's activations, KV cache and image features."""
    vision_weights: WeightType = PLAIN
    body: WeightType = PLAIN
    head: WeightType = PLAIN
    embedding: WeightType = PLAIN
    wide_scores: frozenset[int] = frozenset()
    """Layers of the LLM whose attention scores stay in FP32 between the product and the softmax."""
    up_shifts: Mapping[int, int] = field(default_factory=dict)
    """Layer of the LLM -> k: the weights of `up_proj` are divided by 2^k, and the output of `down_proj` is multiplied by it in FP32."""

    fine_inputs: frozenset[str] = frozenset()
    """Products of the LLM, as in `layer_matrices`, whose inputs have 16 bits on a CPU instead of 8 (convert/fine_inputs.py)."""

    def up_shift(self, layer: int) -> int:
        """The power of two that `up_proj` of a layer is divided by."""
        return self.up_shifts.get(layer, 0)

    def floats(self) -> set[str]:
        """Every float type that some stage computes in."""
        return {*self.vision.values(), self.decoder}

    def describe(self) -> dict[str, str]:
        """Flat form for the manifest: stage -> `fp16`, or `int8 -> fp16` where the weights are stored as integers."""
        plan = {f"vision.{stage}": _both(kind, self.vision_weights) for stage, kind in self.vision.items()}
        for stage in ("embedding", "body", "head"):
            plan[f"decoder.{stage}"] = _both(self.decoder, getattr(self, stage))
        return plan


def _both(kind: str, weights: WeightType) -> str:
    return f"{weights} -> {kind}" if weights.bits else kind


def _uniform(kind: str) -> dict[str, str]:
    return dict.fromkeys(VISION_STAGES, kind)


# FP16 ends at 65504. Others measured 55,000 to 250,000 after the downsampling into stage 5, so that stage and all later ones stay in
# FP32 (6 to 7 % of the multiply-accumulates). The conversion probes the real magnitudes of each checkpoint, see `fit`.
_FP16_VISION = {**_uniform("fp16"), "stage5": "fp32", "final_conv": "fp32", "projector": "fp32"}

PLANS = {
    plan.name: plan
    for plan in (
        PrecisionPlan("fp32", _uniform("fp32"), "fp32"),
        PrecisionPlan("fp16", _FP16_VISION, "fp16"),
        PrecisionPlan("bf16", _uniform("bf16"), "bf16"),
        PrecisionPlan("int8", _FP16_VISION, "fp16", INT8_CHANNEL, INT8_CHANNEL, INT8_CHANNEL, INT8_CHANNEL),
        PrecisionPlan("int4", _FP16_VISION, "fp16", INT8_CHANNEL, INT4_BLOCK, INT8_CHANNEL, INT8_CHANNEL),
    )
}


def precision_plan(name: str) -> PrecisionPlan:
    """The plan called `name`. Raises FastVLMError that lists the known names."""
    if name not in PLANS:
        raise FastVLMError(f"unknown precision {name!r}", f"choose one of {', '.join(PLANS)}")
    return PLANS[name]


def vision_stage(name: str) -> str:
    """The key of VISION_STAGES for the name of a tensor, layer or group: `vision.stages.0.blocks.1.mlp.fc1` belongs to `stage1`."""
    part, _, rest = name.removeprefix("vision.").partition(".")
    return f"stage{int(rest.partition('.')[0]) + 1}" if part == "stages" else part


@dataclass(frozen=True)
class Magnitudes:
    """The largest magnitudes that the LLM computes for a probe, one value per layer: its float types must be able to hold them."""

    qkv: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Products of queries and keys, divided by sqrt(head_dim), before the softmax."""
    attention: list[float] = field(default_factory=list)
    """Output of o_proj."""
    gate: list[float] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    """up, and silu(gate) * up."""
    mlp: list[float] = field(default_factory=list)
    """Output of down_proj."""
    residual: list[float] = field(default_factory=list)
    """The residual stream after the attention and after the MLP, which is FP32 in every plan."""

    def largest(self) -> str:
        """The layers with the largest scores and residual stream, as a clause."""
        (score, at), (residual, where) = (max(zip(values, range(len(values)), strict=True)) for values in (self.scores, self.residual))
        return (
            f"layer {at} of the LLM has the largest attention scores, up to {score:,.0f}, and layer {where} the largest residual stream, "
            f"up to {residual:,.0f}"
        )


def fit(plan: PrecisionPlan, vision: Mapping[str, float], decoder: Magnitudes) -> PrecisionPlan:
    """The plan with wider types where a probe found magnitudes that FP16 or BF16 cannot hold or resolve.

    `vision` maps each stage to the largest magnitude that was found there. A stage of the encoder stays in FP16 up to FP16_SAFE and is FP32
    above. In the decoder, attention scores above LARGEST_SCORE stay in FP32; up_proj is divided by a power of two if its product with the
    gate, or the output of the MLP, exceeds FP16_SAFE. Raises PrecisionRefused if anything else in the decoder exceeds FP16_SAFE.
    """
    stages = {stage: "fp32" if kind == "fp16" and vision.get(stage, 0.0) > FP16_SAFE else kind for stage, kind in plan.vision.items()}
    plan = replace(plan, vision=stages)
    if plan.decoder == "fp32":
        return plan
    limit = LARGEST_SCORE[plan.decoder]
    plan = replace(plan, wide_scores=frozenset(layer for layer, score in enumerate(decoder.scores) if score > limit))
    if plan.decoder != "fp16":
        return plan
    for name in ("qkv", "attention", "gate"):
        values: list[float] = getattr(decoder, name)
        if values and max(values) > FP16_SAFE:
            raise PrecisionRefused(
                f"layer {values.index(max(values))} of the LLM computes {max(values):,.0f} ({name}); FP16 ends at 65,504, "
                f"and its plans accept {FP16_SAFE:,.0f}",
                "convert with --precision bf16 or fp32",
            )
    largest = [max(pair) for pair in zip(decoder.product, decoder.mlp, strict=True)]
    shifts = {layer: math.ceil(math.log2(value / FP16_SAFE)) for layer, value in enumerate(largest) if value > FP16_SAFE}
    return replace(plan, up_shifts=shifts)


def on_cpu(plan: PrecisionPlan) -> PrecisionPlan:
    """The plan for onnxruntime's CPU provider, which computes with the same stored weights.

    The provider has no BF16 kernels (MatMul, Add, Conv, Softmax: onnxruntime 1.31), and it computes FP16 as FP32 between two casts. So BF16
    becomes FP32, and plans with integer weights compute in FP32 throughout, as the integer kernels require. A pure FP16 plan stays FP16.
    """
    if not any(kind.bits for kind in (plan.vision_weights, plan.body, plan.head, plan.embedding)) and "bf16" not in plan.floats():
        return plan
    return replace(plan, vision=_uniform("fp32"), decoder="fp32")
