"""Which files hold the weights: two candidates are an error, what is left aside is said, and what is no checkpoint is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_checkpoint


def refuse(directory: Path, message: str) -> None:
    """Opening fails with one line that matches, says what to do, and does not advise a download of what is not damaged."""
    with pytest.raises(FastVLMError, match=message) as raised:
        open_checkpoint(str(directory))
    assert "\n" not in str(raised.value) and raised.value.mend
    assert "download" not in raised.value.mend


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"])
def test_an_adapter_beside_whole_weights(whole: Path, name: str) -> None:
    (whole / name).write_bytes(b"")
    refuse(
        whole,
        rf"has an adapter \({name}\) beside its weights.*; move the adapter to a directory of its own, and give that with --adapter",
    )


@pytest.mark.parametrize(("single_is_newer", "newer"), [(True, "model.safetensors"), (False, "model.safetensors.index.json")])
def test_shards_and_a_single_file(tmp_path: Path, single_is_newer: bool, newer: str) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    single = write_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    shutil.copyfile(single, directory / "model.safetensors")
    os.utime(directory / "model.safetensors", (0, 2_000_000_000 if single_is_newer else 1_000_000_000))
    refuse(
        directory, rf"two sets of weights: model\.safetensors, and the shards of model\.safetensors\.index\.json \({newer} is newer\); move"
    )


def test_shards_without_an_index_and_a_single_file(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    (directory / "model.safetensors.index.json").unlink()
    shutil.copyfile(write_checkpoint(tmp_path / "other") / "model.safetensors", directory / "model.safetensors")
    refuse(directory, r"two sets of weights: model\.safetensors, and shards without an index \(model-00001-of-00002\.safetensors, ")


def test_an_index_of_the_single_file_is_no_contradiction(whole: Path) -> None:
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model.safetensors"}}')
    assert open_checkpoint(str(whole)).notes == []


def test_files_that_are_left_aside_are_said(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    for name in ("model-00001-of-00003.safetensors", "pytorch_model.bin", "mm_projector.bin"):
        (directory / name).write_bytes(b"")
    assert open_checkpoint(str(directory)).notes == [
        "not used: mm_projector.bin, model-00001-of-00003.safetensors, pytorch_model.bin; "
        "the weights are those in model-00001-of-00002.safetensors and 1 more"
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "zero_to_fp32.py"], "is a DeepSpeed checkpoint.*; run in it: python zero_to_fp32.py"),
        (["config.json", "global_step900/x.pt"], "is a DeepSpeed checkpoint"),
        (["config.json", "pytorch_model_fsdp_0/x.distcp"], "is an FSDP checkpoint.*; run: accelerate merge-weights"),
        (["config.json", "model.gguf"], "is an export for CoreML, MLX or llama.cpp"),
        (["config.json", "non_lora_trainables.bin"], r"contains only a fine-tune \(non_lora_trainables\.bin\)"),
        (["fastvlm.json", "vision.onnx"], "is a model directory, which is already converted"),
    ],
)
def test_weights_in_another_form(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    refuse(tmp_path, message)


@pytest.mark.parametrize("top", [[], ["config.json"]])
def test_the_folder_of_a_training_leads_to_its_last_checkpoint(tmp_path: Path, top: list[str]) -> None:
    for number in (100, 900, 1000, 20):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "config.json").write_text("{}")
    (tmp_path / "checkpoint-5000").mkdir()  # nothing in it
    (tmp_path / "runs").mkdir()
    for name in top:
        (tmp_path / name).write_text("{}")
    refuse(tmp_path, rf"; try {tmp_path}/checkpoint-1000$")


@pytest.mark.parametrize("given", ["", "models--org--FastVLM", "models--org--FastVLM/snapshots"])
@pytest.mark.parametrize("with_ref", [True, False])
def test_a_hub_cache_leads_to_its_snapshot(tmp_path: Path, given: str, with_ref: bool) -> None:
    repository = tmp_path / "models--org--FastVLM"
    current = repository / "snapshots" / "0a1b"
    write_checkpoint(current)
    if with_ref:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0a1b\n")
        (repository / "snapshots" / "00ff").mkdir()  # of an older commit, without the file
    refuse(tmp_path / given, rf"config\.json is missing; try {current}$")
    assert open_checkpoint(str(current)).name == "FastVLM"
