"""Conversions for several sizes of pictures: one graph and one file of weights for all, and everything judged at each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.ort import HostFeatures, OrtBackend, OrtVision
from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.backends.verification.conversation import stored_pictures
from fastvlm_edge.backends.verification.reference import read_reference
from fastvlm_edge.cli import main
from fastvlm_edge.convert import pipeline as module
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.fastvithd import image_tokens
from fastvlm_edge.convert.parity import BOUNDS, encode, probe_activations
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.convert.precision import FP16_SAFE
from fastvlm_edge.model_dir.manifest import PRECISIONS, read_manifest, verify_files
from tests.support.checkpoints import write_checkpoint
from tests.support.parser_of_tensorrt_10_3 import check_graph

SIZES = [256, 128, 192]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / request.param
    convert(str(checkpoint), output, precision=request.param, image_size=SIZES, context=512)
    return output


def test_one_graph_takes_pictures_of_every_size(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(model)
    verify_files(model, manifest, hashes=True)
    assert manifest.vision.every_size == SIZES
    single = convert(str(checkpoint), tmp_path / "single", precision=manifest.precision, context=512)
    assert manifest.files.keys() == single.files.keys()
    assert manifest.files["vision.weights"] == single.files["vision.weights"]
    assert manifest.files["decoder.onnx"] == single.files["decoder.onnx"]
    for name in sorted(name for name in manifest.files if name.startswith("vision") and name.endswith(".onnx")):
        graph = onnx.load(model / name, load_external_data=False).graph
        shapes = [
            [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)
        ]
        assert shapes == [["batch", 3, "size", "size"], ["batch", "tokens", manifest.vision.hidden]]
        assert name != "vision.onnx" or check_graph(model / name) == []
        fixed = onnx.load(tmp_path / "single" / name, load_external_data=False).graph
        assert [each.dim_value for each in fixed.input[0].type.tensor_type.shape.dim][1:] == [3, 256, 256]
        assert len(graph.node) == len(fixed.node) + sum(node.op_type == "Shape" for node in graph.node)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_default_size_computes_the_same_as_in_a_conversion_for_it_alone(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    found = []
    for name, sizes in (("several", "256,128"), ("single", "256")):
        manifest = convert(str(checkpoint), tmp_path / name, precision=precision, image_size=sizes, context=512)
        backend = OrtBackend(tmp_path / name, manifest, threads=1)
        found.append(np.stack([backend.encode(pixels).numpy() for pixels in stored_pictures(256, manifest.vision.geometry)]))
        backend.close()
    assert compare(*found).cosine > 0.99999


def test_the_image_features_are_those_of_pytorch_at_every_size(checkpoint: Path, model: Path) -> None:
    manifest, source = read_manifest(model), open_checkpoint(str(checkpoint))
    encoder, projector = load_vision(source), load_projector(source)
    backend = OrtBackend(model, manifest, threads=1)
    bound = BOUNDS[manifest.precision].features
    for size in SIZES:
        for pixels in stored_pictures(size, manifest.vision.geometry):
            with torch.inference_mode():
                expected = projector(image_tokens(encoder(torch.from_numpy(pixels))))[0].numpy()
            found = backend.encode(pixels).numpy()
            assert found.shape == ((size // 64) ** 2, manifest.vision.hidden)
            assert compare(found, expected).cosine >= bound
        suffix = "" if size == SIZES[0] else f".{size}"
        assert bound <= manifest.parity[f"image_features{suffix}"]["cosine"] <= 1.0000001
    backend.close()
    with pytest.raises(FastVLMError, match=r"pixel_values have shape \[1, 3, 64, 64\]"):
        OrtBackend(model, manifest, threads=1).encode(np.zeros((1, 3, 64, 64), np.float32))


def test_engines_of_every_size_have_a_reference(model: Path) -> None:
    """The features are those that the graph for a GPU states, computed in FP32: within rounding those of the graph for a CPU."""
    manifest, reference = read_manifest(model), read_reference(model)
    assert sorted(reference.other_sizes) == sorted(SIZES[1:])
    backend = OrtBackend(model, manifest, threads=1)
    for size in SIZES:
        pictures = [backend.encode(pixels).numpy() for pixels in stored_pictures(size, manifest.vision.geometry)]
        assert compare(np.stack(pictures), reference.features_at(size, SIZES[0])).cosine > 0.99
    backend.close()


def test_a_reference_without_a_size_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(FastVLMError, match=r"reference\.npz has no image features of 320 px.*; convert the checkpoint again"):
        read_reference(model).features_at(320, SIZES[0])


def test_int8_on_a_cpu_is_judged_at_every_size(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves all sizes, so a block whose INT8 spoils one of them stays in floats."""
    real = encode

    def spoiled(directory: Path, manifest: Any, pictures: Sequence[Any]) -> list[Any]:
        features = real(directory, manifest, pictures)
        graph = onnx.load(directory / "vision.cpu.onnx", load_external_data=False).graph
        integers = any(node.op_type == "DynamicQuantizeLinear" for node in graph.node)
        return [found[::-1] if integers and pixels.shape[-1] == 128 else found for found, pixels in zip(features, pictures, strict=True)]

    manifest = convert(str(checkpoint), tmp_path / "model", precision="int8", image_size=[256, 128], context=512)
    assert manifest.activations["int8_on_cpu"]["blocks"] > 0
    monkeypatch.setattr(module, "encode", spoiled)
    manifest = convert(str(checkpoint), tmp_path / "model", precision="int8", image_size=[256, 128], context=512, force=True)
    assert manifest.activations["int8_on_cpu"]["blocks"] == 0


def test_one_size_that_overflows_fp16_widens_the_stage(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest value of any size decides: the probe sees the pictures of all sizes."""
    real, seen = probe_activations, list[list[int]]()

    def large(encoder: Any, projector: Any, pictures: Sequence[Any]) -> Any:
        largest, features = real(encoder, projector, pictures)
        seen.append([picture.shape[-1] for picture in pictures])
        return largest | {"stage2": 2 * FP16_SAFE}, features

    monkeypatch.setattr(module, "probe_activations", large)
    manifest = convert(str(checkpoint), tmp_path / "model", precision="fp16", image_size=[256, 128], context=512)
    assert seen == [[256, 256, 128, 128]]
    assert manifest.plan["vision.stage2"] == "fp32" and manifest.plan["vision.stage1"] == "fp16"


def test_a_fault_at_one_size_alone_is_found_and_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OrtVision.encode

    def faulty(self: OrtVision, pixel_values: Any) -> HostFeatures:
        found = real(self, pixel_values)
        return replace(found, data=found.data[::-1]) if pixel_values.shape[-1] == 128 else found

    monkeypatch.setattr(OrtVision, "encode", faulty)
    with pytest.raises(FastVLMError, match="the cosine of the image features at 128 px is"):
        convert(str(checkpoint), tmp_path / "model", precision="fp32", image_size=[256, 128], context=512)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "context", "message"),
    [
        ("256,100", 512, "image size 100 is not supported; choose 128 to 1536 in steps of 64 .*trained at 256"),
        ([256, 256], 512, "image size 256 is given twice"),
        ([128, 512], 100, "a context of 100 is too short for a picture of 64 tokens"),
    ],
)
def test_impossible_sizes_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, sizes: str | list[int], context: int, message: str
) -> None:
    with pytest.raises(FastVLMError, match=message):
        convert(str(checkpoint), tmp_path / "model", image_size=sizes, context=context)
    assert not any(tmp_path.iterdir())


def test_the_command_takes_sizes_and_names_them(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(checkpoint), "-o", str(tmp_path / "model"), "--precision", "int8"]
    assert main([*arguments, "--image-size", "256,128"]) == 0
    out, err = capsys.readouterr()
    assert ", 256 px (16 tokens, pad), 128 px (4 tokens), context " in out.splitlines()[0]
    assert "blocks of the encoder compute in INT8 (" in err
    assert main([*arguments, "--image-size", "192,192"]) == 2
    assert "argument --image-size: image size 192 is given twice" in capsys.readouterr().err


def test_older_manifests_and_references_have_one_size(checkpoint: Path, tmp_path: Path) -> None:
    manifest = convert(str(checkpoint), tmp_path / "model", precision="fp32", context=512)
    assert manifest.vision.other_sizes == [] and read_reference(tmp_path / "model").other_sizes == {}
