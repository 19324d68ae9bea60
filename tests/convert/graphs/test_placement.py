"""The checker of Q/DQ placement: every product is counted in the type that it computes in, and each fallback is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastvlm_edge.convert.graphs.placement import Placement, check_placement
from fastvlm_edge.convert.pipeline import convert
from tests.support.checkpoints import write_checkpoint

CHANNELS, SIDE = 8, 4


class Graph:
    """A few nodes with weights of ones."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def quantized(self, x: str, name: str, zero: int = 0, kind: type[np.integer[Any]] = np.int8, scale: float = 0.1) -> str:
        pair = [self.constant(f"{name}.scale", np.float32(scale)), self.constant(f"{name}.zero", kind(zero))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *pair], f"{name}/q"), *pair], f"{name}/dq")

    def weight(self, name: str, *shape: int) -> str:
        self.constant(f"{name}.w", np.ones(shape, np.int8))
        self.constant(f"{name}.s", np.ones(shape[0], np.float32))
        return self.node("DequantizeLinear", [f"{name}.w", f"{name}.s"], f"{name}/w", axis=0)

    def conv(self, x: str, name: str, *, groups: int = 1, quantized: bool = True) -> str:
        weight = self.weight(name, CHANNELS, CHANNELS // groups, 1, 1)
        return self.node("Conv", [self.quantized(x, f"{name}/in") if quantized else x, weight], name, group=groups, kernel_shape=[1, 1])

    def check(self, path: Path, output: str) -> Placement:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return check_placement(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.onnx"


def reasons(placement: Placement) -> dict[str, str]:
    return {fallback.node: fallback.reason.partition(":")[0] for fallback in placement.fallbacks}


def test_a_convolution_with_both_sides_quantised_is_int8(path: Path) -> None:
    graph = Graph()
    placement = graph.check(path, graph.conv(graph.conv("x", "first"), "second"))
    assert placement.macs == {"INT8": 2 * CHANNELS * CHANNELS * SIDE * SIDE}
    assert placement.share() == 1
    assert placement.fallbacks == []


def test_products_that_fall_back_are_named(path: Path) -> None:
    graph = Graph()
    x = graph.conv("x", "weights only", quantized=False)
    x = graph.conv(x, "depthwise", groups=CHANNELS)
    x = graph.conv(x, "grouped", groups=4)
    weight = graph.constant("plain", np.ones((CHANNELS, CHANNELS, 1, 1), np.float32))
    x = graph.node("Conv", [graph.quantized(x, "half"), weight], "input only", kernel_shape=[1, 1])
    placement = graph.check(path, graph.conv(x, "good"))
    assert reasons(placement) == {
        "weights only": "missing pair",
        "depthwise": "depthwise convolution",
        "grouped": "grouped convolution",
        "input only": "missing pair",
    }
    full = CHANNELS * CHANNELS * SIDE * SIDE
    assert placement.macs == {"INT8 weights -> FP32": full + full // CHANNELS + full // 4, "FP32": full, "INT8": full}
    assert placement.share() == pytest.approx(1 / (1 + 1 + 1 + 1 / 8 + 1 / 4))


def test_operators_around_int8_products_are_named(path: Path) -> None:
    graph = Graph()
    conv = graph.conv("x", "conv")
    gelu = graph.node("Erf", [graph.node("Div", [conv, graph.constant("root", np.float32(1.4))], "scaled")], "erf")
    graph.node("Add", [conv, "x"], "residual")
    good = graph.node("Add", [conv, graph.quantized("x", "skip")], "quantised residual")
    gate = graph.node("Sigmoid", [graph.node("ReduceMean", ["x"], "pool", keepdims=1)], "gate")
    graph.node("Mul", ["x", gate], "excite")
    placement = graph.check(path, graph.node("Add", [gelu, good], "end"))
    assert reasons(placement) == {"erf": "GELU", "residual": "residual add", "gate": "squeeze-excite"}


def test_pairs_that_tensorrt_cannot_use_are_named(path: Path) -> None:
    graph = Graph()
    x = graph.node("Conv", [graph.quantized("x", "shifted", zero=3), graph.weight("a", CHANNELS, CHANNELS, 1, 1)], "a", kernel_shape=[1, 1])
    x = graph.quantized(x, "unsigned", kind=np.uint8)
    scales = graph.constant("many", np.full(CHANNELS, 0.1, np.float32))
    lonely = graph.node("QuantizeLinear", [x, scales], "lonely", axis=1)
    placement = graph.check(path, graph.node("Cast", [lonely], "cast", to=TensorProto.FLOAT))
    found = {(fallback.node, fallback.reason.partition(":")[0]) for fallback in placement.fallbacks}
    assert {("shifted/q", "asymmetric zero point"), ("unsigned/q", "UINT8")} <= found
    assert {("lonely", "per-channel scales on an activation"), ("lonely", "missing pair")} <= found


@pytest.mark.parametrize(("precision", "kinds"), [("fp32", {"FP32"}), ("int4", {"INT4 weights -> FP16", "INT8 weights -> FP16", "FP16"})])
def test_our_own_decoder(tmp_path: Path, precision: str, kinds: set[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", layout="native")
    convert(str(checkpoint), tmp_path / "model", precision=precision)
    placement = check_placement(tmp_path / "model" / "decoder.onnx")
    assert set(placement.macs) == kinds
    assert all(str(fallback).startswith("/") for fallback in placement.fallbacks)
