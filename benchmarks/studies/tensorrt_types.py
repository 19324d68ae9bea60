"""In which types TensorRT for RTX stores and computes quantised layers: one small graph a case, built for several GPUs without having one.

Question: In which types does TensorRT for RTX 1.7.1 store and compute quantised layers?
Verdict: docs/tensorrt-types.md has the table. INT8 weights of the decoder get one scale per output channel, INT4 weights one per block;
Q and DQ stand only before dense convolutions, because grouped ones are padded. The converter follows it.
Ran: 2026-11-21, at commit d5f83d8 (record: benchmarks/results/tensorrt_types.json).
Command at that commit: python -m benchmarks.tensorrt_types

The evidence is the builder's own log: with detailed profiling verbosity it lists every kernel with the types of its inputs and constants,
and the bytes of all weights. (`EngineInspector` tells the same, but it needs a CUDA driver, and this does not.)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from benchmarks.common.machine import describe
from benchmarks.common.tensorrt_log import LOG, layers
from fastvlm_edge.convert.graphs.builder import IR_VERSION, OPSET, element_type, to_bytes

RESULT = Path(__file__).resolve().parents[1] / "results" / "tensorrt_types.json"
FLOATS: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
GPUS = ("SM86", "SM89", "SM120")


@dataclass(frozen=True)
class Case:
    """One layer (or two), and how its operands are quantised."""

    layer: str
    """A key of SHAPES."""
    activations: str
    """Float type of the input, the output and everything that is not quantised: a key of FLOATS."""
    weights: str
    """`plain`, `int8` (scale per output channel), `int8/<block>`, `int4/<block>`."""
    quantize_input: bool = False
    """Whether Q and DQ precede the layer: W8A8."""
    scale: str = ""
    """Float type of the weights' scales; a Cast follows their DQ where it is not that of the activations. Empty: the same."""
    rows: str = "dynamic"
    """Matrix products only: rows of the input; `dynamic` is 1 to 512, `dynamic 1` is a dynamic size that may only be 1."""

    @property
    def name(self) -> str:
        kind = ("w8a8" if self.quantize_input else self.weights) + (f" scale {self.scale}+Cast" if self.scale else "")
        return f"{self.layer} {self.activations} {kind}" + ("" if self.rows == "dynamic" else f" rows {self.rows}")


SHAPES: dict[str, tuple[int, ...]] = {
    "conv3x3": (768, 768, 3, 3),
    "conv1x1": (2048, 2048, 1, 1),
    "depthwise7x7": (32768, 1, 7, 7),
    "depthwise3x3": (65536, 1, 3, 3),
    "grouped7x7 to twice": (32768, 1, 7, 7),
    "conv pair": (768, 768, 3, 3),
    "residual": (1536, 1536, 1, 1),
    "residual, both quantised": (1536, 1536, 1, 1),
    "matmul": (2048, 2048),
    "gemm transB": (2048, 2048),
    "gather": (16384, 256),
    "gather, then DQ": (16384, 256),
}
"""Weights of each layer: 0.6 to 10 million values."""


class Graph:
    """The nodes and tensors of a case."""

    def __init__(self, activations: str) -> None:
        self.float = FLOATS[activations]
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def tensor(self, array: npt.NDArray[Any]) -> str:
        name = f"t{len(self.tensors)}"
        kind = element_type(array.dtype)
        self.tensors.append(TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=bytes(to_bytes(array))))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}_{op}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def fake_quantized(self, value: str) -> str:
        """Q and DQ with one scale."""
        scale = self.tensor(np.asarray(0.02, self.float))
        zero = self.tensor(np.asarray(0, np.int8))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, scale, zero), scale, zero)

    def weight(self, case: Case, channel_axis: int, block_axis: int) -> str:
        """The layer's weights in the case's form, as activations' type."""
        shape = SHAPES[case.layer]
        if case.weights == "plain":
            return self.tensor((self.rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(self.float))
        kind, _, block = case.weights.partition("/")
        limit = 7 if kind == "int4" else 127
        values = self.rng.integers(-limit, limit + 1, shape).astype(ml_dtypes.int4 if kind == "int4" else np.int8)
        scales_shape = [size // int(block) if block and i == block_axis else size for i, size in enumerate(shape)]
        attributes = {"axis": block_axis, "block_size": int(block)} if block else {"axis": channel_axis}
        scales = self.rng.random(scales_shape if block else shape[channel_axis]) * 1e-3 + 1e-4
        values_and_scales = self.tensor(values), self.tensor(scales.astype(FLOATS[case.scale or case.activations]))
        weight = self.node("DequantizeLinear", *values_and_scales, **attributes)
        return self.node("Cast", weight, to=element_type(self.float)) if case.scale else weight


def make_model(case: Case) -> onnx.ModelProto:
    """The ONNX graph of a case: input `x`, output `y`."""
    graph, shape = Graph(case.activations), SHAPES[case.layer]
    kind, x = element_type(graph.float), "x"
    extent: list[int | str] = []
    rows: int | str = case.rows if case.rows.startswith("dynamic") else int(case.rows)
    if case.layer.startswith("gather"):
        kind = TensorProto.INT64
        if case.layer == "gather":
            y = graph.node("Gather", graph.weight(case, 0, 1), x, axis=0)
        else:
            table = graph.tensor(graph.rng.integers(-127, 128, shape).astype(np.int8))
            scales = graph.tensor(np.full((shape[0], 1), 1e-3, graph.float))
            values = graph.node("Cast", graph.node("Gather", table, x, axis=0), to=element_type(graph.float))
            y = graph.node("Mul", values, graph.node("Gather", scales, x, axis=0))
        extent = ["dynamic"]
    else:
        x = graph.fake_quantized(x) if case.quantize_input else x
        if case.layer == "matmul":
            y, extent = graph.node("MatMul", x, graph.weight(case, 1, 0)), [rows, shape[0]]
        elif case.layer == "gemm transB":
            y, extent = graph.node("Gemm", x, graph.weight(case, 0, 1), transB=1), [rows, shape[1]]
        else:
            pads = [shape[2] // 2] * 4
            groups = (shape[0] if case.layer.startswith("depthwise") else shape[0] // 2) if shape[1] == 1 else 1
            size = 8 if groups > 1 else 32
            y, extent = graph.node("Conv", x, graph.weight(case, 0, 1), pads=pads, group=groups), [1, groups * shape[1], size, size]
        if case.layer == "conv pair":
            y = graph.node("Relu", y)
            y = graph.fake_quantized(y) if case.quantize_input else y
            y = graph.node("Conv", y, graph.weight(case, 0, 1), pads=pads)
        elif case.layer.startswith("residual"):
            both = case.layer != "residual" and case.quantize_input
            y = graph.node("Add", graph.fake_quantized(y) if both else y, x if both else "x")
            y = graph.fake_quantized(y) if case.quantize_input else y
            y = graph.node("Conv", y, graph.weight(case, 0, 1))
    graph.nodes[-1].output[0] = "y"
    outputs = [helper.make_tensor_value_info("y", element_type(graph.float), None)]
    proto = helper.make_graph(graph.nodes, "case", [helper.make_tensor_value_info("x", kind, extent)], outputs, graph.tensors)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def weight_values(case: Case) -> int:
    """Number of weights of a case."""
    return int(np.prod(SHAPES[case.layer])) * (2 if case.layer == "conv pair" or case.layer.startswith("residual") else 1)


def cases() -> Iterator[Case]:
    """Every case, in the order of the record."""
    for activations in FLOATS:
        other = "fp16" if activations == "fp32" else "fp32"
        for layer in SHAPES:
            plain = Case(layer, activations, "plain")
            int8 = replace(plain, weights="int8")
            if layer == "gather, then DQ":
                yield int8
                continue
            yield from (plain, int8)
            if layer == "gather":
                yield replace(int8, scale=other)
                continue
            yield replace(int8, quantize_input=True)
            if layer == "conv1x1":
                yield replace(int8, scale=other)
            if layer in ("matmul", "gemm transB"):
                blocked = [replace(plain, weights=weights) for weights in ("int8/64", "int8/128", "int4/32", "int4/64", "int4/128", "int4")]
                yield from blocked
                if layer == "matmul":
                    yield from (replace(case, scale=other) for case in (int8, blocked[1], blocked[3]))
                    rows = ("1", "dynamic 1", "2", "64")
                    yield from (replace(case, rows=each) for case, each in itertools.product((int8, blocked[3]), rows))


def parse_and_build(model: onnx.ModelProto, gpu: str, *, rows: tuple[int, int, int] = (1, 64, 512)) -> dict[str, Any]:
    """Whether it `parses` and `builds`, the bytes of engine and weights, the kernels; `errors` and `warnings` as TensorRT words them."""
    LOG.lines.clear()
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    if not parser.parse(model.SerializeToString()):
        return {"parses": False, "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, gpu), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    shape = tuple(network.get_input(0).shape)
    if -1 in shape:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *(tuple(count if size == -1 else size for size in shape) for count in rows))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    row: dict[str, Any] = {"parses": True, "builds": plan is not None}
    errors = [text for severity, text in LOG.lines if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]
    warnings = {text.strip() for severity, text in LOG.lines if severity == trt.ILogger.WARNING}
    row |= {"warnings": sorted(warnings)} if warnings else {}
    if plan is None:
        return row | {"errors": errors}
    text = "\n".join(text for _, text in LOG.lines)
    weights = re.search(r"Total Weights Memory: (\d+)", text)
    return row | {"engine_bytes": plan.nbytes, "weights_bytes": int(weights[1]) if weights else None, **layers(text)}


def measure(case: Case) -> list[dict[str, Any]]:
    """One row of the record, or more where the GPUs differ in more than engine size."""
    rows: list[dict[str, Any]] = []
    for gpu in GPUS:
        row = parse_and_build(make_model(case), gpu, rows=(1, 1, 1) if case.rows == "dynamic 1" else (1, 64, 512))
        engine = {gpu: row.pop("engine_bytes", None)}
        if rows and all(rows[-1].get(key) == value for key, value in row.items()):
            rows[-1]["engine_bytes"] |= engine
            continue
        bits = {"bits_per_weight": round(8 * row["weights_bytes"] / weight_values(case), 2)} if row.get("weights_bytes") else {}
        rows.append({"case": case.name, **asdict(case), "weight_values": weight_values(case), **row, **bits, "engine_bytes": engine})
    return rows


def main() -> None:
    rows = []
    for case in cases():
        rows += measure(case)
        print(f"{case.name:45} {rows[-1].get('bits_per_weight')} {rows[-1].get('kernels', rows[-1].get('errors'))}", flush=True)
    machine = describe()
    machine["versions"]["tensorrt_rtx"] = trt.__version__
    RESULT.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
