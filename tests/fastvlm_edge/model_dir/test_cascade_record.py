"""The cascade is written into the manifest and nothing else changes, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.batch.job import job_for
from fastvlm_edge.generation.images import model_digest
from fastvlm_edge.model_dir import cascade_record
from fastvlm_edge.model_dir.cascade_record import check_changeable, write_cascade
from fastvlm_edge.model_dir.engine_record import onnx_hashes
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, Cascade, read_manifest
from fastvlm_edge.model_dir.verified import changed
from tests.support.fake_model import IMAGE_SIZE

CASCADE = Cascade([IMAGE_SIZE], 0.75, "least", {"count": 2000, "data": "questions.jsonl"})


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


def test_only_the_cascade_changes(directory: Path) -> None:
    path, manifest = directory / MANIFEST_NAME, read_manifest(directory)
    path.chmod(0o640)
    before = json.loads(path.read_text())
    write_cascade(directory, manifest, CASCADE)
    assert json.loads(path.read_text()) == before | {"cascade": dataclasses.asdict(CASCADE)}
    assert read_manifest(directory) == dataclasses.replace(manifest, cascade=CASCADE)
    assert path.stat().st_mode & 0o777 == 0o640
    again = dataclasses.replace(CASCADE, threshold=0.5)
    write_cascade(directory, manifest, again)
    assert read_manifest(directory).cascade == again


def test_nothing_that_is_known_of_the_model_is_forgotten(directory: Path) -> None:
    """Compared files, engines, encoded pictures, chats and jobs go by the hashes of the files, of which the manifest is none."""

    def known() -> tuple[Any, ...]:
        manifest = read_manifest(directory)
        return changed(directory, manifest), onnx_hashes(manifest), model_digest(manifest), job_for(manifest, {}).model_sha256

    before = known()
    write_cascade(directory, read_manifest(directory), CASCADE)
    assert known() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_the_manifest_as_it_was(
    directory: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = (directory / MANIFEST_NAME).read_bytes(), sorted(os.listdir(directory))

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((FastVLMError, KeyboardInterrupt)) as found:
        write_cascade(directory, read_manifest(directory), CASCADE)
    assert isinstance(found.value, KeyboardInterrupt) or "No space left on device), and is as it was" in str(found.value)
    assert (directory / MANIFEST_NAME).read_bytes() == before and sorted(os.listdir(directory)) == names


def test_another_conversion_does_not_get_the_cascade(directory: Path) -> None:
    manifest = read_manifest(directory)
    files = dict(list(manifest.files.items())[1:])
    with pytest.raises(FastVLMError, match="was converted again meanwhile"):
        write_cascade(directory, dataclasses.replace(manifest, files=files), CASCADE)
    assert read_manifest(directory).cascade is None


def test_a_directory_that_cannot_be_changed_is_refused_before_the_work(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_changeable(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(FastVLMError, match="is not writable, so a cascade cannot be kept there; copy the model directory"):
            check_changeable(directory)
    with monkeypatch.context() as patch:
        patch.setattr(cascade_record, "_PACKAGE", directory.parent)
        with pytest.raises(FastVLMError, match="belongs to the installed package"):
            check_changeable(directory)
    (directory / MANIFEST_NAME).rename(directory.parent / "blob")
    (directory / MANIFEST_NAME).symlink_to("../blob")
    with pytest.raises(FastVLMError, match=r"is a link to \.\./blob"):
        check_changeable(directory)
