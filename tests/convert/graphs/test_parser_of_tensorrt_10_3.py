"""JetPack 6 in mind: our graphs hold nothing that the parser of TensorRT 10.3 is known to refuse, and what it refuses is named."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.model_dir.manifest import PRECISIONS
from tests.support.checkpoints import write_checkpoint
from tests.support.parser_of_tensorrt_10_3 import OPERATORS, Finding, check_graph, list_doubts

F32, F16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Specs = Mapping[str, tuple[int, Sequence[int | str]]]
"""Name -> (element type, shape) of inputs or outputs."""
Constants = Mapping[str, "TensorProto | NDArray[Any]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")


@pytest.fixture(scope="module", params=PRECISIONS)
def model_dir(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / request.param
    convert(str(checkpoint), output, precision=request.param, context=512)
    return output


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_no_node_of_our_graphs_is_refused(model_dir: Path, name: str) -> None:
    assert [str(finding) for finding in check_graph(model_dir / name)] == []


def test_the_doubts_about_our_graphs_are_the_documented_ones(model_dir: Path) -> None:
    integers = model_dir.name in ("int8", "int4")
    found = {name: {doubt.op for doubt in list_doubts(model_dir / f"{name}.onnx")} for name in ("vision", "decoder")}
    weights = {"DequantizeLinear"} if integers else set()
    assert found == {"vision": {"graph"} | weights, "decoder": {"graph"} | weights}


def test_the_graph_for_the_cpu_is_refused_where_it_gathers_integers(model_dir: Path) -> None:
    """Why there are two: docs/graphs.md."""
    path = model_dir / "decoder.cpu.onnx"
    if model_dir.name not in ("int8", "int4"):
        pytest.skip("no such graph, or none with integers")
    assert "/embed/text/Gather" in {finding.node for finding in check_graph(path)}


# Single nodes -------------------------------------------------------------------------------------------------------------------


def model(
    nodes: Sequence[onnx.NodeProto], inputs: Specs, outputs: Specs | None = None, constants: Constants | None = None, opset: int = 21
) -> onnx.ModelProto:
    """A graph of a few nodes."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in (outputs or {}).items()],
        [value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)])


def problems(*args: Any, **kwargs: Any) -> list[str]:
    return [finding.problem for finding in check_graph(model(*args, **kwargs))]


def one(
    op: str, inputs: Specs, constants: Constants | None = None, *, outputs: Sequence[str] = ("y",), opset: int = 21, **attributes: Any
) -> list[str]:
    """What there is to say of one node."""
    names = [*inputs, *(constants or {})]
    return problems([helper.make_node(op, names, list(outputs), name="/n", **attributes)], inputs, constants=constants, opset=opset)


@pytest.mark.parametrize("op", ["RMSNormalization", "Attention", "TensorScatter", "RotaryEmbedding", "Swish", "Bernoulli"])
def test_an_operator_without_importer_is_named(op: str) -> None:
    graph = model([helper.make_node(op, ["x", "x"], ["y"], name="/layers.0/it")], {"x": (F16, [2, 4])})
    assert check_graph(graph) == [Finding("/layers.0/it", op, "10.3 has no importer for it")]


def test_an_operator_of_another_domain_is_named() -> None:
    node = helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft")
    assert problems([node], {"x": (F16, [2, 4])}) == ["an operator of com.microsoft: 10.3 would look for a plugin of that name"]


def test_control_flow_is_not_vouched_for() -> None:
    assert "read docs/operators.md" in one("Scan", {"x": (F32, [2, 4])})[0]


@pytest.mark.parametrize(("opset", "good"), [(8, False), (17, True), (21, True), (22, False), (23, False)])
def test_the_opset_has_bounds(opset: int, good: bool) -> None:
    found = one("Relu", {"x": (F32, [2])}, opset=opset)
    assert found == ([] if good else [f"opset {opset}; 10.3 is known to read 9 to 21"])


@pytest.mark.parametrize(
    ("op", "kinds"),
    [
        ("Gather", [TensorProto.INT8, I64]),
        ("Erf", [I64]),
        ("MatMul", [TensorProto.INT32] * 2),
        ("Pow", [I64] * 2),
        ("Less", [TensorProto.BOOL] * 2),
        ("And", [I64] * 2),
    ],
)
def test_a_type_that_an_operator_does_not_take_is_named(op: str, kinds: Sequence[int]) -> None:
    found = one(op, {name: (kind, [4, 4]) for name, kind in zip("xz", kinds, strict=False)})
    assert any(f"an input of {TensorProto.DataType.Name(kinds[0])}; 10.3 takes" in problem for problem in found), found


def test_types_of_our_operators_are_accepted() -> None:
    assert one("Where", {"c": (TensorProto.BOOL, [2, 1]), "a": (I64, [2, 3]), "b": (I64, [])}) == []
    assert one("LessOrEqual", {"a": (I64, [2, 1]), "b": (I64, [2, 3])}) == []
    assert one("Sigmoid", {"x": (TensorProto.BFLOAT16, [2, 3])}) == []
    assert one("Cast", {"x": (I64, ["n"])}, to=TensorProto.BFLOAT16) == []
    assert one("Shape", {"x": (F16, ["n", 2])}, start=0, end=1) == []


def test_types_that_strong_typing_refuses_are_named() -> None:
    mixed = {"x": (F16, [2, 3]), "e": (F32, [])}
    assert one("Pow", mixed) == ["inputs of FLOAT and FLOAT16 in one operator; a strongly typed network takes one type"]
    assert "alpha 0.5" in one("Gemm", {"a": (F16, [2, 3]), "b": (F16, [3, 2])}, alpha=0.5)[0]
    assert one("Gemm", {"a": (F32, [2, 3]), "b": (F32, [3, 2])}, alpha=0.5) == []


def test_bindings_and_casts_of_quantised_types_are_named() -> None:
    assert "an input or output of INT8" in one("Relu", {"x": (TensorProto.INT8, [2])})
    assert "an output of INT8" in one("Cast", {"x": (F32, [2])}, to=TensorProto.INT8)[0]
    assert one("Cast", {"x": (F32, [2])}, to=TensorProto.UINT16) == ["a cast to UINT16"]


# Quantisation -------------------------------------------------------------------------------------------------------------------


def integers(kind: int, shape: Sequence[int]) -> TensorProto:
    return helper.make_tensor("w", kind, shape, np.ones(int(np.prod(shape)), np.int8).tolist())


def dequantize(kind: int, shape: Sequence[int], scales: NDArray[Any], zero: Sequence[int] | None = None, **attributes: Any) -> list[str]:
    constants: dict[str, TensorProto | NDArray[Any]] = {"w": integers(kind, shape), "s": np.asarray(scales, np.float16)}
    if zero is not None:
        constants["z"] = helper.make_tensor("z", kind, [len(zero)] if len(zero) > 1 else [], zero)
    return one("DequantizeLinear", {}, constants, **attributes)


def ones(*shape: int) -> NDArray[Any]:
    return np.ones(shape)


INT8, INT4, UINT8 = TensorProto.INT8, TensorProto.INT4, TensorProto.UINT8


def test_our_three_forms_of_quantisation_are_accepted() -> None:
    assert dequantize(INT8, [128, 6], ones(6), axis=1) == []
    assert dequantize(INT8, [6, 1, 3, 3], ones(6), axis=0) == []
    assert dequantize(INT4, [128, 6], ones(2, 6), axis=0, block_size=64) == []
    assert dequantize(INT8, [128, 6], ones(6), [0] * 6, axis=1) == []


@pytest.mark.parametrize(
    ("kind", "shape", "scales", "zero", "attributes", "problem"),
    [
        (INT8, [8, 6], ones(6), [1] * 6, {"axis": 1}, "a zero point that is not zero; 10.3 has symmetric quantisation only"),
        (INT8, [8, 6], ones(6), [0], {"axis": 1}, "1 zero points for 6 scales"),
        (INT8, [8, 6], -ones(6), None, {"axis": 1}, "a scale that is not positive"),
        (INT8, [8, 6], ones(6), None, {}, "no axis for its scales: 10.3 would take 0, where ONNX says 1"),
        (INT8, [8, 6], ones(6), None, {"axis": 0}, "6 scales for 8 channels"),
        (INT8, [8, 6], ones(2, 6), None, {"axis": 0, "block_size": 4}, "blocks of INT8; 10.3 has blocks of INT4 only"),
        (INT4, [8, 6], ones(6), None, {"axis": 1}, "INT4 without blocks"),
        (INT4, [8, 6], ones(8, 3), None, {"axis": 1, "block_size": 2}, "blocks along axis 1; 10.3 documents blocks along axis 0"),
        (INT4, [8, 5], ones(2, 5), None, {"axis": 0, "block_size": 4}, "INT4 with 5 values in the last axis; it must be even"),
        (INT4, [100, 6], ones(2, 6), None, {"axis": 0, "block_size": 64}, "it would take 50 from the shapes"),
        (INT4, [8, 4, 2], ones(2, 4, 2), None, {"axis": 0, "block_size": 4}, "blocks of a value of rank 3; 10.3 takes matrices"),
        (INT4, [8, 6], ones(2, 3), None, {"axis": 0, "block_size": 4}, "exactly one axis may be blocked"),
        (UINT8, [8, 6], ones(6), None, {"axis": 1}, "an input of UINT8; 10.3 takes FLOAT8E4M3FN, INT4, INT8"),
        (UINT8, [8, 6], ones(6), [128] * 6, {"axis": 1}, "a zero point of UINT8; 10.3 would take it for INT8"),
    ],
)
def test_quantisation_that_is_refused_is_named(
    kind: int, shape: Sequence[int], scales: NDArray[Any], zero: Sequence[int] | None, attributes: dict[str, Any], problem: str
) -> None:
    found = dequantize(kind, shape, scales, zero, **attributes)
    assert any(problem in text for text in found), found


def test_scales_may_be_a_cast_constant_but_not_computed() -> None:
    def nodes(source: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Cast", [source], ["c"], to=F16),
            helper.make_node("DequantizeLinear", ["w", "c"], ["y"], axis=1),
        ]

    constants = {"w": integers(INT8, [8, 6]), "s": np.ones(6, np.float32)}
    assert problems(nodes("s"), {}, constants=constants) == []
    assert problems(nodes("x"), {"x": (F32, [6])}, constants={"w": constants["w"]}) == [
        "scales that are computed; they must be a constant, or a Cast of one"
    ]


def test_quantising_to_uint8_is_named() -> None:
    found = one("QuantizeLinear", {"x": (F32, [2])}, {"s": np.float32(1), "z": np.uint8(0)})
    assert "quantisation to UINT8; 10.3 has FLOAT8E4M3FN, INT4, INT8" in found


# Attributes ---------------------------------------------------------------------------------------------------------------------


def test_topk_has_a_limit_and_sorts() -> None:
    x = {"x": (F32, [1, 9000])}
    assert one("TopK", x, {"k": np.array([64])}, outputs=["v", "i"], sorted=1) == []
    assert one("TopK", x, {"k": np.array([4000])}, outputs=["v", "i"]) == ["K 4000; it must be below 3840"]
    assert one("TopK", x, {"k": np.array([4])}, outputs=["v", "i"], sorted=0) == ["sorted 0; it must be 1"]


def test_gather_nd_batches_all_axes_but_two_at_most() -> None:
    index: Specs = {"i": (I64, ["b", "m", 1])}
    assert one("GatherND", {"x": (F16, ["b", "s", 8]), **index}, batch_dims=1) == []
    assert "batch_dims 1 with a value of rank 2" in one("GatherND", {"x": (F16, ["b", "s"]), **index}, batch_dims=1)[0]
    assert one("GatherND", {"x": (F16, ["b", "s", 8]), "i": (I64, ["b", "m", "k"])}) == ["indices whose last length is not known"]


@pytest.mark.parametrize("op", ["ReduceMean", "Unsqueeze", "Squeeze"])
def test_axes_are_constants(op: str) -> None:
    assert "axes that are computed; they must be a constant" in one(op, {"x": (F32, [2, 1]), "a": (I64, [1])})
    assert one(op, {"x": (F32, [2, 1])}, {"a": np.array([1])}) == []


def test_squeeze_without_axes_needs_a_known_shape() -> None:
    assert one("Squeeze", {"x": (I64, [1])}) == []
    assert one("Squeeze", {"x": (I64, ["n", 1])}) == ["no axes for a value of unknown shape"]


def test_split_takes_sizes_or_a_count() -> None:
    x = {"x": (F32, [6])}
    assert one("Split", x, {"s": np.array([2, 4])}, outputs=["a", "b"]) == []
    assert one("Split", x, outputs=["a", "b"], num_outputs=2) == []
    assert one("Split", x, outputs=["a", "b"], num_outputs=3) == ["num_outputs 3 with 2 outputs"]


def test_slices_take_computed_ends_of_known_length() -> None:
    constants = {"a": np.array([0])}
    assert one("Slice", {"x": (F32, ["n", 4]), "s": (I64, [1]), "e": (I64, [1])}, constants) == []
    assert one("Slice", {"x": (F32, ["n", 4]), "s": (I64, ["k"]), "e": (I64, ["k"])}) == ["starts, ends or axes of unknown length"]


def test_ranges_of_fp16_are_named() -> None:
    assert one("Range", {name: (I64, []) for name in "abc"}) == []
    assert "an input of FLOAT16" in one("Range", {name: (F16, []) for name in "abc"}, opset=21)[0]


def test_a_computed_kernel_needs_its_shape() -> None:
    inputs = {"x": (F32, [1, 3, 8, 8]), "w": (F32, [4, 3, 3, 3])}
    assert one("Conv", inputs, kernel_shape=[3, 3]) == []
    assert one("Conv", inputs) == ["a computed kernel without kernel_shape, which 10.3 does not infer"]


def test_norms_of_a_later_meaning_are_named() -> None:
    weights = {"s": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    assert one("GroupNormalization", {"x": (F32, [1, 4, 2])}, weights, num_groups=2) == [
        "opset 21, which the parser reads rightly from TensorRT 10.9 on"
    ]
    assert one("LayerNormalization", {"x": (F32, [1, 4])}, weights, outputs=["y", "mean"]) == ["more than the first output"]


def test_rank_nine_is_named() -> None:
    assert one("Relu", {"x": (F32, [1] * 9)})[0] == "rank 9; at most 8"


def test_external_data_of_another_form_is_named() -> None:
    tensor = TensorProto(name="w", data_type=F32, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../w.weights"), ("basepath", "/")):
        tensor.external_data.add(key=key, value=value)
    assert one("Relu", {}, {"w": tensor}) == ["external data with basepath", "external data above the folder of the graph"]


# The module ---------------------------------------------------------------------------------------------------------------------


def test_every_operator_of_the_table_is_one_of_onnx() -> None:
    assert set(OPERATORS) - {schema.name for schema in onnx.defs.get_all_schemas()} == set()


def test_the_table_is_there_without_onnx() -> None:
    code = "import sys; sys.modules['onnx'] = None; import tests.support.parser_of_tensorrt_10_3"
    subprocess.run([sys.executable, "-c", code], check=True)
