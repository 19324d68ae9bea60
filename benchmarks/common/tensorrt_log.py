"""What TensorRT for RTX says while it builds an engine, and the list of kernels in it."""

from __future__ import annotations

import re
from typing import Any

import tensorrt_rtx as trt

from fastvlm_edge.engines.layers import parse_listing


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what the builder says. TensorRT has one logger a process: the first."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[tuple[Any, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append((severity, message))


LOG = Log()


def layers(text: str) -> dict[str, Any]:
    """The builder's list of `kernels`, in order, with the types of inputs, outputs and constants of more than 10,000 values (`stored`)."""
    kernels, stored = [], dict[str, int]()
    for layer in parse_listing(text):
        if layer.kind in ("shape_call", "signal", "wait"):
            continue
        large = [constant for constant in layer.constants if constant.values > 10_000]
        for constant in large:
            stored[constant.dtype] = stored.get(constant.dtype, 0) + constant.values
        source = re.sub(r"_myl\d+_\d+$", "", layer.name)
        kernel = f"{layer.kind}[{source.removeprefix('__myl_')}]" if layer.kind in ("kgen", "runtime_fusion") else layer.kind
        types = "+".join([tensor.dtype for tensor in layer.inputs] + [f"{tensor.dtype} const" for tensor in large])
        kernels.append(f"{kernel}: {types} -> {'+'.join(tensor.dtype for tensor in layer.outputs)}")
    return {"stored": stored, "kernels": kernels}
