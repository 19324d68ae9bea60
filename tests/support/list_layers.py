"""A small engine of TensorRT for RTX and the list of its layers: `python -m tests.support.list_layers` writes the fixture.

One matrix has one INT8 scale per column, which a product reads as integers; the other has a scale per block, so that it is converted to
floats in memory (docs/tensorrt-types.md).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, find_library

FIXTURE = Path(__file__).resolve().parents[1] / "engines" / "listings" / "tensorrt_rtx.txt"
WIDTH, BLOCK = 256, 64


def write_graph(path: Path) -> None:
    """x [rows, 256] -> per column -> in blocks -> y [rows, 256], in FP16."""
    random = np.random.default_rng(0)
    scales = {"columns": np.full(WIDTH, 0.01, np.float16), "blocks": np.full((WIDTH // BLOCK, WIDTH), 0.01, np.float16)}
    initializers = [numpy_helper.from_array(value, f"{name}.scale") for name, value in scales.items()]
    initializers += [numpy_helper.from_array(random.integers(-127, 128, (WIDTH, WIDTH), np.int8), name) for name in scales]
    nodes, x = [], "x"
    forms: dict[str, dict[str, Any]] = {"columns": {"axis": 1}, "blocks": {"axis": 0, "block_size": BLOCK}}
    for name, attributes in forms.items():
        nodes.append(
            helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [f"{name}.wide"], f"/{name}/DequantizeLinear", **attributes)
        )
        nodes.append(helper.make_node("MatMul", [x, f"{name}.wide"], [f"{name}.out"], f"/{name}/MatMul"))
        x = f"{name}.out"
    nodes[-1].output[0] = "y"
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "list", border[:1], border[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def list_layers() -> str:
    """The list in the log of a build for SM 8.6."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.onnx"
        write_graph(path)
        rows = tuple((count, WIDTH) for count in (1, 16, 512))
        settings = BuildSettings(({"x": (rows[0], rows[1], rows[2])},), ((8, 6),))
        return find_library(("tensorrt_rtx",)).build(path, settings).listing


if __name__ == "__main__":
    FIXTURE.write_text(list_layers().split("\n\n")[0] + "\n", encoding="utf-8")
