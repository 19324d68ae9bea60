"""The check on real graphs: healthy types pass with a margin, and every injected fault is found.

The demo model is trained, so its rows are far from random. Healthy graphs are run by the interpreter that rounds every value to its
declared type; faults by onnxruntime, which is faster.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.protocol import StepOutput
from fastvlm_edge.backends.verification.cases import STEPS_TOGETHER, TOGETHER, Case, all_cases
from fastvlm_edge.backends.verification.check import BOUNDS, NOISY, Checked, Findings, check
from fastvlm_edge.backends.verification.compare import cosines, divergence
from fastvlm_edge.backends.verification.conversation import stored_pictures
from fastvlm_edge.backends.verification.reference import Reference, compute_reference, read_reference
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.model_dir.manifest import read_manifest, verify_files
from fastvlm_edge.progress import SilentProgress
from tests.support.rounded_backend import RoundedBackend

DEMO = Path(__file__).resolve().parents[4] / "examples" / "demo" / "fastvlm-demo"
DOCS = Path(__file__).resolve().parents[4] / "docs" / "tensorrt.md"
CONTEXT = 704
MARGIN = 10
"""The divergence of a healthy demo model is smaller than its bound by this factor."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model in a precision, converted once."""
    folder = tmp_path_factory.mktemp("models")

    def model(precision: str) -> Path:
        if not (folder / precision).is_dir():
            convert(str(DEMO), folder / precision, precision=precision)
        return folder / precision

    return model


@pytest.fixture(scope="module")
def fp16(models: Callable[[str], Path]) -> Path:
    return models("fp16")


def checked(directory: Path, backend: Checked, reference: Reference | None = None, cases: Sequence[Case] | None = None) -> Findings:
    """The check, with a short context: the interpreter is slow."""
    manifest = read_manifest(directory)
    manifest = replace(manifest, decoder=replace(manifest.decoder, context=CONTEXT))
    return check(backend, reference or read_reference(directory), manifest, SilentProgress(), "a test", cases=cases)


def worst(findings: Findings, figure: str) -> float:
    return max(case[figure] for case in findings.figures["cases"])


# What is stored -----------------------------------------------------------------------------------------------------------------


def test_the_reference_is_part_of_the_model_directory_and_small(fp16: Path) -> None:
    manifest = read_manifest(fp16)
    assert manifest.files["reference.npz"].bytes < 200_000
    verify_files(fp16, manifest, hashes=True)
    reference = read_reference(fp16)
    assert reference.program == "PyTorch" and not reference.noisy
    assert len(reference.rows.ids) == len(reference.passage.positions) and len(reference.passage.ids) >= 576


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_the_reference_is_what_the_stored_weights_compute_without_rounding(models: Callable[[str], Path], precision: str) -> None:
    """With integers it is theirs and not the checkpoint's: computed in float64, the graphs for a GPU give the same."""
    directory = models(precision)
    manifest, reference = read_manifest(directory), read_reference(directory)
    exact = RoundedBackend(directory, manifest, exact=True)
    pixels = stored_pictures(manifest.vision.image_size, manifest.vision.geometry)
    for picture, expected in zip(pixels, reference.features, strict=True):
        assert 1 - cosines(exact.encode(picture).numpy(), expected).min() < 1e-6
    positions = reference.passage.positions
    pictures = tuple(exact.upload(features) for features in reference.features)
    logits = exact.step(reference.passage.ids, pictures, logit_positions=positions, want_logits=True).logits
    assert logits is not None
    assert max(divergence(row, reference.rows[index]) for index, row in enumerate(logits)) < 1e-5


# Healthy engines ----------------------------------------------------------------------------------------------------------------


SLOW = [pytest.param(precision, marks=pytest.mark.slow) for precision in ("bf16", "int8", "int4")]


@pytest.mark.parametrize("precision", ["fp16", *SLOW])
def test_a_healthy_engine_passes_with_a_margin(models: Callable[[str], Path], precision: str) -> None:
    """In the first cases: rounding does not depend on the chunks, and the interpreter takes a second for some hundred ids."""
    directory = models(precision)
    manifest = read_manifest(directory)
    cases = all_cases(read_reference(directory).passage, CONTEXT)[:2]
    findings = checked(directory, RoundedBackend(directory, manifest), cases=cases)
    bounds = BOUNDS[manifest.decoder.dtype]
    assert not findings.faults
    assert max(worst(findings, "divergence"), worst(findings, "drift")) < bounds.divergence / MARGIN
    assert worst(findings, "steps") < bounds.steps / 2 and worst(findings, "cache") < bounds.cache / 2
    assert all(1 - picture["worst"] < (1 - bounds.token) / 4 for picture in findings.figures["image_features"].values())


def test_the_reference_of_onnxruntime_is_within_its_own_bounds(models: Callable[[str], Path]) -> None:
    """It quantises the inputs of integer weights. The distance is the same in either direction."""
    directory = models("int4")
    manifest = read_manifest(directory)
    computed = compute_reference(directory, manifest, SilentProgress(), threads=2)
    assert computed.noisy and not compute_reference(models("fp16"), read_manifest(models("fp16")), SilentProgress(), threads=2).noisy
    findings = checked(directory, OrtBackend(directory, manifest, threads=2), replace(read_reference(directory), noisy=True))
    assert not findings.faults and worst(findings, "divergence") < NOISY.divergence / MARGIN


# Faults -------------------------------------------------------------------------------------------------------------------------


class Faulty(OrtBackend):
    """onnxruntime with a fault: what it computes is changed by `spoil(backend, length before the step, number of ids, output)`."""

    spoil: Callable[[Any, int, int, StepOutput], StepOutput]

    def step(self, input_ids: Any, *given: Any, **options: Any) -> StepOutput:
        before = self.lengths[0]
        return type(self).spoil(self, before, len(input_ids), super().step(input_ids, *given, **options))


def rows_changed(output: StepOutput, change: Callable[[Any], None]) -> StepOutput:
    """Change the logits, and the outputs that depend on them alike."""
    if output.logits is None or len(output.logits) < 2:
        return output
    logits = output.logits.copy()
    change(logits)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, : output.top_ids.shape[1]]
    normalizer = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return StepOutput(np.take_along_axis(logits, ids, 1), ids, normalizer, logits)


def one_wrong_row(_: Any, before: int, count: int, output: StepOutput) -> StepOutput:
    def change(logits: Any) -> None:
        logits[5] = logits[4]

    return rows_changed(output, change) if (before, count) == (0, 512) else output


def swapped_rows(_: Any, before: int, count: int, output: StepOutput) -> StepOutput:
    def change(logits: Any) -> None:
        logits[[3, 4]] = logits[[4, 3]]

    return rows_changed(output, change) if (before, count) == (0, 512) else output


def a_lost_cache_row(self: Any, before: int, count: int, output: StepOutput) -> StepOutput:
    if before == 511:  # the last id before the cache grows
        self._decoder.cache.buffer[..., before, :] = 0
    return output


def a_shifted_cache(self: Any, before: int, count: int, output: StepOutput) -> StepOutput:
    if count == 150 and before:
        new = self._decoder.cache.buffer[..., before : before + count, :]
        new[:] = np.roll(new, 1, axis=-2)
    return output


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (one_wrong_row, r"'chunks of 512', the row of position 501 has a KL divergence of"),
        (swapped_rows, r"'chunks of 512', the row of position (499|500) has a KL divergence of"),
        (a_lost_cache_row, r"keys or values of position 511 are 1 of their size away"),
        (a_shifted_cache, r"'chunks of 150'"),
    ],
)
def test_a_fault_is_found(fp16: Path, fault: Any, expected: str) -> None:
    backend = type("Spoiled", (Faulty,), {"spoil": staticmethod(fault)})(fp16, read_manifest(fp16), threads=2)
    faults = [found.text for found in checked(fp16, backend).faults]
    assert faults and re.search(expected, "\n".join(faults)), faults


def test_conversations_in_one_call_are_checked(fp16: Path) -> None:
    findings = checked(fp16, OrtBackend(fp16, read_manifest(fp16), threads=2, slots=4), cases=[])
    assert not findings.faults
    assert [(case["case"], case["rows"]) for case in findings.figures["cases"]] == [(TOGETHER, 4 * STEPS_TOGETHER)]


@pytest.mark.parametrize("fault", ["the row of another conversation", "the length of another conversation"])
def test_a_fault_between_conversations_is_found(fp16: Path, fault: str) -> None:
    class Spoiled(OrtBackend):
        def decode(self, input_ids: Any, **options: Any) -> StepOutput:
            if fault.startswith("the length"):
                self.truncate(self.lengths[2], slot=1)
            output = super().decode(input_ids, **options)

            def change(logits: Any) -> None:
                logits[1] = logits[2]

            return rows_changed(output, change) if fault.startswith("the row") else output

    faults = checked(fp16, Spoiled(fp16, read_manifest(fp16), threads=2, slots=4), cases=[]).faults
    assert faults and all(f"'{TOGETHER}', the row of position" in found.text for found in faults)


def test_a_shift_of_all_logits_changes_no_figure(fp16: Path) -> None:
    """The softmax ignores it, and so do the steps by which a row prefers another id."""
    manifest, reference = read_manifest(fp16), read_reference(fp16)
    cases = all_cases(reference.passage, CONTEXT)[1:2]

    def steps(shift: float) -> float:
        def shifted(_: Any, before: int, count: int, output: StepOutput) -> StepOutput:
            def change(logits: Any) -> None:
                first, second = np.argsort(-logits[5])[:2]
                logits[5, [first, second]] = logits[5, [second, first]]
                logits += np.float32(shift)

            return rows_changed(output, change)

        rows = replace(reference.rows, values=reference.rows.values + np.float32(shift), normalizer=reference.rows.normalizer + shift)
        backend = type("Shifted", (Faulty,), {"spoil": staticmethod(shifted)})(fp16, manifest, threads=2)
        return worst(checked(fp16, backend, replace(reference, rows=rows), cases), "steps")

    assert steps(0) > 1
    assert steps(200) == pytest.approx(steps(0), rel=1e-2)


@pytest.mark.parametrize(("node", "wrong", "case"), [("/mask/past", "LessOrEqual", "a cache with a hole"), ("/mask/new", "Less", "")])
def test_a_mask_that_is_off_by_one_is_found(fp16: Path, tmp_path: Path, node: str, wrong: str, case: str) -> None:
    """One forgotten position is seen, or an id does not see itself."""
    faulty = Path(shutil.copytree(fp16, tmp_path / "model"))
    graph = onnx.load(faulty / "decoder.onnx", load_external_data=False)
    (comparison,) = [each for each in graph.graph.node if each.op_type in ("Less", "LessOrEqual") and each.name.startswith(node)]
    comparison.op_type = wrong
    onnx.save(graph, faulty / "decoder.onnx")
    findings = checked(fp16, OrtBackend(faulty, read_manifest(fp16), threads=2))
    assert any(case in found.text for found in findings.faults), findings.figures["cases"]


def test_a_mask_that_hides_the_last_position_is_found(fp16: Path) -> None:
    """Every id but the first of a call misses nothing, so only the cache of single ids and small chunks is wrong."""

    class Hidden(OrtBackend):
        def step(self, input_ids: Any, *given: Any, **options: Any) -> StepOutput:
            cache: Any = self._decoder.cache
            start, buffer = self.lengths[0], cache.buffer
            if not start:
                return super().step(input_ids, *given, **options)
            kept = buffer[..., start - 1, :].copy()
            buffer[:, 0, ..., start - 1, :] = -1e4 * np.sign(kept[:, 0])  # keys that no query likes
            output = super().step(input_ids, *given, **options)
            cache.buffer[..., start - 1, :] = kept
            return output

    findings = checked(fp16, Hidden(fp16, read_manifest(fp16), threads=2))
    assert any("single ids" in found.text for found in findings.faults), findings.figures["cases"]


@pytest.mark.parametrize("change", [lambda rows: np.roll(rows, 1, axis=0), lambda rows: np.concatenate([rows[:-1], rows[:1]])])
def test_visual_tokens_in_other_places_are_found(fp16: Path, change: Callable[[Any], Any]) -> None:
    class Moved(OrtBackend):
        def encode(self, pixel_values: Any) -> Any:
            features = super().encode(pixel_values)
            return replace(features, data=change(features.data))

    faults = checked(fp16, Moved(fp16, read_manifest(fp16), threads=2)).faults
    assert {fault.part for fault in faults} == {"vision"} and "visual token" in faults[0].text


def test_features_of_the_picture_before_are_found(fp16: Path) -> None:
    class Stale(OrtBackend):
        held: Any = ()

        def step(self, input_ids: Any, image_features: Any = (), **options: Any) -> StepOutput:
            if len(image_features) != len(self.held):
                self.held = image_features
            return super().step(input_ids, self.held, **options)

    faults = checked(fp16, Stale(fp16, read_manifest(fp16), threads=2)).faults
    assert "after a question about another picture" in faults[0].text


# Documentation ------------------------------------------------------------------------------------------------------------------


def test_the_bounds_are_documented() -> None:
    rows = re.findall(
        r"^\| `(float32|float16|bfloat16)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", DOCS.read_text(), re.M
    )
    assert {name: tuple(map(float, figures)) for name, *figures in rows} == {
        name: (each.token, each.median, each.divergence, each.steps, each.cache) for name, each in BOUNDS.items()
    }
