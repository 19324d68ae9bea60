"""The manifest is read back as it was written, a damaged one says where, and files that do not match it are named."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, Cascade, read_manifest, verify_files

CASCADE = {"sizes": [256], "threshold": 0.9, "confidence": "least"}


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def change(directory: Path, edit: Callable[[Any], Any]) -> None:
    path = directory / MANIFEST_NAME
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_manifest_is_read_back_as_it_was_written(directory: Path) -> None:
    manifest = dataclasses.replace(read_manifest(directory), notes=["config.json and the tensors disagree"])
    manifest.write(directory)
    assert read_manifest(directory) == manifest


def test_a_manifest_of_an_older_version_lacks_what_came_later(directory: Path) -> None:
    later = [(("vision", "dims", []), ("vision", "depths", [])), (("decoder", "heads", 0), ("decoder", "intermediate", 0))]
    fields = [field for part in later for field in part]

    def remove(document: Any) -> None:
        for part, key, _ in fields:
            del document[part][key]
        del document["notes"]

    change(directory, remove)
    manifest = read_manifest(directory)
    assert [getattr(getattr(manifest, part), key) for part, key, _ in fields] == [default for _, _, default in fields]
    assert manifest.notes == []


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda manifest: manifest.update(decoder=None), "decoder is not an object"),
        (lambda manifest: manifest.update(colour="red"), "unknown 'colour'"),
        (lambda manifest: manifest["vision"].pop("tokens"), "vision lacks 'tokens'"),
        (lambda manifest: manifest["decoder"].update(layers="24"), "layers is '24', not of type int"),
        (lambda manifest: manifest["text"].update(stop_ids=[None]), "stop_ids is 'None', not of type int"),
        (lambda manifest: manifest["files"]["decoder.onnx"].pop("sha256"), "decoder.onnx lacks 'sha256'"),
        (lambda manifest: manifest.pop("schema"), "'schema'"),
        (lambda manifest: manifest.update(precision="fp8"), "precision is 'fp8', not one of fp32"),
        (lambda manifest: manifest["vision"].update(geometry="stretch"), "geometry is 'stretch', not one of pad, crop"),
        (lambda manifest: manifest["vision"].update(image_size=300), "image_size is 300, not a multiple of 64"),
        (lambda manifest: manifest["vision"].update(image_size=-256), "image_size is -256, not a positive integer"),
        (lambda manifest: manifest["vision"].update(tokens=17), "tokens is 17, but an image of 256 px has 16"),
        (lambda manifest: manifest["vision"].update(other_sizes=[100]), "other_sizes is [100], beside 256"),
        (lambda manifest: manifest["vision"].update(other_sizes=[-64]), "other_sizes is [-64], beside 256"),
        (lambda manifest: manifest["vision"].update(other_sizes=[256]), "other_sizes is [256], beside 256"),
        (lambda manifest: manifest["vision"].update(other_sizes=[128, 128]), "other_sizes is [128, 128], beside 256"),
        (lambda manifest: manifest.update(cascade=CASCADE | {"sizes": [256, 128]}), "cascade has the sizes [256, 128], of [256]"),
        (lambda manifest: manifest.update(cascade=CASCADE | {"sizes": []}), "cascade has the sizes [], of [256]"),
        (lambda manifest: manifest.update(cascade=CASCADE | {"threshold": 1.5}), "cascade has the threshold 1.5, not a probability"),
        (lambda manifest: manifest.update(cascade=CASCADE | {"confidence": "most"}), "confidence is 'most', not one of mean, least"),
        (lambda manifest: manifest["vision"].update(hidden=9), "hidden is 9 for vision and 8 for the decoder"),
        (lambda manifest: manifest["vision"].update(depths=[2, 0]), "depths is [2, 0]"),
        (lambda manifest: manifest["decoder"].update(layers=0), "layers is 0, not a positive integer"),
        (lambda manifest: manifest["decoder"].update(context=0), "context is 0, not a positive integer"),
        (lambda manifest: manifest["decoder"].update(context=10**30), "context is 10000"),
        (lambda manifest: manifest["decoder"].update(candidates=10**6), "candidates is 1000000, but vocab only 512"),
        (lambda manifest: manifest["decoder"].update(dtype="float64"), "dtype is 'float64', not one of float32"),
        (lambda manifest: manifest["decoder"].update(heads=3), "heads is 3, not a multiple of kv_heads, 2"),
        (lambda manifest: manifest["decoder"].update(intermediate=-1), "intermediate is -1, not 0 or a positive"),
        (lambda manifest: manifest["text"].update(token_count=600), "token_count is 600, but vocab only 512"),
        (lambda manifest: manifest["text"].update(stop_ids=[512]), "stop_ids is [512], but vocab only 512"),
        (lambda manifest: manifest["text"].update(stop_ids=[-1]), "stop_ids is [-1], but vocab only 512"),
        (lambda manifest: manifest["files"].pop("decoder.onnx"), "files lacks 'decoder.onnx'"),
        (lambda manifest: manifest["files"].update({"../x": manifest["files"]["decoder.onnx"]}), "files has '../x', which is not"),
        (lambda manifest: manifest["files"]["decoder.onnx"].update(sha256="x"), "decoder.onnx has sha256 'x'"),
        (lambda manifest: manifest["files"]["decoder.onnx"].update(bytes=-1), "and -1 bytes"),
    ],
)
def test_a_damaged_manifest_says_where(directory: Path, edit: Callable[[Any], Any], says: str) -> None:
    change(directory, edit)
    with pytest.raises(FastVLMError, match=rf"is damaged \(.*{re.escape(says)}.*\); convert the checkpoint again"):
        read_manifest(directory)


def test_a_model_with_pictures_of_several_sizes(directory: Path) -> None:
    manifest = read_manifest(directory)
    several = dataclasses.replace(
        manifest,
        vision=dataclasses.replace(manifest.vision, other_sizes=[512, 128]),
        cascade=Cascade([128, 512], 0.75, "least", {"questions": 3}),
    )
    several.write(directory)
    assert read_manifest(directory) == several
    assert several.vision.sizes == [128, 256, 512]
    assert several.vision.at(256) is several.vision
    assert [several.vision.at(size).tokens for size in several.vision.sizes] == [4, 16, 64]
    assert several.vision.every_size == [several.vision.image_size, *several.vision.other_sizes]
    assert [several.vision.suffix(size) for size in several.vision.sizes] == [".128", "", ".512"]
    with pytest.raises(FastVLMError, match="this model takes pictures of 128, 256, 512 px, not 320; use one of these, or convert with 320"):
        several.vision.at(320)


@pytest.mark.parametrize("text", ["{", "", "[]", "7", "null", "[" * 100_000, '{"schema": 3, "parity": ' + '{"a":' * 100_000])
def test_a_file_that_is_not_a_manifest(directory: Path, text: str) -> None:
    (directory / MANIFEST_NAME).write_text(text)
    with pytest.raises(FastVLMError, match=r"fastvlm\.json is damaged \(.*\); convert the checkpoint again"):
        read_manifest(directory)


def test_another_schema(directory: Path) -> None:
    change(directory, lambda manifest: manifest.update(schema=99))
    with pytest.raises(FastVLMError, match="has schema 99, but this toolkit reads schema 3; convert the checkpoint again"):
        read_manifest(directory)


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError) as caught:
        read_manifest(tmp_path)
    assert caught.value.what == f"{tmp_path} is not a model directory: it has no {MANIFEST_NAME}"
    assert caught.value.mend == f"run: fastvlm-edge convert CHECKPOINT -o {tmp_path}"


def test_files_are_compared_with_the_manifest(directory: Path) -> None:
    manifest, path = read_manifest(directory), directory / "decoder.onnx"
    verify_files(directory, manifest, hashes=True)
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    verify_files(directory, manifest)  # the size is right, and hashes take time
    with pytest.raises(FastVLMError, match=r"decoder\.onnx is not the file that was converted \(sha256 differs\); copy it again"):
        verify_files(directory, manifest, hashes=True)
    path.write_bytes(content[:-10])
    with pytest.raises(FastVLMError, match=rf"has {len(content) - 10} bytes, but the manifest says {len(content)}; copy it again"):
        verify_files(directory, manifest)
    path.unlink()
    with pytest.raises(FastVLMError, match=r"decoder\.onnx is missing; copy the whole model directory again"):
        verify_files(directory, manifest)


@pytest.mark.parametrize(
    ("part", "field", "value", "tensor"),
    [
        ("decoder", "vocab", 511, "logits"),
        ("decoder", "vocab", 1024, "logits"),
        ("decoder", "kv_heads", 1, "past_key_values.0.key"),
        ("decoder", "head_dim", 8, "past_key_values.0.key"),
        ("decoder", "candidates", 63, "top_values"),
        ("decoder", "layers", 2, "past_key_values.2.key"),
        ("vision", "image_size", 512, "pixel_values"),
        ("both", "hidden", 16, "image_features"),
    ],
)
def test_the_manifest_is_compared_with_the_graphs(directory: Path, part: str, field: str, value: int, tensor: str) -> None:
    def edit(document: Any) -> None:
        for name in ("vision", "decoder") if part == "both" else (part,):
            document[name][field] = value
        if field == "image_size":
            document["vision"]["tokens"] = (value // 64) ** 2

    change(directory, edit)
    with pytest.raises(FastVLMError, match=rf"does not match its manifest: tensor {re.escape(tensor)} "):
        FastVLM.load(directory, "ort", threads=1)
