"""A converted model is called after its hub repository or directory, not after a placeholder or a hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.model_name import name_of
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import read_manifest
from tests.support.checkpoints import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("place", "saved_from", "name"),
    [
        ("FastVLM-0.5B", "other", "FastVLM-0.5B"),
        ("llava-fastvithd_0.5b_stage3", None, "llava-fastvithd_0.5b_stage3"),
        (f"models--apple--FastVLM-0.5B/snapshots/{COMMIT}", None, "FastVLM-0.5B"),
        ("fastvlm-meters/checkpoint-900", "apple/FastVLM-0.5B", "fastvlm-meters-checkpoint-900"),
        ("output/checkpoint-900", None, "checkpoint-900"),
        ("CHECKPOINT", "apple/FastVLM-0.5B", "FastVLM-0.5B"),
        (COMMIT, "./runs/fastvlm-meters/", "fastvlm-meters"),
        ("model", None, "FastVLM"),
        ("CHECKPOINT", "./checkpoint", "FastVLM"),
        ("merged", 5, "FastVLM"),
        ("merged", "two\nlines", "FastVLM"),
    ],
)
def test_the_name(place: str, saved_from: object, name: str, tmp_path: Path) -> None:
    directory = tmp_path / place
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({} if saved_from is None else {"_name_or_path": saved_from}))
    assert name_of(directory) == name


def test_a_link_is_called_after_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "fastvlm-meters").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fastvlm-meters")
    assert name_of(tmp_path / "link") == "fastvlm-meters"


def test_a_hub_id_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / COMMIT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / COMMIT))
    assert open_checkpoint("apple/FastVLM-0.5B").name == "FastVLM-0.5B"


def test_another_name_may_be_given(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "CHECKPOINT")
    convert(str(tmp_path / "CHECKPOINT"), tmp_path / "model", name="Meters, day 3")
    assert read_manifest(tmp_path / "model").name == "Meters, day 3"


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "x" * 101])
def test_a_name_that_does_not_fit_on_a_line_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match="is not usable; give 1 to 100 printable characters"):
        convert(str(tmp_path), tmp_path / "model", name=name)
