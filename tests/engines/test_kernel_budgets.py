"""What TensorRT for RTX makes of the decoder graph with the profiles of `build`: kernels, fused attentions, matrices written out, scratch.

The real builder, without a GPU; random weights. Nothing is stubbed, no engine runs. A budget is what the graph needs, with nothing to
spare. An edit of the graph, or another version of the builder, that costs a kernel has to change it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from examples.checkpoints.random_decoder import write_decoder
from fastvlm_edge.engines.layers import parse_listing
from fastvlm_edge.engines.memory import predicted_scratch
from fastvlm_edge.engines.profiles import decoder_profiles
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, Profile, find_library
from fastvlm_edge.planning.workload import VisionShape

pytest.importorskip("tensorrt_rtx")

LAYERS = 2
VOCABULARY = 8704
"""Enough for candidates in several parts."""
PRECISIONS = ("int4", "int8", "fp16", "bf16", "fp32")
GPUS = {"sm86": (8, 6), "sm89": (8, 9), "sm120": (12, 0)}
SOME = [pytest.param(each, marks=() if each in ("int4", "fp16", "fp32") else pytest.mark.slow) for each in PRECISIONS]
"""The other two differ from these in their types only."""


@dataclass(frozen=True)
class Budget:
    """Kernels of one profile; two profiles have twice as many. Scratch memory in MB, for a context of 4,096."""

    layer: int
    ends: int
    """Embedding, mask, rotary embedding, head and candidates."""
    prefill_mb: int
    decode_mb: int
    attentions: int = 1
    """Fused attentions per layer."""


INTEGERS = Budget(layer=10, ends=10, prefill_mb=89, decode_mb=12)
HALVES = Budget(layer=10, ends=9, prefill_mb=90, decode_mb=12)
BUDGETS = {
    "int4": INTEGERS,
    "int8": INTEGERS,
    "fp16": HALVES,
    "bf16": HALVES,
    "fp32": Budget(layer=15, ends=10, prefill_mb=340, decode_mb=19, attentions=0),
}
"""Two layers of the 0.5B's width. TensorRT for RTX fuses no attention in FP32."""
WIDE_LAYER = 4
"""Kernels that FP32 scores add to a layer: two products and a softmax take the place of the fused attention."""
WIDE_PREFILL_MB, WIDE_DECODE_MB = 271, 17

KV_NEW_MB = 0.27
"""What each further layer of the 0.5B adds to prefill in a 16-bit type: its new keys and values."""
PREFILL_7B_MB = 142

Write = Callable[..., tuple[Path, Manifest]]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a graph once for all tests."""

    @cache
    def written(
        precision: str, wide: tuple[int, ...] = (), size: str = "0.5b", layers: int = LAYERS, vocab: int = VOCABULARY
    ) -> tuple[Path, Manifest]:
        folder = tmp_path_factory.mktemp(f"{size}-{precision}")
        manifest = write_decoder(folder, precision, size=size, layers=layers, vocab=vocab, wide_scores=wide)
        return folder / "decoder.onnx", manifest

    return written


@dataclass(frozen=True)
class Counts:
    """What the builder reports about an engine."""

    kernels: int
    attentions: int
    written_out: tuple[str, ...]
    """Nodes of the kernels that do nothing but write an integer matrix out as floats, at every run."""
    scratch_mb: float


def count(graph: Path, profiles: tuple[Profile, ...], gpu: str = "sm86") -> Counts:
    """Build an engine and count what runs on the GPU."""
    built = find_library(("tensorrt_rtx",)).build(graph, BuildSettings(profiles=profiles, compute_capabilities=(GPUS[gpu],)))
    kernels = [layer for layer in parse_listing(built.listing) if layer.kind not in ("shape_call", "signal", "wait")]
    written_out = tuple(node for layer in kernels if layer.widens_weights for node in layer.nodes)
    assert built.scratch_bytes > 0, "the log of the builder no longer says how much scratch memory an engine needs"
    return Counts(len(kernels), sum("mha" in layer.name for layer in kernels), written_out, built.scratch_bytes / 1e6)


def check(found: Counts, budget: Budget, profiles: int, layers: int = LAYERS, mb: float | None = None) -> None:
    assert found.kernels <= profiles * (budget.ends + layers * budget.layer)
    assert found.attentions == profiles * layers * budget.attentions
    assert found.written_out == ()
    assert found.scratch_mb <= (budget.prefill_mb if mb is None else mb)


@pytest.mark.parametrize(
    ("precision", "gpu"),
    [
        pytest.param(precision, gpu, marks=() if gpu == "sm86" or precision == "int4" else pytest.mark.slow)
        for precision in PRECISIONS
        for gpu in GPUS
    ],
)
def test_two_profiles_are_within_the_budget(write: Write, precision: str, gpu: str) -> None:
    graph, manifest = write(precision)
    check(count(graph, decoder_profiles(manifest, separate=True), gpu), BUDGETS[precision], profiles=2)


@pytest.mark.parametrize("precision", SOME)
def test_one_profile_is_within_the_budget(write: Write, precision: str) -> None:
    graph, manifest = write(precision)
    check(count(graph, decoder_profiles(manifest, separate=False)), BUDGETS[precision], profiles=1)


@pytest.mark.parametrize("precision", SOME)
def test_decoding_alone_needs_little_scratch_memory(write: Write, precision: str) -> None:
    graph, manifest = write(precision)
    budget = BUDGETS[precision]
    check(count(graph, decoder_profiles(manifest, separate=True)[1:]), budget, profiles=1, mb=budget.decode_mb)


@pytest.mark.parametrize(("precision", "decode_mb"), [("int4", 22), ("fp16", 22), ("fp32", 55)])
def test_decoding_four_conversations_in_one_call_costs_no_kernel(write: Write, precision: str, decode_mb: int) -> None:
    graph, manifest = write(precision)
    profiles = decoder_profiles(manifest, separate=True, max_batch=4)
    assert [profile["input_ids"][2][0] for profile in profiles] == [1, 4]
    check(count(graph, profiles), BUDGETS[precision], profiles=2)
    check(count(graph, profiles[1:]), BUDGETS[precision], profiles=1, mb=decode_mb)


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_a_prefill_of_four_conversations_needs_the_memory_that_is_predicted(write: Write, precision: str) -> None:
    """Why engines for several conversations have two profiles. The prediction is at most 5 % too large."""
    graph, manifest = write(precision)
    found = count(graph, decoder_profiles(manifest, separate=False, max_batch=4)).scratch_mb
    assert found > 3.8 * count(graph, decoder_profiles(manifest, separate=True, max_batch=4)).scratch_mb
    vision = replace(manifest.vision, image_size=256, dims=list(VisionShape().dims))
    sized = replace(manifest, vision=vision, activations={"fp32_scores": []})
    assert found <= predicted_scratch(sized, 4) / 1e6 <= 1.05 * found


@pytest.mark.parametrize("precision", ["int4", "bf16"])
@pytest.mark.parametrize("decoding", [False, True], ids=["both", "decoding"])
def test_a_layer_with_scores_in_fp32_has_a_budget_of_its_own(write: Write, precision: str, decoding: bool) -> None:
    graph, manifest = write(precision, (0,))
    budget = BUDGETS[precision]
    found = count(graph, decoder_profiles(manifest, separate=True)[1 if decoding else 0 :])
    profiles = 1 if decoding else 2
    assert found.kernels <= profiles * (budget.ends + LAYERS * budget.layer + WIDE_LAYER)
    assert found.attentions == profiles * (LAYERS - 1)
    assert found.written_out == ()
    assert found.scratch_mb <= (WIDE_DECODE_MB if decoding else WIDE_PREFILL_MB)


@pytest.mark.parametrize(
    ("size", "layers", "wide"),
    [("0.5b", 2, (0,)), ("0.5b", 4, (1, 3)), ("0.5b", 2, ()), pytest.param("7b", 2, (0,), marks=pytest.mark.slow)],
)
def test_scratch_memory_is_as_predicted(write: Write, size: str, layers: int, wide: tuple[int, ...]) -> None:
    graph, manifest = write("fp16" if size == "0.5b" else "int4", wide, size=size, layers=layers)
    found = count(graph, decoder_profiles(manifest, separate=False))
    vision = replace(manifest.vision, image_size=256, dims=list(VisionShape().dims))  # a small picture: the decoder needs more
    sized = replace(manifest, vision=vision, activations={"fp32_scores": list(wide)})
    assert found.scratch_mb == pytest.approx(predicted_scratch(sized) / 1e6, rel=0.03)


def one_row(profile: Profile) -> Profile:
    """The profile with one id and one position of logits at most."""
    single = ("input_ids", "position_ids", "logit_positions")
    return {name: ((1, 1), (1, 1), (1, 1)) if name in single else shapes for name, shapes in profile.items()}


def test_a_profile_of_one_row_writes_every_integer_matrix_out(write: Write) -> None:
    """Why the decode profile takes several rows; and that the count above can fail."""
    graph, manifest = write("int8")
    decode = decoder_profiles(manifest, separate=True)[1]
    found = count(graph, (one_row(decode),))
    assert len(found.written_out) >= 4 * LAYERS + 1
    assert found.scratch_mb > 2 * BUDGETS["int8"].decode_mb


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_whole_0_5b_is_within_the_budget(write: Write, precision: str) -> None:
    graph, manifest = write(precision, layers=24, vocab=0)
    budget = BUDGETS[precision]
    more_mb = 22 * (2 if precision == "fp32" else 1) * KV_NEW_MB
    check(count(graph, decoder_profiles(manifest, separate=True)), budget, 2, 24, budget.prefill_mb + more_mb)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_layers_of_the_7b_are_within_the_budget(write: Write, precision: str) -> None:
    """Two layers, and the true head: the rows of logits of a one-row profile would be the largest matrix that is written out."""
    graph, manifest = write(precision, size="7b", vocab=0)
    check(count(graph, decoder_profiles(manifest, separate=True)), BUDGETS[precision], 2, LAYERS, PREFILL_7B_MB)
