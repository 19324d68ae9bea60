"""Whether INT8 activations pay in the decoder: time of its products on a CPU, and what each way of rounding activations does to the logits.

python -m benchmarks.prefill_w8a8 [--work build/bench] [time] [demo] [random]

Time is that of the process with one thread, so other work on the machine hardly disturbs it. Accuracy has INT8 weights, one scale an
output, and rounds the activations of the prompt alone, as a prefill of its own would; the answer's positions keep float activations.
`random` has the 0.5B's decoder, whose activations are given tails (`add_tails`) without a change of what it computes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import llm_quantization as llm  # noqa: E402
from benchmarks.checkpoint import random_checkpoint  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "prefill_w8a8.json"
SHAPES = {"qkv": (896, 1152), "gate_up": (896, 9728), "down": (4864, 896), "o_proj": (896, 896)}
"""Inputs and outputs of the 0.5B's products; MEASURED_ROWS of them at a time: a prefill, a step of decoding."""
MEASURED_ROWS = (290, 1)
REPEATS = 15
QUESTIONS = 500
MIGRATION = 0.5
"""alpha of SmoothQuant (arXiv 2211.10438, section 4.1)"""
FOLDABLE = ("qkv", "gate_up", "down", "o_proj")


def main() -> None:
    """Run the parts that are named, all by default, and write each into the record."""
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["time", "demo", "random"])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the random checkpoint is kept")
    options = parser.parse_args()
    document = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    document |= {
        "what": __doc__.split("\n\n")[0] + " " + __doc__.split("\n\n")[2].strip().replace("\n", " "),
        "machine": machine.describe(),
    }
    for part in options.parts:
        document[part] = PARTS[part](options.work)
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


# Time -----------------------------------------------------------------------------------------------------------------------------


def measure_time(_work: Path) -> dict[str, Any]:
    """Milliseconds of process time for one product: least and median of REPEATS."""
    rows: dict[str, Any] = {}
    for name, (inputs, outputs) in SHAPES.items():
        for count in MEASURED_ROWS:
            x = np.random.default_rng(0).standard_normal((1, count, inputs)).astype(np.float32)
            sessions = {way: open_product(way, inputs, outputs) for way in WAYS}
            taken: dict[str, list[float]] = {way: [] for way in sessions}
            inner = 1 if count > 1 else 50
            for _ in range(REPEATS):
                for way, (session, _) in sessions.items():  # in turn, so that what else runs strikes all alike
                    began = time.process_time()
                    for _ in range(inner):
                        session.run(None, {"x": x})
                    taken[way].append((time.process_time() - began) / inner * 1e3)
            rows[f"{name}, {count} rows"] = {
                way: {
                    "least_ms": round(min(taken[way][2:]), 4),
                    "median_ms": round(float(np.median(taken[way][2:])), 4),
                    "runs_as": sessions[way][1],
                }
                for way in sessions
            }
            print(name, count, {way: row["least_ms"] for way, row in rows[f"{name}, {count} rows"].items()}, flush=True)
    total = {
        f"{count} rows, all layers": {
            way: round(24 * sum(rows[f"{name}, {count} rows"][way]["least_ms"] for name in SHAPES), 2) for way in WAYS
        }
        for count in MEASURED_ROWS
    }
    return {"products": rows, "sum_of_least_ms": total}


WAYS = {
    "fp32": ("float", 0, "1"),
    "int8 weights, float activations": ("int8", 0, "1"),
    "int8 weights, accuracy level 4": ("int8", 0, "4"),
    "int4 in blocks of 128, float activations": ("int4", 128, "1"),
    "int4 in blocks of 128, accuracy level 4": ("int4", 128, "4"),
    "int8 weights, DynamicQuantizeLinear": ("dynamic", 0, "1"),
    "int8 weights, rows scaled, DynamicQuantizeLinear": ("rows", 0, "1"),
}
"""Weights, block and accuracy level, which onnxruntime's CPU reads as: 1 multiplies in FP32, 4 may round activations to INT8."""


def open_product(way: str, inputs: int, outputs: int) -> tuple[Any, str]:
    """A session of one product with one thread, and what onnxruntime made of the graph."""
    import tempfile

    import onnx
    import onnxruntime as ort

    weights, block, level = WAYS[way]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of a model that only this machine could load
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")  # for scales a channel, as the runtime has it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = ort.InferenceSession(
            product(weights, block, inputs, outputs).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = [node.op_type for node in onnx.load(f"{folder}/optimized.onnx").graph.node]
    return session, " ".join(kinds)


def product(weights: str, block: int, inputs: int, outputs: int) -> Any:
    """x [1, rows, inputs] times a random matrix, as the decoder's graph has it, or with DynamicQuantizeLinear and MatMulInteger."""
    import ml_dtypes
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(1)
    if weights == "float":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        values = {"w": rng.standard_normal((inputs, outputs)).astype(np.float32)}
    elif weights in ("dynamic", "rows"):
        whole = weights == "dynamic"
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x" if whole else "even"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "w", "zero", "w_zero"], ["integers"]),
            helper.make_node("Cast", ["integers"], ["floats"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["scale", "w_scale"], ["both"]),
            helper.make_node("Mul", ["floats", "both"], ["y" if whole else "evened"]),
        ]
        if not whole:  # every position fills the range of the one scale, so it is as good as a scale of its own
            before = [
                helper.make_node("Abs", ["x"], ["magnitudes"]),
                helper.make_node("ReduceMax", ["magnitudes", "last"], ["largest"], keepdims=1),
                helper.make_node("Max", ["largest", "tiny"], ["divisor"]),
                helper.make_node("Div", ["x", "divisor"], ["even"]),
            ]
            nodes = [*before, *nodes, helper.make_node("Mul", ["evened", "divisor"], ["y"])]
        values = {
            "w": rng.integers(-127, 128, (inputs, outputs)).astype(np.int8),
            "w_zero": np.zeros(outputs, np.int8),
            "w_scale": np.full(outputs, 0.01, np.float32),
            **({} if whole else {"last": np.array([-1]), "tiny": np.array(1e-12, np.float32)}),
        }
    else:
        bits, kind = (4, ml_dtypes.int4) if weights == "int4" else (8, np.int8)
        largest = 2 ** (bits - 1) - 1
        values = {
            "w": rng.integers(-largest, largest + 1, (inputs, outputs)).astype(kind),
            "s": np.full((inputs // block, outputs) if block else outputs, 0.01, np.float32),
        }
        placed = {"axis": 0, "block_size": block} if block else {"axis": 1}
        nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["f"], **placed), helper.make_node("MatMul", ["x", "f"], ["y"])]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, "rows", inputs])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "rows", outputs])
    graph = helper.make_graph(nodes, "product", [x], [y], [numpy_helper.from_array(value, name) for name, value in values.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# Accuracy -------------------------------------------------------------------------------------------------------------------------


def dynamic(x: Any) -> Any:
    """ONNX's DynamicQuantizeLinear: unsigned, one scale and zero point for all of x."""
    least, largest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (largest - least) / 255 or 1.0
    zero = round(-least / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def per_row(x: Any) -> Any:
    """One scale a position, as SmoothQuant's O1 has it."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scale).round() * scale


def per_block(x: Any) -> Any:
    """One scale for 128 neighbours of a position, as onnxruntime's accuracy level 4 has it."""
    blocks = x.unflatten(-1, (-1, min(128, x.shape[-1])))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return ((blocks / scale).round() * scale).flatten(-2)


class Product:
    """A matrix [inputs, outputs] with INT8 weights, and activations of the prompt rounded: what a `Layer` multiplies by."""

    prompt = 0
    """Rows of the question that are its prompt."""

    def __init__(self, matrix: Any, rounding: Callable[[Any], Any] | None, smooth: Any) -> None:
        weight = matrix if smooth is None else matrix * smooth[:, None]
        scale = (weight.abs().amax(0) / 127).clamp_min(1e-12)
        self.weight, self.rounding, self.smooth = (weight / scale).round() * scale, rounding, smooth

    def __rmatmul__(self, x: Any) -> Any:
        import torch

        x = x if self.smooth is None else x / self.smooth
        if self.rounding is not None:
            x = torch.cat([self.rounding(x[: Product.prompt]), x[Product.prompt :]])
        return x @ self.weight


class Static:
    """One scale for all of x, symmetric, fixed by calibration: Q/DQ as TensorRT wants it."""

    def __init__(self, largest: float) -> None:
        self.scale = largest / 127

    def __call__(self, x: Any) -> Any:
        return (x / self.scale).round().clamp(-127, 127) * self.scale


ROUNDINGS: dict[str, Callable[[Any], Any] | None] = {
    "float": None,
    "static, per tensor": None,
    "dynamic, per tensor": dynamic,
    "per position": per_row,
    "128 values of a position": per_block,
}


def measure_accuracy(model: Any, questions: Sequence[Any], talk: Sequence[Any]) -> list[dict[str, Any]]:
    """A row for each rounding, without and with SmoothQuant."""
    import torch

    expected = [model.logits(question, None) for question in questions]
    ranges: dict[tuple[str, str], Any] = {}
    with torch.inference_mode():
        for question in talk:
            x = model.embed(question.ids, question.features)
            for layer in model.layers:
                taps: dict[str, list[Any]] = {}
                x = layer(x, taps)
                for site, (rows,) in taps.items():
                    at, found = (layer.name, site), rows.abs().amax(0)
                    ranges[at] = torch.maximum(ranges[at], found) if at in ranges else found
    plain = [dict(layer.matrices) for layer in model.layers]
    result = []
    for smoothed in (False, True):
        for name, rounding in ROUNDINGS.items():
            for layer, matrices in zip(model.layers, plain, strict=True):
                for site, matrix in matrices.items():
                    largest, smooth = ranges[layer.name, site], None
                    if smoothed:
                        smooth = largest.clamp_min(1e-5) ** MIGRATION / matrix.abs().amax(1).clamp_min(1e-5) ** (1 - MIGRATION)
                        largest = largest / smooth
                    fixed = Static(float(largest.max())) if name.startswith("static") else rounding
                    layer.matrices[site] = Product(matrix, fixed, smooth)
            found = []
            for question in questions:
                Product.prompt = question.positions.start
                found.append(model.logits(question, None))
            figures = llm.compare(found, expected, questions)
            result.append({"activations": name, "smoothquant": smoothed, **figures})
            print(result[-1], flush=True)
    spread = {site: max(float(r.max() / r.median().clamp_min(1e-9)) for (_, s), r in ranges.items() if s == site) for site in FOLDABLE}
    return [{"largest_channel_over_median": {site: round(value, 1) for site, value in spread.items()}}, *result]


def measure_demo(_work: Path) -> dict[str, Any]:
    """The trained demo."""
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint

    model = llm.Model(open_checkpoint(str(llm.DEMO)))
    rows = measure_accuracy(model, llm.demo_questions("heldout", QUESTIONS), llm.demo_questions("calibration", 100))
    return {"questions": QUESTIONS, "rows": rows}


def measure_random(work: Path) -> dict[str, Any]:
    """The 0.5B's decoder with tails."""
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(random_checkpoint(work)))
    model = llm.Model(checkpoint)
    add_tails(model)
    questions, talk = llm.random_questions(checkpoint, 4, 1), llm.random_questions(checkpoint, 6, 2)
    return {"questions": len(questions), "rows": measure_accuracy(model, questions, talk)}


def add_tails(model: Any, *, degrees: float = 2.0, massive: float = 100.0, seed: int = 0) -> None:
    """Give what the products read channels that tower over the others, and take the factor out of the weights again; in place.

    Each channel gets 0.2 + |t| of Student's t with `degrees` degrees of freedom, and two of each product's inputs `massive` on top, after
    Sun et al., "Massive activations in large language models" (arXiv 2402.17762). Heads that share a value share a factor.
    """
    import torch

    rng, text = np.random.default_rng(seed), model.text
    group = text.heads // text.kv_heads

    def factors(count: int) -> Any:
        values = 0.2 + np.abs(rng.standard_t(degrees, count))
        values[rng.choice(count, 2, replace=False)] *= massive
        return torch.from_numpy(values.astype(np.float32))

    for layer in model.layers:
        f = factors(text.hidden)
        layer.tails = {"input_layernorm": f, "post_attention_layernorm": (g := factors(text.hidden))}
        layer.matrices["qkv"] = layer.matrices["qkv"] / f[:, None]
        layer.matrices["gate_up"] = layer.matrices["gate_up"] / g[:, None]
        up = factors(text.intermediate)
        layer.matrices["gate_up"][:, text.intermediate :] *= up
        layer.matrices["down"] = layer.matrices["down"] / up[:, None]
        value = factors(text.kv_heads * text.head_dim)
        layer.matrices["qkv"][:, -len(value) :] *= value
        layer.bias[-len(value) :] *= value
        layer.matrices["o_proj"] = layer.matrices["o_proj"] / value.view(text.kv_heads, 1, -1).expand(-1, group, -1).reshape(-1, 1)
        plain = layer.norm

        def norm(x: Any, name: str, plain: Any = plain, tails: Any = layer.tails) -> Any:
            return plain(x, name) * tails.get(name.split(".")[-2], 1.0)

        layer.norm = norm


PARTS = {"time": measure_time, "demo": measure_demo, "random": measure_random}

if __name__ == "__main__":
    main()
