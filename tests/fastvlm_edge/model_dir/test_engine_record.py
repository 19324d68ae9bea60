"""Which machine engines belong to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.machine.host import Jetson
from fastvlm_edge.model_dir.engine_record import RECORD_NAME, EngineRecord, Gpu, mismatch, onnx_hashes, read_record
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest
from tests.support.fake_model import build_model

GIB = 1 << 30
NANO = Gpu("Orin", (8, 7), 8, int(7.4 * GIB), "Orin Nano 8 GB")
NX = Gpu("Orin", (8, 7), 8, int(15.3 * GIB), "Orin NX 16 GB")
AGX = Gpu("Orin", (8, 7), 16, int(61.4 * GIB), "AGX Orin 64 GB")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(build_model(tmp_path_factory.mktemp("model") / "fake"))


def built_on(gpu: Gpu, manifest: Manifest, library: str = "tensorrt") -> EngineRecord:
    record = EngineRecord("orin", library, "10.7.0", [[8, 7]], gpu.name, {}, onnx_hashes(manifest), {}, {}, {})
    return replace(record, multiprocessors=gpu.multiprocessors, memory_bytes=gpu.memory_bytes, board=gpu.board)


def reason(record: EngineRecord, manifest: Manifest, gpu: Gpu) -> str | None:
    return mismatch(record, manifest, record.library, record.version, gpu)


@pytest.mark.parametrize("gpu", [NANO, NX, AGX])
def test_engines_run_on_the_board_that_built_them(manifest: Manifest, gpu: Gpu) -> None:
    assert reason(built_on(gpu, manifest), manifest, gpu) is None


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (AGX, NANO, "AGX Orin 64 GB (16 multiprocessors, 61.4 GiB), but this is Orin Nano 8 GB (8 multiprocessors, 7.4 GiB)"),
        (NX, NANO, "Orin NX 16 GB (8 multiprocessors, 15.3 GiB), but this is Orin Nano 8 GB (8 multiprocessors, 7.4 GiB)"),
        (NANO, NX, "Orin Nano 8 GB (8 multiprocessors, 7.4 GiB), but this is Orin NX 16 GB (8 multiprocessors, 15.3 GiB)"),
        (
            replace(AGX, board=""),
            replace(NANO, board=""),
            "Orin (16 multiprocessors, 61.4 GiB), but this is Orin (8 multiprocessors, 7.4 GiB)",
        ),
        (
            replace(NX, board=""),
            replace(NANO, board=""),
            "Orin (8 multiprocessors, 15.3 GiB), but this is Orin (8 multiprocessors, 7.4 GiB)",
        ),
    ],
)
def test_orins_are_told_apart_and_both_are_named(manifest: Manifest, there: Gpu, here: Gpu, says: str) -> None:
    assert reason(built_on(there, manifest), manifest, here) == f"they were built on {says}"


def test_what_is_unknown_does_not_count(manifest: Manifest) -> None:
    old = built_on(Gpu("Orin", (8, 7)), manifest)
    assert reason(old, manifest, NANO) is None, "a record of an earlier version"
    in_a_container = replace(NANO, board="")
    assert reason(built_on(NANO, manifest), manifest, in_a_container) is None
    only_seen_by_doctor = replace(NANO, multiprocessors=0)
    assert reason(built_on(NANO, manifest), manifest, only_seen_by_doctor) is None
    another_kernel = replace(NANO, memory_bytes=int(NANO.memory_bytes * 0.97))
    assert reason(built_on(NANO, manifest), manifest, another_kernel) is None


def test_engines_of_tensorrt_for_rtx_fit_every_card_of_their_architecture(manifest: Manifest) -> None:
    assert reason(built_on(AGX, manifest, "tensorrt_rtx"), manifest, NANO) is None


def test_records_of_earlier_versions_are_read(tmp_path: Path, manifest: Manifest) -> None:
    built_on(AGX, manifest).write(tmp_path)
    assert read_record(tmp_path) == built_on(AGX, manifest)
    path = tmp_path / RECORD_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    for name in ("multiprocessors", "memory_bytes", "board"):
        del document[name]
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_record(tmp_path) == built_on(Gpu("Orin", (8, 7)), manifest)


@pytest.mark.parametrize(
    ("model", "module", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "Orin Nano 8 GB (developer kit)", "Orin Nano 8 GB"),
        ("A board of another maker", None, "A board of another maker"),
        ("a Jetson", None, ""),
    ],
)
def test_a_board_is_named_by_its_module(model: str, module: str | None, name: str) -> None:
    assert Jetson(model, "tegra234", module, (8, 7), None, None).name == name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"library": "tensorflow"}, "library is 'tensorflow', not one of tensorrt, tensorrt_rtx"),
        ({"compute_capabilities": [[8]]}, "compute_capabilities is [[8]]"),
        ({"compute_capabilities": []}, "compute_capabilities is []"),
        ({"memory_bytes": -1}, "memory_bytes is -1"),
        ({"parity": {"faults": [1]}}, "faults is not a list of objects with a part and a text"),
        ({"files": {"../vision.engine": {"sha256": "0" * 64, "bytes": 1}}}, "which is not the name of a file"),
        ({"profiles": {"vision": [{"pixel_values": [[1], [2]]}]}}, "the profile of vision has shapes [[1], [2]]"),
        ({"profiles": {"vision": [{"pixel_values": [[1], [3], [2]]}]}}, "the profile of vision has shapes [[1], [3], [2]]"),
        ({"flags": json.loads("[" * 500 + "]" * 500)}, "flags"),
    ],
)
def test_a_record_with_impossible_values_is_damaged(tmp_path: Path, manifest: Manifest, changes: dict[str, Any], says: str) -> None:
    built_on(AGX, manifest).write(tmp_path)
    path = tmp_path / RECORD_NAME
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(FastVLMError, match=rf"is damaged \(.*{re.escape(says)}"):
        read_record(tmp_path)


def test_a_record_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text("[" * 100_000)
    with pytest.raises(FastVLMError, match="is damaged"):
        read_record(tmp_path)
