"""The interpreter computes what onnxruntime does where both compute in FP32, and rounds where it says so."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.fastvithd import FastViTHD
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import build_decoder
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import on_cpu, precision_plan
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from fastvlm_edge.convert.weights.vision import write_vision_weights
from tests.support.checkpoints import TINY_VISION, write_checkpoint
from tests.support.graph_interpreter import Interpreter


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_decoder_in_fp32_gives_what_onnxruntime_gives(precision: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "checkpoint", layout="native")))
    text, rng = checkpoint.text, np.random.default_rng(0)
    weights = WeightsFile(tmp_path / "decoder.weights")
    write_decoder_weights(checkpoint, precision_plan(precision), weights, lambda: None, context=64)
    weights.close()
    graph = GraphBuilder("decoder", weights)
    build_decoder(graph, text, on_cpu(precision_plan(precision)))
    graph.save(tmp_path / "decoder.onnx")
    feeds = {
        "input_ids": np.array([[5, text.vocab + 1, 9, 300, text.vocab]]),
        "position_ids": np.arange(7, 12)[None],
        "image_features": rng.standard_normal((2, text.hidden)).astype(np.float32),
        "logit_positions": np.array([[4, 1]]),
    }
    for layer in range(text.layers):
        for part in ("key", "value"):
            cache = rng.standard_normal((1, text.kv_heads, 16, text.head_dim)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{part}"] = cache
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(tmp_path / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    interpreter = Interpreter(tmp_path / "decoder.onnx")
    found = interpreter.run(feeds)
    for name, expected in zip(interpreter.outputs, session.run(interpreter.outputs, feeds), strict=True):
        assert found[name].dtype == expected.dtype
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("exact", [False, True])
def test_an_encoder_in_fp32_gives_what_onnxruntime_gives(exact: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = FastViTHD(TINY_VISION).eval().requires_grad_(False)
    projector = nn.Sequential(nn.Linear(TINY_VISION.out_dim, 48), nn.GELU(), nn.Linear(48, 48)).requires_grad_(False)
    weights = WeightsFile(tmp_path / "vision.weights")
    write_vision_weights(encoder, projector, precision_plan("fp32"), weights, lambda: None)
    weights.close()
    graph = GraphBuilder("vision", weights)
    scales = {"vision.stages.0.blocks.0.mlp.fc1": 0.5}
    build_vision(graph, TINY_VISION, 48, 128, precision_plan("fp32"), scales)
    graph.save(tmp_path / "vision.onnx")
    pixels = np.random.default_rng(0).random((1, 3, 128, 128), np.float32)
    session = ort.InferenceSession(str(tmp_path / "vision.onnx"), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"pixel_values": pixels})
    found = Interpreter(tmp_path / "vision.onnx", exact=exact).run({"pixel_values": pixels})["image_features"]
    assert found.dtype == (np.float64 if exact else np.float32)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


def product(path: Path, *, cast: bool, dtype: int) -> Path:
    """x [1, 48] times w [48, 1], both declared `dtype`, with or without a Cast to FP32 around the product."""
    nodes, names = [], ["x", "w"]
    if cast:
        nodes = [helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT) for name in names]
        names = [f"{name}/wide" for name in names]
    nodes.append(helper.make_node("MatMul", names, ["sum" if cast else "y"], name="product"))
    if cast:
        nodes.append(helper.make_node("Cast", ["sum"], ["y"], to=dtype))
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in (("x", [1, 48]), ("w", [48, 1]))]
    graph = helper.make_graph(nodes, "product", inputs, [helper.make_tensor_value_info("y", dtype, [1, 1])])
    onnx.save(helper.make_model(graph), str(path))
    return path


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)])
def test_sums_are_as_wide_as_asked_for(kind: int, dtype: type, tmp_path: Path) -> None:
    """1024 and then 16 times 1/16 in each of two steps: the narrow sum loses what is below its step, the wide one rounds once."""
    x: NDArray[Any] = np.full((1, 48), 0.25, dtype)
    x[0, :16] = 0
    x[0, 0] = 1
    w: NDArray[Any] = np.full((48, 1), 0.25 * 0.375, dtype)
    w[0, 0] = 1024
    exact = 1024 + 2 * 16 * 0.25 * 0.25 * 0.375
    narrow = {}
    for cast in (False, True):
        path = product(tmp_path / f"{cast}.onnx", cast=cast, dtype=kind)
        for sums in ("", "declared", "all"):
            narrow[cast, sums] = float(Interpreter(path, narrow_sums=sums).run({"x": x, "w": w})["y"][0, 0])
    step = {np.float16: 1.0, ml_dtypes.bfloat16: 8.0}[dtype]
    once = np.rint(exact / step) * step
    assert [narrow[False, ""], narrow[True, ""], narrow[True, "declared"]] == [once] * 3
    assert narrow[False, "declared"] == narrow[True, "all"] == 1024
    assert (once != 1024) == (dtype == np.float16)


def test_a_fault_rounds_the_node_that_it_names(tmp_path: Path) -> None:
    path = product(tmp_path / "product.onnx", cast=True, dtype=TensorProto.FLOAT16)
    feeds = {"x": np.ones((1, 48), np.float16), "w": np.full((48, 1), 0.1, np.float16)}
    plain = Interpreter(path).run(feeds)
    faulty = Interpreter(path, rounded=lambda node: ml_dtypes.bfloat16 if node == "product" else None).run(feeds)
    assert faulty["sum"].dtype == np.float32
    assert faulty["sum"] == plain["sum"].astype(ml_dtypes.bfloat16).astype(np.float32) != plain["sum"]
