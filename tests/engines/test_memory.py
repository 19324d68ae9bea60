"""Which builds are refused because memory is short: what the GPU needs must be in memory, the rest may be swapped out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_edge.engines.memory import check_memory, predicted_peak, predicted_scratch
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_model import build_model

MIB, GIB = 1 << 20, 1 << 30
RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "engine_builds.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """1 GiB of weights for the decoder and 256 MiB for the encoder, which take no room on the disk."""
    directory = build_model(tmp_path / "model")
    for part, size in (("vision", 256 * MIB), ("decoder", GIB)):
        with (directory / f"{part}.weights").open("wb") as file:
            file.truncate(size)
    return directory


@pytest.fixture
def manifest(model: Path) -> Manifest:
    return read_manifest(model)


def free(monkeypatch: pytest.MonkeyPatch, memory: int, swap: int) -> None:
    monkeypatch.setattr("fastvlm_edge.engines.memory.available_memory", lambda: (memory, swap))


def test_swap_is_memory_for_the_builder_but_not_for_the_gpu(model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    board = FakeCuda(integrated=True)
    free(monkeypatch, 3 * GIB, 8 * GIB)
    check_memory(model, manifest, "tensorrt", board)
    free(monkeypatch, 3 * GIB, 0)
    with pytest.raises(FastVLMError, match=r"building decoder\.engine needs about 4,396 MiB .* 3,072 MiB of memory and 0 MiB of swap"):
        check_memory(model, manifest, "tensorrt", board)
    free(monkeypatch, GIB, 64 * GIB)
    says = r"decoder\.engine and its copy in the builder, or all engines, need about 2,\d\d\d MiB .* 1,024 MiB .* swap does not"
    with pytest.raises(FastVLMError, match=says + r".*drop_caches.*--no-memory-check"):
        check_memory(model, manifest, "tensorrt", board)


def test_without_a_gpu_only_the_builder_counts(model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GIB, 64 * GIB)
    check_memory(model, manifest, "tensorrt_rtx", None)


def test_a_graphics_card_has_memory_of_its_own(model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 64 * GIB, 0)
    check_memory(model, manifest, "tensorrt", FakeCuda(memory_limit=2 * GIB))
    with pytest.raises(FastVLMError, match=r"the engines need about 1,[23]\d\d MiB of GPU memory, but only 1,024 MiB are"):
        check_memory(model, manifest, "tensorrt", FakeCuda(memory_limit=GIB))


def test_static_engines_of_the_decoder_are_a_pair(model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 64 * GIB, 0)
    card = FakeCuda(memory_limit=2 * GIB)
    check_memory(model, manifest, "tensorrt", card)
    with pytest.raises(FastVLMError, match=r"the engines need about 2,3\d\d MiB of GPU memory"):
        check_memory(model, manifest, "tensorrt", card, decoders=2)


def test_where_memory_is_not_reported_nothing_is_refused(model: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.engines.memory.available_memory", lambda: None)
    check_memory(model, manifest, "tensorrt", FakeCuda(integrated=True))


def test_the_prediction_covers_every_recorded_build_with_one_profile() -> None:
    rows = [row for row in json.loads(RECORD.read_text(encoding="utf-8"))["results"] if row["profiles"] == "one profile"]
    assert len(rows) >= 6
    for row in rows:
        predicted = predicted_peak(row["onnx_weight_bytes"], "tensorrt_rtx") / MIB
        assert row["peak_anonymous_mib"] <= predicted, row
        if row["size"] == "0.5b":  # the recorded 7B is mostly embedding and head, which need less than layers
            assert predicted <= 1.35 * row["peak_anonymous_mib"], row


def test_layers_with_fp32_scores_in_the_manifest_need_scratch_memory(manifest: Manifest) -> None:
    sized = replace(
        manifest,
        vision=replace(manifest.vision, dims=[8, 8]),
        decoder=replace(manifest.decoder, heads=14, kv_heads=2, intermediate=64, layers=24, context=3584, dtype="float16"),
    )
    wide = replace(sized, activations={"fp32_scores": [3]})
    scores = 14 * 512 * 4096  # heads, ids, positions
    assert predicted_scratch(wide) - predicted_scratch(sized) == pytest.approx((4 + 2) * scores, rel=0.01)


def test_an_early_manifest_has_no_prediction_of_scratch_memory(manifest: Manifest) -> None:
    assert predicted_scratch(manifest) == 0, "the fake model has no sizes of the encoder"
