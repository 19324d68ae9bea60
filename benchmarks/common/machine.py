"""Which machine a figure comes from, and the most that this machine can do: operations and bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from fastvlm_edge.machine.description import describe as describe_for

PACKAGES = ("onnxruntime", "numpy", "torch", "transformers", "tokenizers", "pillow", "onnx")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, operating system, versions of the runtime and of its peers, and today's date."""
    return describe_for(PACKAGES)


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of several runs after one warm-up: the machine's ability, not its noise."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def limits(threads: int) -> dict[str, float]:
    """Measured ceilings with `threads` threads of onnxruntime.

    `matmul_gflops`: a 1024 x 4096 x 4096 product in FP32. `read_gb_per_second`: one row times an INT8 matrix of 136 MB, the size of the
    0.5B's head and far more than the caches hold.
    """
    product = _session(_matmul(1024, 4096, 4096), threads)
    x = np.random.default_rng(0).standard_normal((1024, 4096), dtype=np.float32)
    seconds = best_seconds(lambda: product.run(None, {"x": x}))
    flops = 2 * 1024 * 4096 * 4096 / seconds / 1e9
    head = _session(_int8_head(896, 151936), threads)
    row = np.random.default_rng(0).standard_normal((1, 896), dtype=np.float32)
    seconds = best_seconds(lambda: head.run(None, {"x": row}), 15)
    return {"matmul_gflops": round(flops, 1), "read_gb_per_second": round(896 * 151936 / seconds / 1e9, 1)}


def _session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _matmul(rows: int, inputs: int, outputs: int) -> onnx.ModelProto:
    weight = np.random.default_rng(1).standard_normal((inputs, outputs), dtype=np.float32)
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], [onnx.numpy_helper.from_array(weight, "w")], rows, inputs, outputs)


def _int8_head(inputs: int, outputs: int) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weight = onnx.numpy_helper.from_array(rng.integers(-127, 128, (inputs, outputs), dtype=np.int8), "w")
    scale = onnx.numpy_helper.from_array(np.full(outputs, 0.01, np.float32), "s")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1), helper.make_node("MatMul", ["x", "d"], ["y"])]
    return _model(nodes, [weight, scale], 1, inputs, outputs)


def _model(nodes: list[Any], weights: list[Any], rows: int, inputs: int, outputs: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])
    graph = helper.make_graph(nodes, "limit", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
