"""Where a checkpoint comes from: a folder, a hub id, or neither."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, errors

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.hub import locate
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_checkpoint


def hub_gives(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[dict[str, Any]]:
    """Replace the download; returns the list of its calls."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def without_response(kind: type[Exception]) -> Exception:
    """A hub error without the HTTP response that its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error\nand more lines")
    return error


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_a_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "snapshot", layout="hub")
    calls = hub_gives(monkeypatch, tmp_path / "snapshot")
    checkpoint = open_checkpoint("apple/FastVLM-0.5B", revision="main")
    assert (checkpoint.location, checkpoint.name, checkpoint.layout) == ("apple/FastVLM-0.5B", "FastVLM-0.5B", "hub")
    assert [call["name"] for call in calls] == ["apple/FastVLM-0.5B"]
    assert calls[0]["revision"] == "main"
    assert calls[0]["allow_patterns"] == ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md"]


@pytest.mark.parametrize(
    ("files", "pickles"),
    [
        (["model.safetensors"], False),
        (["pytorch_model.bin"], True),
        (["adapter_model.safetensors", "adapter_config.json"], True),  # with non_lora_trainables.bin, perhaps
    ],
)
def test_pickles_are_downloaded_only_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], pickles: bool
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    calls = hub_gives(monkeypatch, tmp_path)
    assert locate("org/name") == tmp_path
    assert not any(pattern.endswith(".bin") for pattern in calls[0]["allow_patterns"])
    asked = {pattern for call in calls[1:] for pattern in call["allow_patterns"]}
    assert ({"pytorch_model*.bin", "non_lora_trainables.bin"} <= asked) == pickles and len(calls) == 1 + pickles


@pytest.mark.parametrize(
    "location", ["no such folder", "/no/such/folder", "name", "a/b/c", "../x", "", "folder/llava-fastvithd_0.5b_stage3.zip"]
)
def test_a_string_that_is_neither_folder_nor_id(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(empty)  # with nothing beside it
    with pytest.raises(FastVLMError, match="neither a local directory nor a hub id"):
        locate(location)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "neither a local directory nor a public hub repository; check the name.*hf auth login"),
        (errors.GatedRepoError, "is gated on the hub; accept its conditions"),
        (errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and the copy in the local cache is not complete"),
        (errors.HfHubHTTPError, r"the hub refused org/name at revision v9 \(401 Client Error\)"),
        (OSError, r"cannot be downloaded \(OSError: 401 Client Error\)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    hub_gives(monkeypatch, without_response(kind))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(FastVLMError, match=message) as raised:
        locate("org/name", revision="v9")
    assert "\n" not in str(raised.value)


def test_offline_without_a_cached_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FastVLMError, match="not complete in the local hub cache, and HF_HUB_OFFLINE forbids a download; unset it"):
        locate("apple/FastVLM-0.5B")


def test_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "stage3.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(FastVLMError, match="is a zip file; unpack it"):
        locate(str(tmp_path / "stage3.zip"))
    (tmp_path / "mm_projector.bin").write_bytes(b"x")
    with pytest.raises(FastVLMError, match="contains only a projector"):
        locate(str(tmp_path / "mm_projector.bin"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FastVLMError, match="is a file, not a checkpoint; give the directory that contains it"):
        locate(str(tmp_path / "model.safetensors"))
