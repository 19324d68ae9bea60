"""The formulas of `plan` agree with the graphs that the converter writes. Nothing is stubbed; TensorRT is not used."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from fastvlm_edge.convert.graphs.placement import check_placement
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.planning.workload import PRECISIONS, shape_of, vision_work, weight_bytes
from tests.support.checkpoints import write_checkpoint


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_multiply_accumulates_and_bytes_are_those_of_the_graphs(tmp_path: Path, precision: str) -> None:
    convert(str(write_checkpoint(tmp_path / "checkpoint", layout="native", tied=False)), tmp_path / "model", precision=precision)
    manifest = read_manifest(tmp_path / "model")
    shape, size = shape_of(manifest), manifest.vision.image_size
    work = vision_work(shape.vision, shape.text.hidden, size)
    assert work.dense + work.grouped == sum(check_placement(tmp_path / "model" / "vision.onnx").macs.values())
    decoder = sum(check_placement(tmp_path / "model" / "decoder.onnx").macs.values())
    attention = 2 * shape.text.layers * shape.text.heads * shape.text.head_dim * 2  # one token against an empty cache of one and itself
    assert decoder == pytest.approx(shape.text.body + shape.text.head, abs=attention)
    stored = weight_bytes(shape, PRECISIONS[precision], size)
    pages = {name: manifest.files[f"{name}.weights"].bytes for name in ("vision", "decoder")}
    tensors = {name: len(_tensors(tmp_path / "model" / f"{name}.onnx")) for name in pages}
    pages["decoder"] -= 4 * manifest.decoder.context * manifest.decoder.head_dim  # the tables of the rotary embedding
    for name, found in pages.items():  # the rest is biases, norms, scales, and padding to a page
        assert stored[name] <= found <= 1.25 * stored[name] + 4096 * tensors[name]


def _tensors(path: Path) -> list[str]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer if tensor.external_data]
