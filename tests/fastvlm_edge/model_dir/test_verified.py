"""Damaged files of the right size are noticed at the next load, and whole ones are read for their hashes only once."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.model_dir import verified
from fastvlm_edge.model_dir.manifest import FileRecord, check_sha256, read_manifest
from fastvlm_edge.model_dir.verified import VERIFIED_NAME, verify


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model directory."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read for their hashes."""
    names: list[str] = []

    def check(path: Path, record: FileRecord) -> None:
        names.append(path.name)
        check_sha256(path, record)

    monkeypatch.setattr(verified, "check_sha256", check)
    return names


def damage(path: Path) -> None:
    """Change one byte, and nothing that `ls` shows."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def load(directory: Path, *, verify: bool = False) -> None:
    FastVLM.load(directory, "ort", threads=1, verify=verify).close()


def test_files_are_compared_once(directory: Path, hashed: list[str]) -> None:
    manifest = read_manifest(directory)
    load(directory)  # a copy
    assert hashed == [*manifest.files]
    hashed.clear()
    load(directory)
    assert hashed == []
    load(directory, verify=True)
    assert hashed == [*manifest.files]


def test_a_new_conversion_is_not_compared(model_dir: Path, hashed: list[str]) -> None:
    load(model_dir)
    assert hashed == []


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json"])
def test_a_damaged_file_is_named(directory: Path, name: str, hashed: list[str]) -> None:
    load(directory)
    hashed.clear()
    damage(directory / name)
    for _ in range(2):
        with pytest.raises(FastVLMError, match=rf"{name} is not the file that was converted \(sha256 differs\)"):
            load(directory)
    assert hashed == ([] if name == "tokenizer.json" else [name, name])  # the tokenizer is compared at every load, before it is read


def test_another_manifest_is_compared(directory: Path, hashed: list[str]) -> None:
    manifest = read_manifest(directory)
    verify(directory, manifest)
    hashed.clear()
    record = FileRecord("0" * 64, manifest.files["decoder.onnx"].bytes)
    other = dataclasses.replace(manifest, files={**manifest.files, "decoder.onnx": record})
    with pytest.raises(FastVLMError, match=r"decoder\.onnx is not the file"):
        verify(directory, other)
    assert hashed == ["decoder.onnx"]


@pytest.mark.parametrize("content", ["", "[]", "7", "{", '{"decoder.onnx": 7}', "[" * 100_000])
def test_a_damaged_record_means_that_nothing_was_compared(directory: Path, content: str, hashed: list[str]) -> None:
    (directory / VERIFIED_NAME).write_text(content)
    load(directory)
    assert "decoder.onnx" in hashed


def test_a_directory_that_cannot_be_written_to_is_compared_every_time(directory: Path, hashed: list[str]) -> None:
    (directory / VERIFIED_NAME).unlink()
    (directory / VERIFIED_NAME).mkdir()  # root may write to any directory
    for _ in range(2):
        hashed.clear()
        load(directory)
        assert len(hashed) == len(read_manifest(directory).files)
