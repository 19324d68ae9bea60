"""The ONNX operator `Attention` (opset 23) in the place of two products and a softmax, as TensorRT for RTX builds it.

Question: Should `build` give TensorRT for RTX, and TensorRT from 10.14 on, a second graph with this operator?
Verdict: no. Kernels and fused attentions are the same. Scratch memory of prefill is 27 MB instead of 89, because the mask need not repeat for
the query heads, but scores, mask and softmax have the type of the inputs: TensorRT for RTX 1.7.1 refuses a mask in FP32, inputs cast to FP32 with
such a mask, and `softmax_precision`. FP16 cannot hold the scores of Qwen2 (docs/precision.md). 62 MB are no reason for a second graph.
Ran: 2026-11-28, at commit b69c051, with this file added (record: benchmarks/results/attention_operator.json).
Command at that commit: python -m benchmarks.studies.attention_operator

Two layers of the 0.5B's width, random weights, SM86, the profiles of the product. Without a GPU: no speed, no answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.machine import describe
from examples.checkpoints.random_decoder import write_decoder
from fastvlm_edge.convert.graphs import builder
from fastvlm_edge.convert.graphs import decoder as graphs
from fastvlm_edge.convert.graphs.builder import element_type
from fastvlm_edge.engines.layers import parse_listing
from fastvlm_edge.engines.profiles import decoder_profiles
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, find_library

RESULT = Path(__file__).resolve().parents[1] / "results" / "attention_operator.json"
PRECISIONS = ("int4", "bf16")
FORMS = {
    "products": "the product's graph",
    "operator": "Attention, all inputs in the plan's type",
    "operator, FP32 mask": "the same with the mask in FP32",
    "operator, FP32 softmax": "the same as the second with softmax_precision = FLOAT",
    "operator, FP32 inputs": "all inputs cast to FP32, the output cast back",
}
_attention, _mask = graphs._Decoder._attention, graphs._Decoder._mask


def with_operator(form: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_attention` and `_mask` of the decoder with the operator. It repeats keys and values for the query heads, so the mask need not be."""

    def mask(self: Any, positions: str, past_key: str) -> str:
        group, self.group = self.group, 1
        value = _mask(self, positions, past_key)
        self.group = group
        return value if form in ("operator, FP32 mask", "operator, FP32 inputs") else self._narrow(value, "/mask/narrow")

    def attention(self: Any, x: str, past_key: str, past_value: str, shared: Any, weights: str, path: str, wide_scores: bool) -> Any:
        graph, text = self.graph, self.text
        heads, kv_heads, dim = text.heads, text.kv_heads, text.head_dim
        qkv = graph.node("Reshape", [self._qkv(x, weights, path), graph.ints(0, 0, heads + 2 * kv_heads, dim)], f"{path}/qkv")
        qkv = graph.node("Transpose", [qkv], f"{path}/qkv", perm=[0, 2, 1, 3])
        qk, value = graph.split("Split", [qkv, graph.ints(heads + kv_heads, kv_heads)], f"{path}/qkv", 2, axis=1)
        qk = self._wide(qk, f"{path}/rotary")
        first, second = graph.split("Split", [qk, graph.ints(dim // 2, dim // 2)], f"{path}/rotary", 2, axis=-1)
        swapped = graph.node("Concat", [second, first], f"{path}/rotary", axis=-1)
        straight = graph.node("Mul", [qk, shared.cos], f"{path}/rotary/cos")
        turned = graph.node("Mul", [swapped, shared.sin], f"{path}/rotary/sin")
        qk = self._narrow(graph.node("Add", [straight, turned], f"{path}/rotary"), f"{path}/rotary")
        query, key = graph.split("Split", [qk, graph.ints(heads, kv_heads)], f"{path}/qk", 2, axis=1)
        keys = graph.node("Concat", [past_key, key], f"{path}/keys", axis=2)
        values = graph.node("Concat", [past_value, value], f"{path}/values", axis=2)
        inputs = [query, keys, values]
        if form == "operator, FP32 inputs":
            inputs = [self._wide(each, f"{path}/input{index}") for index, each in enumerate(inputs)]
        precision = {"softmax_precision": element_type(np.float32)} if form == "operator, FP32 softmax" else {}
        out = graph.node("Attention", [*inputs, shared.mask], f"{path}/attention", scale=1.0, **precision)
        if form == "operator, FP32 inputs":
            out = self._narrow(out, f"{path}/attention")
        out = graph.node("Transpose", [out], f"{path}/heads", perm=[0, 2, 1, 3])
        return graph.node("Reshape", [out, graph.ints(0, 0, heads * dim)], f"{path}/joined"), key, value

    return attention, mask


def build(form: str, precision: str) -> list[dict[str, Any]]:
    """One row for each of prefill and decoding."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if form == "products":
            builder.OPSET, graphs._Decoder._attention, graphs._Decoder._mask = 21, _attention, _mask
        else:
            builder.OPSET = 23
            graphs._Decoder._attention, graphs._Decoder._mask = with_operator(form)
        manifest = write_decoder(Path(folder), precision, layers=2, vocab=8704)
        for stage, profile in zip(("prefill", "decode"), decoder_profiles(manifest, separate=True), strict=True):
            row: dict[str, Any] = {"form": form, "precision": precision, "stage": stage}
            try:
                settings = BuildSettings(profiles=(profile,), compute_capabilities=((8, 6),))
                built = find_library(("tensorrt_rtx",)).build(Path(folder) / "decoder.onnx", settings)
            except FastVLMError as error:
                rows.append({**row, "refused": str(error).replace(folder, "MODEL")})
                continue
            kernels = [layer for layer in parse_listing(built.listing) if layer.kind not in ("shape_call", "signal", "wait")]
            row |= {"kernels": len(kernels), "attentions": sum("mha" in layer.name for layer in kernels)}
            rows.append({**row, "scratch_bytes": built.scratch_bytes, "engine_bytes": len(memoryview(built.plan))})
    return rows


def main() -> int:
    """Build every form in every precision and write the record."""
    document = {"machine": describe(), "forms": FORMS, "results": list[dict[str, Any]]()}
    document["machine"]["versions"]["tensorrt_rtx"] = version("tensorrt_rtx")
    for precision in PRECISIONS:
        for form in FORMS:
            rows = build(form, precision)
            print(*rows, sep="\n", flush=True)
            document["results"] += rows
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
